"""The model, the problems and the prompts of an evaluation, a selection or a study."""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, TypeAlias

from pydantic import Field
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...hf import check_head, head_of
from ..config import Sampling
from ..data.columns import Columns, Conversation, Problem, UnusableRow
from ..data.problems import QWEN25_MATH_COT, counted, encode, few_shot, read_problems
from ..device_memory import let_segments_grow
from ..interrupts import doing
from ..models.loading import (
    architecture,
    auto_dtype,
    capability_of,
    load_model,
    open_source,
    tell_attention,
)
from ..rollouts.kv_cache import check_cache
from ..rollouts.padding import check_sampling
from ..settings import Positive, Settings, UserError, json_object
from ..task import check_context, find_device

Opened: TypeAlias = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class Asked(NamedTuple):
    """Problems to ask, worked examples that precede each, and a line about rows left out."""

    problems: list[Problem]
    shots: list[Problem]
    left_out: str  # empty if none are


class TaskSettings(Settings):
    """A model, problems, and how the model is asked them."""

    model: str = ""
    """Hub id, local folder, GGUF file, folder of a run (its newest checkpoint is used), or "demo"
    (135M).
    """
    data: str = ""
    """Problems: a .jsonl or .parquet file, a hub dataset (owner/name), "addition" (sums of two
    two-digit numbers), or gym:TASK[?setting=value&...] (a reasoning-gym task).
    """
    subset: str | None = None
    """Configuration of the hub dataset, if it has several."""
    split: str = "test"
    """Split of the hub dataset."""
    prompt_column: str | None = None
    """Column of the data that holds the prompt; default: one of those that em-kernels data --help
    lists.
    """
    answer_column: str | None = None
    """Column of the data that holds the answer; default: one of those listed there."""
    system: str | None = None
    """System message before each problem, with template chat, in place of the data's own; empty:
    none.
    """
    skip: Annotated[int, Field(ge=0)] = 0
    """Leave out this many problems at the start, such as those a prompt was selected from."""
    count: Positive | None = None
    """Number of rows to take, of which those without an answer are left out; default: all of a file
    or dataset, 1000 of a generator.
    """
    template: Literal["chat", "qwen25-math-cot", "few-shot", "raw"] = "chat"
    """chat: the model's chat template. qwen25-math-cot: the prompt of Qwen2.5-Math's evaluation and
    of the paper. few-shot: "Q: ... A:" after worked examples, without a chat template; an answer
    is one line. raw: the problem's text alone.
    """
    template_kwargs: str = "{}"
    """JSON object of variables for the chat template, such as {"enable_thinking": false}."""
    shots: Annotated[int, Field(ge=0)] = 2
    """Worked examples for template few-shot: the data's first problems, which are not asked."""
    sampling: Sampling = Sampling()
    """How completions are sampled."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed of samples and of generated problems. Sample k of problem i depends on
    (seed, i, k), not on its batch.
    """
    batch_size: Positive = 64
    """Completions sampled at once; halved when memory runs out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the model. auto: bfloat16 on a GPU, but float16 on CUDA cards below sm80; on a
    CPU bfloat16 if it has bf16 instructions, else float32.
    """
    attention: str = "auto"
    """transformers' attn_implementation. auto: sdpa, or eager if the architecture has no sdpa."""

    def problems(self) -> Asked:
        """Return the problems to ask. Rows without a prompt are left out, rows without an answer
        where others have one, and rows that repeat another.
        """
        if not self.data:
            raise UserError("data: missing; name a file, a dataset, addition or gym:TASK")
        if self.system is not None and self.template != "chat":
            raise UserError(f"system: goes with template chat, not with {self.template}")
        shots = self.shots if self.template == "few-shot" else 0
        start = shots + self.skip
        same = self.model_dump(include={"subset", "split", "count", "seed", "system"})
        columns = Columns(self.prompt_column, self.answer_column)
        rows = read_problems(self.data, more=start, columns=columns, **same)
        found = [row for row in rows if isinstance(row, Problem)]
        reasons = [str(row) for row in rows if isinstance(row, UnusableRow)]
        if answered := [problem for problem in found if problem.answer is not None]:
            reasons += ["no answer"] * (len(found) - len(answered))
            found = answered
        elif shots:
            raise UserError(f"shots: {self.data} has no answers for worked examples; take 0")
        different = {json.dumps((problem.prompt, problem.answer)): problem for problem in found}
        reasons += ["repeats another"] * (len(found) - len(different))
        found = list(different.values())
        if (n := len(found)) <= start:
            left = f"{shots} worked examples and {self.skip} skipped leave none"
            raise UserError(f"data: {self.data} has {n} problems; {left}; lower skip or shots")
        told = f"Left out {len(reasons)} of {len(rows)} rows of {self.data}: {counted(reasons)}"
        return Asked(found[start:], found[:shots], told if reasons else "")

    def prompt(self, problem: Problem, shots: Sequence[Problem]) -> str | Conversation:
        """Return the prompt's text; for template chat the user's message, or all messages."""
        if self.template == "few-shot":
            return few_shot(shots, problem)
        if self.template != "chat" and not isinstance(problem.prompt, str):
            why = f"{self.template} takes prompts of one text, not conversations; use chat"
            raise UserError(f"template: {why}")
        if self.template == "qwen25-math-cot" and isinstance(problem.prompt, str):
            return QWEN25_MATH_COT.format(problem.prompt.strip())
        return problem.prompt

    def sampled(self) -> Sampling:
        """Return the sampling settings with the stop string that the template's answers need."""
        ends = {"few-shot": ("\n",), "qwen25-math-cot": ("<|im_end|>",)}
        stop = self.sampling.stop or ends.get(self.template, ())
        return self.sampling.model_copy(update={"stop": stop})


def digest(problems: Sequence[Problem], prompts: Sequence[str | Conversation]) -> str:
    """Hash the problems and their prompts, to notice on resume that they changed."""
    asked = [(p.prompt, p.answer, text) for p, text in zip(problems, prompts, strict=True)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def open_model(config: TaskSettings, console: Console) -> Opened:
    """Load the model and check that it can be sampled and scored; UserError where it cannot."""
    let_segments_grow()
    device = find_device(config.device)
    auto = auto_dtype(device.type, capability_of(device))
    dtype = auto if config.dtype == "auto" else config.dtype
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
    config: TaskSettings, opened: Opened, texts: Sequence[str | Conversation]
) -> list[list[int]]:
    """Tokenize prompts, checked against the model's context length."""
    model, tokenizer = opened
    kwargs = json_object("template_kwargs", config.template_kwargs)
    found = [encode(tokenizer, text, config.template == "chat", kwargs) for text in texts]
    longest = max(found, key=len)
    told = f"data: the prompt of problem {config.skip + found.index(longest)} has"
    check_context(model.config, len(longest), 0, told, "leave it out")
    return found
