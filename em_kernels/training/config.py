"""Settings of a run: each with its default (the paper's) and range; YAML, presets."""

import difflib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from tyro.conf import arg


class UserError(Exception):
    """Something the user can mend; the message is one line that names it and the remedy."""


def in_one_line(error: object) -> str:
    """The text of an exception that may have several lines."""
    return " ".join(str(error).split())


Positive = Annotated[int, Field(ge=1)]
Auto = Literal["auto"]
Precision = Literal["auto", "fp32", "bf16"]
T = TypeVar("T", bound="Settings")
FULL_LR, LORA_LR = 2e-5, 2e-4


class Settings(BaseModel):
    """Base of a command's settings; a field's docstring is its --help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for field in cls.model_fields.values():  # --help keeps the lines of the source, otherwise
            field.description = " ".join((field.description or "").split())

    def __init__(self, **values: Any) -> None:
        """Raises: UserError for an unknown setting, a value of the wrong kind or out of range."""
        for name, value in values.items():
            if any("\ud800" <= letter <= "\udfff" for letter in str(value)):
                raise UserError(f"{name}: is not text in UTF-8")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(one_line(error, type(self))) from None

    def to_yaml(self) -> str:
        """Every setting, readable by :func:`read_yaml`."""
        values = self.model_dump(mode="json")
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        # U+0085 ends a line in YAML
        return yaml.safe_dump(values, sort_keys=False) if "\x85" in text else text


def _not_too_cold(temperature: float) -> float:
    if 0 < temperature < 0.01:  # logits over it might overflow
        raise PydanticCustomError("low", "is below 0.01; 0 is greedy")
    return temperature


class Sampling(Settings):
    """How completions are sampled; a model's generation_config gives only its EOS ids."""

    temperature: Annotated[float, Field(ge=0, le=100), AfterValidator(_not_too_cold)] = 0.5
    """Sampling temperature, 0.01 or more; 0 is greedy."""
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


