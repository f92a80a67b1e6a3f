"""Completions of problems by a model: settings, prompts, results written as they arrive."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...functional import fused_token_stats
from ...hf import check_head, head_of
from ..config import Positive, Sampling, Settings, TrainConfig, UserError, json_object
from ..data.problems import QWEN25_MATH_COT, Conversation, Problem, encode, few_shot, read_problems
from ..engines.step import SharedPrefix, can_share_prefix, micro_batches, scored_states
from ..interrupts import doing, progress_on
from ..models.loading import architecture, auto_dtype, load_model, open_source, tell_attention
from ..out_of_memory import halve_until_it_fits
from ..rollouts.padding import check_cache, check_sampling
from ..rollouts.sampling import Rollout, generate
from ..runs.records import append, read_lines
from ..task import check_context, find_device

COMPLETIONS = "completions.jsonl"


class TaskSettings(Settings):
    """A model, problems, and how it is asked them."""

    model: str = ""
    """Hub id, local folder, folder of a run (its newest checkpoint), or "demo"; with server, the
    model's name there.
    """
    data: str = ""
    """A .jsonl or .parquet file, a dataset of the hub (owner/name), "addition" (sums of two
    two-digit numbers), or gym:TASK[?setting=value&...] (a reasoning-gym task).
    """
    subset: str | None = None
    """Subset (configuration) of a dataset of the hub."""
    split: str = "test"
    """Split of a dataset of the hub."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Problems to leave out, the first: what was selected from, say."""
    count: Positive | None = None
    """Problems to take, the next; default all, and of a generator 1000."""
    template: Literal["chat", "qwen25-math-cot", "few-shot", "raw"] = "chat"
    """chat: the model's chat template. qwen25-math-cot: as Qwen2.5-Math is asked, and by the paper.
    few-shot: "Q: ... A:" after worked examples, without a chat template; ends at the line. raw: the
    problem's text.
    """
    template_kwargs: str = "{}"
    """JSON: what the chat template takes, such as {"enable_thinking": false}."""
    shots: Annotated[int, Field(ge=0)] = 2
    """Worked examples of template few-shot: the first problems of the data, left out of it."""
    sampling: Sampling = Sampling()
    """How completions are sampled."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of samples and of a generator's problems: completion k of problem i depends on
    (seed, i, k).
    """
    batch_size: Positive = 64
    """Completions side by side; halved where memory runs out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, and on a CPU that multiplies it."""
    attention: str = "auto"
    """transformers' attn_implementation; auto: sdpa, or eager where the architecture has none."""

    def problems(self) -> tuple[list[Problem], list[Problem]]:
        """Read the task's problems, and the worked examples that go before them."""
        if not self.data:
            raise UserError("data: missing; name a file, a dataset, addition or gym:TASK")
        shots = self.shots if self.template == "few-shot" else 0
        found = read_problems(
            self.data,
            subset=self.subset,
            split=self.split,
            count=self.count,
            more=shots + self.skip,
            seed=self.seed,
        )
        if len(found) <= shots + self.skip:
            raise UserError(
                f"data: {self.data} has {len(found)} problems; {shots} worked examples and "
                f"{self.skip} skipped leave none"
            )
        return found[shots + self.skip :], found[:shots]

    def prompt(self, problem: Problem, shots: Sequence[Problem]) -> str | Conversation:
        """As text; of template chat the user's message, or all messages."""
        if self.template == "few-shot":
            return few_shot(shots, problem)
        if self.template != "chat" and not isinstance(problem.prompt, str):
            raise UserError(
                f"template: {self.template} takes prompts of one text, not conversations; use chat"
            )
        cot = self.template == "qwen25-math-cot"
        return QWEN25_MATH_COT.format(problem.prompt) if cot else problem.prompt

    def sampled(self) -> Sampling:
        """With the end that the template's answers have."""
        ends = {"few-shot": ("\n",), "qwen25-math-cot": ("<|im_end|>",)}
        stop = self.sampling.stop or ends.get(self.template, ())
        return self.sampling.model_copy(update={"stop": stop})


