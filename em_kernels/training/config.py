"""What a run is: every setting, its default (the paper's), its range, and where settings come
from.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class UserError(Exception):
    """Something the user can mend; the message is one line that names it and the remedy."""


Positive = Annotated[int, Field(ge=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def __init__(self, **values: Any) -> None:
        """Raises: UserError for an unknown setting, a value of the wrong kind or out of range."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(one_line(error)) from None


class Sampling(_Settings):
    """How completions are sampled; a model's generation_config gives only its EOS ids."""

    temperature: Annotated[float, Field(ge=0, le=100)] = 0.5
    """Sampling temperature; 0 is greedy."""
    top_k: Annotated[int, Field(ge=0)] = 50
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Keep the most probable tokens that hold this much probability; 1 keeps all."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.15
    """Divide the logits of tokens already seen, prompt included; 1 is off."""
    max_new_tokens: Positive = 512
    """Longest completion."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a completion, beside EOS; the token that completes one is kept, and
    trained.
    """


class TrainConfig(_Settings):
    """One-shot Entropy Minimization: sample completions of one prompt, then minimise the entropy of
    their next-token distributions. The defaults are the paper's (arXiv 2505.20282).
    """

    model: str = ""
    """Hub id, local folder, or "demo" (SmolLM2-135M-Instruct, from the package registry)."""
    prompt: str | None = None
    """The prompt, as text."""
    prompt_from: Path | None = None
    """A .jsonl or .parquet file of prompts, instead of a text."""
    prompt_rows: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    """Rows of that file to train on, from 0; the completions are divided among them."""
    answer: str | None = None
    """The prompt's answer, to report accuracy: a number, or the exact text in \\boxed{}. Training
    never sees it. A file may have its own.
    """
    chat_template: bool = True
    """Send the prompt as a user message through the model's chat template, or else as it is."""
    output: Path = Path("runs/one-shot-em")
    """Folder of the run; must not hold another run."""

    steps: Positive = 10
    """Optimizer updates."""
    rollouts: Positive = 64
    """Completions per update."""
    sampling: Sampling = Sampling()
    """How the completions are sampled."""
    loss_temperature: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """The loss divides the logits by this; default the sampling temperature (1 where that is 0)."""
    lr: Annotated[float, Field(gt=0, lt=1)] = 2e-5
    """Learning rate, constant."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """AdamW's decay rates."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """AdamW's decoupled weight decay."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest global gradient norm."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 15
    """Completion i of update u depends on (seed, u, i) alone."""
    stop_below: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stop early once the entropy is below this share of its first value; 0 never does."""
    save_at: tuple[Positive, ...] = ()
    """Updates after which a checkpoint is kept, beside the last."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; weights are fp32 always. auto: bfloat16 on a GPU, float32 on a CPU."""
    micro_batch_tokens: Positive = 4096
    """Tokens, prompts included, of one forward and backward: memory; the result stays the same."""
    rollout_batch: Positive = 64
    """Completions sampled side by side: their KV cache is the memory of the sampling phase."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more time."""
    grad_tolerance: Annotated[float, Field(ge=0, lt=1)] = 2**-9
    """Share of the mass of the logits' gradient that may be left out, and with it most of the
    head's backward; 2^-9 is bf16's own rounding, 0 is exact.
    """
    attention: str = "sdpa"
    """transformers' attn_implementation: sdpa, eager, flash_attention_2."""
    chunk_bytes: Positive | None = None
    """Memory for the logits held at a time; default 1 GiB or an eighth of the free memory."""

    @property
    def temperature(self) -> float:
        """Of the loss."""
        return self.loss_temperature or self.sampling.temperature or 1.0

    def check_complete(self) -> None:
        """Raise UserError where settings are missing, or do not go together."""
        if not self.model:
            raise UserError('model: missing; name a hub id, a local folder, or "demo"')
        if (self.prompt is None) == (self.prompt_from is None):
            raise UserError(
                "prompt: give a text with prompt, or a file with prompt_from, and not both"
            )
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("prompt: is empty; there is nothing to complete")
        if self.answer is not None and self.prompt_from is not None:
            raise UserError(
                "answer: goes with a prompt given as text; a file has answers of its own"
            )
        if self.prompt_from is not None and len(self.prompt_rows) > self.rollouts:
            raise UserError(
                f"rollouts: {self.rollouts} do not reach {len(self.prompt_rows)} prompt_rows"
            )
        if 0 < self.sampling.temperature < 0.01:
            raise UserError(
                f"sampling.temperature: {self.sampling.temperature} is below 0.01; 0 is greedy"
            )
        if any(step > self.steps for step in self.save_at):
            raise UserError(f"save_at: {self.save_at} lies beyond the last of {self.steps} steps")

    def to_yaml(self) -> str:
        """Every setting, readable by :func:`read_yaml`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> TrainConfig:
    """The settings of a YAML file over the defaults.

    Raises: UserError for a file that cannot be read, or whose settings TrainConfig refuses.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config: cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"config: {path} must hold lines of `setting: value`")
    try:
        return TrainConfig(**values)
    except UserError as error:
        raise UserError(f"config: {path}: {error}") from None
    except TypeError as error:
        raise UserError(f"config: {path}: names of settings must be text") from error


def one_line(error: ValidationError) -> str:
    """The first complaint: setting, value, what is wrong, and for an unknown setting the nearest
    known one.
    """
    complaint: dict[str, Any] = dict(error.errors()[0])
    prefix = "sampling." if error.title == "Sampling" else ""
    name = prefix + ".".join(str(part) for part in complaint["loc"])
    if complaint["type"] == "extra_forbidden":
        known = {field: field for field in TrainConfig.model_fields}
        known |= {field: f"sampling.{field}" for field in Sampling.model_fields}
        near = difflib.get_close_matches(name.split(".")[-1], known, n=1)
        hint = f"; did you mean {known[near[0]]}?" if near else ""
        return f"{name}: unknown setting{hint}"
    message = complaint["msg"]
    return f"{name}: {complaint['input']!r}: {message[:1].lower()}{message[1:]}"