class TrainConfig(Settings):
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
    """The prompt's answer, to report accuracy, compared by value. Training never sees it. A file
    may have its own.
    """
    chat_template: bool = True
    """Send the prompt as a user message through the model's chat template, or else as it is."""
    template_kwargs: str = "{}"
    """JSON: what the chat template takes, such as {"enable_thinking": false}."""
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
    lr: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Learning rate, constant; default 2e-5, and 2e-4 for LoRA, whose best is about ten times as
    high.
    """
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """AdamW's decay rates."""
    eps: Annotated[float, Field(ge=1e-30)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """AdamW's decoupled weight decay."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest global gradient norm."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 15
    """Completion i of update u depends on (seed, u, i) alone."""
    stop_below: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stop early once the entropy is below this share of its first value; 0 never does."""
    stop_repetition: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Stop early once more than this share of the completions' 4-grams repeat; 1 never does."""
    save_at: tuple[Positive, ...] = (1, 2, 3, 5, 10)
    """Updates after which a checkpoint is kept, beside the last; later ones than the last are
    ignored.
    """
    save_optimizer: Auto | bool = "auto"
    """Keep the optimizer's state with the newest checkpoint, so that resuming starts there; auto:
    up to 8 GiB of it. Without it, resuming replays the recorded completions from the start.
    """
    keep: Positive | None = None
    """Checkpoints to keep, the newest; default all."""
    rollouts_from: Path | None = None
    """Replay the completions of another run's folder instead of sampling."""
    official_loss: bool = False
    """The loss as the official train.py has it: entropies weighted by their own position's mask,
    not the next token's, EOS left out, micro-batch means averaged.
    """

    mode: Literal["auto", "full", "offload", "lora"] = "auto"
    """full: fp32 master weights and AdamW's moments on the device; offload: in host memory, or in
    offload_dir; lora: low-rank adapters. auto: the first of these that fits.
    """
    four_bit: Annotated[bool, arg(name="4bit")] = False
    """Hold the frozen base of a LoRA in 4 bits (NF4, bitsandbytes)."""
    lora_rank: Positive = 16
    """Rank of the adapters."""
    lora_alpha: Positive = 32
    """The adapters' product is multiplied by lora_alpha / lora_rank."""
    lora_targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("all-linear",)
    """Names of the layers that get adapters; all-linear: every linear layer but the head."""
    moments: Precision = "auto"
    """AdamW's two moments; bf16 saves 4 bytes a parameter. auto: fp32 where it fits."""
    gradients: Precision = "auto"
    """Where micro-batches' gradients are added up; bf16 saves 2 bytes a parameter. auto: fp32 where
    it fits.
    """
    offload_dir: Path | None = None
    """With mode offload: master weights and moments in files of this folder, on a fast local disk,
    instead of in host memory.
    """
    gpu_memory: Annotated[float, Field(gt=0)] | None = None
    """GiB of the device to use, context included; default what is free."""
    host_memory: Annotated[float, Field(gt=0)] | None = None
    """GiB of host memory to use; default what is free, a container's limit heeded."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the weights that compute; the optimizer keeps fp32 masters. auto: bfloat16 on a
    GPU, and on a CPU that multiplies it (AMX, AVX512-BF16), where it is faster.
    """
    micro_batch: Auto | Positive = "auto"
    """Tokens of one forward and backward, a shared prompt not counted: memory; the result stays
    the same. auto: as many as fit; halved when memory runs out all the same.
    """
    micro_batch_rows: Positive | None = None
    """Completions of one forward and backward, at most."""
    share_prefix: bool = True
    """Compute the prompt once an update for all completions, its gradients included."""
    rollout_batch: Auto | Positive = "auto"
    """Completions sampled side by side: their KV cache is the memory of the sampling phase. auto:
    as many as fit.
    """
    gradient_checkpointing: Auto | bool = "auto"
    """Recompute activations in the backward: less memory, about a third more time. auto: where
    memory is short.
    """
    grad_tolerance: Annotated[float, Field(ge=0, lt=1)] = 2**-9
    """Share of the mass of the logits' gradient that may be left out, and with it most of the
    head's backward; 2^-9 is bf16's own rounding, 0 is exact.
    """
    attention: str = "auto"
    """transformers' attn_implementation: sdpa, eager, flash_attention_2; auto: sdpa, or eager where
    the architecture has none.
    """
    chunk_bytes: Positive | None = None
    """Memory for the logits held at a time; default 256 MiB."""
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where each update's metrics are logged too, beside metrics.jsonl: needs that package; wandb
    works offline with WANDB_MODE=offline.
    """

    @property
    def temperature(self) -> float:
        """Temperature that the loss divides logits by."""
        return self.loss_temperature or self.sampling.temperature or 1.0

    def located(self) -> "TrainConfig":
        """Its files and folders named so that they are found from any directory."""
        names = ("prompt_from", "rollouts_from", "offload_dir")
        paths = {name: Path(value) for name in names if (value := getattr(self, name)) is not None}
        update: dict[str, Any] = {n: Path(os.path.abspath(path)) for n, path in paths.items()}
        if self.model and os.path.isdir(self.model):  # not of the hub
            update["model"] = os.path.abspath(self.model)
        return self.model_copy(update=update)

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
        if self.four_bit and self.mode not in ("auto", "lora"):
            raise UserError(f"4bit: goes with mode lora; {self.mode} trains the weights themselves")
        if self.offload_dir is not None and self.mode not in ("auto", "offload"):
            raise UserError(f"offload_dir: goes with mode offload, not {self.mode}")
        if self.dtype == "float32" and self.attention.startswith("flash"):
            raise UserError(f"attention: {self.attention} computes in 16 bits; use dtype bfloat16")


ADDITION_SHOTS = ((12, 7), (23, 45))
DEMO_SHOTS = "".join(
    f"Q: What is {a} + {b}?\nA: {a} + {b} = {a + b}\n\n" for a, b in ADDITION_SHOTS
)
PRESETS: dict[str, dict[str, Any]] = {
    "one-shot-em": {},
    # 8 GPUs that sample the same 8 completions each, a "step" being a micro-batch of 2 of them
    "official": {"rollouts": 8, "steps": 2, "micro_batch_rows": 2, "official_loss": True},
    "demo": {
        "model": "demo",
        "prompt": f"{DEMO_SHOTS}Q: What is 38 + 45?\nA:",
        "answer": "83",
        "chat_template": False,
        "output": "runs/demo-train",
        "rollouts": 32,
        "steps": 5,
        "lr": 5e-6,
        "stop_below": 0.1,
        "save_at": (),
        "sampling": {
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "max_new_tokens": 24,
            "stop": ("\n",),
        },
    },
}


def preset(name: str) -> TrainConfig:
    """The settings of PRESETS over the defaults, which are the paper's.

    Raises: UserError for an unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"preset: {name!r} is none of {', '.join(PRESETS)}")
    return TrainConfig(**PRESETS[name])


def json_object(name: str, text: str) -> dict[str, Any]:
    """A setting that is a JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f'{name}: {text!r} is not a JSON object such as {{"name": false}}')
    return found


def read_yaml(path: Path) -> TrainConfig:
    """The settings of a YAML file over the defaults.

    Raises: UserError for a file that cannot be read, or whose settings TrainConfig refuses.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config: cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config: {path} is not YAML: {in_one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"config: {path} must hold lines of `setting: value`")
    try:
        return TrainConfig(**values)
    except UserError as error:
        raise UserError(f"config: {path}: {error}") from None
    except TypeError as error:
        raise UserError(f"config: {path}: names of settings must be text") from error


def one_line(error: ValidationError, kind: type[Settings]) -> str:
    """The first complaint: setting, value, what is wrong, and for an unknown setting the nearest
    known one of this kind.
    """
    complaint: dict[str, Any] = dict(error.errors()[0])
    prefix = "sampling." if error.title == "Sampling" else ""
    name = prefix + ".".join(str(part) for part in complaint["loc"])
    if complaint["type"] == "extra_forbidden":
        known = {field: prefix + field for field in kind.model_fields}
        if "sampling" in known:
            known |= {field: f"sampling.{field}" for field in Sampling.model_fields}
        near = difflib.get_close_matches(name.split(".")[-1], known, n=1)
        hint = f"; did you mean {known[near[0]]}?" if near else ""
        return f"{name}: unknown setting{hint}"
    message = complaint["msg"]
    return f"{name}: {complaint['input']!r}: {message[:1].lower()}{message[1:]}"