def digest(problems: Sequence[Problem], prompts: Sequence[str | Conversation]) -> str:
    """Changes when a problem, or how it is asked, does."""
    asked = [(p.prompt, p.answer, text) for p, text in zip(problems, prompts, strict=True)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


class Completion(NamedTuple):
    """The k-th sample for a problem."""

    problem: int
    sample: int
    text: str
    tokens: int | None
    ended: bool
    entropy: float | None = None  # mean over its tokens, in nats


class Local(NamedTuple):
    """A transformers model that is asked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    sampling: Sampling
    seed: int
    stream: int  # of randomness: training's numbers are three, so it never shares them
    batch_size: int = 64
    with_entropy: bool = False

    def complete(
        self, keys: Sequence[tuple[int, int]], on_done: Callable[[list[Completion]], None]
    ) -> None:
        """Completions in batches of similar length, the longest first."""
        keys, size = sorted(keys, key=lambda key: -len(self.prompts[key[0]])), self.batch_size

        def sample(size: int) -> tuple[list[Rollout], Sequence[float | None]]:
            rollouts = generate(
                self.model,
                self.tokenizer,
                [self.prompts[i] for i, _ in keys[:size]],
                [(self.seed, i, k, self.stream) for i, k in keys[:size]],
                self.sampling,
                batch_size=size,
            )
            if not self.with_entropy:
                return rollouts, [None] * len(rollouts)
            temperature = self.sampling.temperature or 1.0
            return rollouts, mean_entropies(self.model, rollouts, temperature)

        def on_retry(smaller: int) -> None:
            nonlocal size
            size = smaller

        while keys:
            try:
                rollouts, entropies = halve_until_it_fits(sample, size, 1, on_retry)
            except torch.OutOfMemoryError:
                raise UserError("batch_size: out of memory with 1") from None
            batch = keys[:size]
            texts = self.tokenizer.batch_decode(
                [r.response_ids for r in rollouts], skip_special_tokens=True
            )
            found = zip(batch, texts, rollouts, entropies, strict=True)
            on_done(
                [Completion(*key, t, len(r.response_ids), r.ended, h) for key, t, r, h in found]
            )
            keys = keys[size:]


class Served(NamedTuple):
    """A server's model."""

    url: str
    model: str
    prompts: list[str | Conversation]
    sampling: Sampling
    seed: int
    stream: int
    template_kwargs: Mapping[str, Any]
    parallel: int

    def complete(
        self, keys: Sequence[tuple[int, int]], on_done: Callable[[list[Completion]], None]
    ) -> None:
        """Completions in the order in which the server ends them."""
        from ..rollouts.server import complete

        complete(
            self.url,
            self.model,
            [self.prompts[i] for i, _ in keys],
            [hash((self.seed, *key, self.stream)) for key in keys],
            self.sampling,
            template_kwargs=self.template_kwargs,
            parallel=self.parallel,
            on_done=lambda i, text, n, ended: on_done([Completion(*keys[i], text, n, ended)]),
        )


def collect(
    source: Local | Served,
    keys: Sequence[tuple[int, int]],
    path: Path,
    console: Console,
    title: str = "completing",
) -> dict[tuple[int, int], Completion]:
    """The completions (problem, sample) that a file holds, and those of the source for the others,
    which are added to the file as they come.
    """
    rows = [Completion(**row) for row in read_lines(path, "problem")]
    found = {row[:2]: row for row in rows}
    missing = [key for key in keys if key not in found]
    with progress_on(console) as progress:
        bar = progress.add_task(title, total=len(keys), completed=len(keys) - len(missing))

        def on_done(done: list[Completion]) -> None:
            append(path, [completion._asdict() for completion in done])
            found.update({completion[:2]: completion for completion in done})
            progress.advance(bar, len(done))

        with doing(title):
            if missing:
                source.complete(missing, on_done)
    return {key: found[key] for key in keys}


def open_model(
    config: TaskSettings, console: Console
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Raises: UserError where there is none, or it is none that can be asked."""
    device = find_device(TrainConfig(device=config.device))
    dtype = auto_dtype(device.type) if config.dtype == "auto" else config.dtype
    source, model_config, tokenizer = open_source(config.model)
    if config.template == "chat" and tokenizer.chat_template is None:
        raise UserError("template: the tokenizer has no chat template; use few-shot or raw")
    name = architecture(model_config)
    with console.status(escape(f"loading {config.model}")), doing(f"loading {name}"):
        model = load_model(source, dtype, config.attention, device, named=config.model).eval()
    try:
        with doing(f"checking {name}"):
            check_head(model, head_of(model))
            check_cache(model)
            check_sampling(model)
    except TypeError as error:
        raise UserError(str(error)) from error
    tell_attention(config.attention, model, console)
    return model, tokenizer


def token_ids(
    config: TaskSettings,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    texts: Sequence[str | Conversation],
) -> list[list[int]]:
    """Tokenize prompts, checked against the model's context length."""
    chat = config.template == "chat"
    kwargs = json_object("template_kwargs", config.template_kwargs)
    found = [encode(tokenizer, text, chat, kwargs) for text in texts]
    longest, new = max(map(len, found)), config.sampling.max_new_tokens
    row = config.skip + list(map(len, found)).index(longest)
    check_context(
        model.config, longest, new, f"data: the prompt of problem {row} has", "leave it out"
    )
    return found


@torch.no_grad()
def states_of(
    model: PreTrainedModel, rollouts: Sequence[Rollout], tokens: int = 8192
) -> Iterator[tuple[list[int], Tensor]]:
    """Which rollouts, and the hidden states (n, D) that score their responses' tokens, in their
    order; so many tokens at a time. What all prompts begin with is computed once.
    """
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i]))
    same = len(commonprefix([rollout.prompt_ids[:-1] for rollout in rollouts]))
    prompt = None
    if same > 0 and can_share_prefix(model):
        prompt = SharedPrefix(model, rollouts[0].prompt_ids[:same])
    batches = micro_batches([rollouts[i] for i in order], tokens, same if prompt else 0)
    for batch in batches:
        members, order = order[: len(batch)], order[len(batch) :]
        yield members, scored_states(model, batch, prompt, official=False)


def mean_entropies(
    model: PreTrainedModel, rollouts: Sequence[Rollout], temperature: float
) -> list[float]:
    """Over each rollout's tokens, in nats."""
    head, found = head_of(model), [0.0] * len(rollouts)
    for members, states in states_of(model, rollouts):
        stats = fused_token_stats(
            states, head.weight.detach(), temperature=temperature, **head.arguments()
        )
        assert stats.entropy is not None
        parts = stats.entropy.split([len(rollouts[i].response_ids) for i in members])
        for i, part in zip(members, parts, strict=True):
            found[i] = part.mean().item()
    return found
