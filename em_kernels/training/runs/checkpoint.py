"""Checkpoints, written atomically, and the optimizer state that a run resumes from."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..config import TrainConfig
from ..models.rounding import to_bf16
from ..run_folder import CHECKPOINTS, FACTS, STATE, STEP, steps_in, update_of
from ..settings import UserError, in_one_line
from .records import differing, sync

Writer = Callable[[Path], None]
State: TypeAlias = Mapping[str, Tensor] | None
Facts: TypeAlias = Mapping[str, Any] | None
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
WITHOUT_EFFECT = {  # settings that do not change an update's numbers
    *("output", "steps", "save_at", "save_optimizer", "keep", "stop_below", "stop_repetition"),
    *("gpu_memory", "host_memory", "offload_dir", "rollouts_from", "answer", "report_to"),
}


def defining_settings(config: TrainConfig) -> dict[str, Any]:
    """Return every setting that determines an update's numbers, as JSON values by name."""
    return config.located().flat(exclude=WITHOUT_EFFECT)


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, Tensor] | None = None,
) -> Writer:
    """Return a function that writes a bf16 folder for from_pretrained, vLLM and GGUF converters.

    It takes no memory on the device; on the host 2 GB, or 2 bytes per weight if they are not bf16.
    """

    def write(folder: Path) -> None:
        rounded = {}
        for name, p in model.named_parameters():
            values = p.detach() if weights is None else weights[name]
            if values.dtype != torch.bfloat16:
                values = to_bf16(values.cpu().float().flatten()).view(p.shape)
            rounded[id(p)] = values
        # Matched by identity, as a tied weight has two names; buffers are written as they are.
        named = model.state_dict(keep_vars=True).items()
        state = {name: rounded.get(id(weight), weight.detach()) for name, weight in named}
        generation, model.generation_config = model.generation_config, GenerationConfig()
        try:
            model.save_pretrained(folder, state_dict=state, max_shard_size="2GB")
        finally:
            model.generation_config = generation
        if generation is not None:  # save_pretrained would refuse what some models publish.
            path = folder / "generation_config.json"
            generation.to_json_file(path, keys_to_pop=["compile_config"])
        tokenizer.save_pretrained(folder)
        path = folder / "config.json"  # It names the dtype in memory, for submodels too.
        path.write_text(re.sub(r'"dtype": "\w+"', '"dtype": "bfloat16"', path.read_text()))

    return write


def save_checkpoint(
    write: Writer, folder: Path, state: State = None, facts: Facts = None, keep: int | None = None
) -> Path:
    """Have `write` fill a hidden folder, sync it to disk, and rename it to `folder`.

    Args:
        state, facts: the optimizer's, its update and settings; all other checkpoints lose theirs.
        keep: number of checkpoints to keep, this one and the newest others.

    Raises: UserError if the disk is full or not writable; an earlier checkpoint there stays.
    """
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    try:
        _clear(partial, old, *_leftovers(folder.parent))
        partial.mkdir(parents=True)
        write(partial)
        if state is not None:
            digest = _write_state(partial / STATE, state)
            (partial / FACTS).write_text(json.dumps({**(facts or {}), "sha256": digest}))
        for path in partial.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes 0600.
            sync(path)
        sync(partial)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
        sync(folder.parent.parent)
        others = [path for path in steps_in(folder.parent) if path != folder]
        if state is not None:
            _drop_states(others)
        for path in others[: max(0, len(others) + 1 - keep)] if keep else ():
            path.rename(path.with_name(f".{path.name}.partial"))
        _clear(*_leftovers(folder.parent))
    except Exception as error:  # safetensors and tokenizers have classes of their own.
        why = f"cannot write the checkpoint {folder}: {in_one_line(error)}"
        raise UserError(f"output: {why}") from error
    finally:
        _clear(partial, old)
    return folder


def newest_state(run: Path, settings: Mapping[str, Any]) -> tuple[Path | None, list[str]]:
    """Return the checkpoint with the newest usable state of these settings, and why newer ones are
    unusable; delete older states and temporary folders.
    """
    refused = list[str]()
    _clear(*_leftovers(run / CHECKPOINTS))
    steps = steps_in(run / CHECKPOINTS)
    while steps:
        folder = steps.pop()
        if (folder / STATE).exists() or (folder / FACTS).exists():
            if (why := _refusal(folder, settings)) is None:
                _drop_states(steps)
                return folder, refused
            refused.append(f"{folder} cannot be resumed from: {why}")
    return None, refused


def read_state(checkpoint: Path) -> Mapping[str, Tensor]:
    """Return the optimizer's state as memory-mapped CPU tensors, read when used."""
    return load_file(checkpoint / STATE)


def _refusal(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Return why a saved state cannot be resumed from; None if it can."""
    digest = hashlib.sha256()
    try:
        facts = json.loads((folder / FACTS).read_bytes())
        if what := differing(facts["settings"], settings):
            return f"it was made with {what}"
        with open(folder / STATE, "rb") as file:
            while block := file.read(2**24):
                digest.update(block)
        if digest.hexdigest() != facts["sha256"]:
            return f"{STATE} is truncated or corrupted"
        return None if facts["update"] == update_of(folder) else f"{FACTS} is of another update"
    except OSError as error:
        return f"cannot read {error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{FACTS} is corrupted"


def _drop_states(folders: Iterable[Path]) -> None:
    for path in folders:
        (path / FACTS).unlink(missing_ok=True)  # First, as tensors without it are no state.
        (path / STATE).unlink(missing_ok=True)


def _write_state(path: Path, state: Mapping[str, Tensor]) -> str:
    """Write a safetensors file with one tensor at a time on the host; return its SHA-256."""
    names = sorted(state, key=lambda name: -state[name].element_size())  # aligns each
    header, end = {}, 0
    for name in names:
        start, end = end, end + state[name].nbytes
        kind = {"dtype": SAFETENSORS_NAMES[state[name].dtype], "shape": [*state[name].shape]}
        header[name] = {**kind, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(head := len(text).to_bytes(8, "little") + text)
        digest = hashlib.sha256(head)
        for name in names:
            data = state[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().data
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def _leftovers(checkpoints: Path) -> list[Path]:
    """Return temporary folders that a killed writer left behind."""
    named = checkpoints.glob(f".{STEP}*") if checkpoints.name == CHECKPOINTS else ()
    return [path for path in named if path.suffix in (".partial", ".old")]


def _clear(*paths: Path) -> None:
    """Delete temporary folders; an old checkpoint whose replacement is missing is restored."""
    for path in paths:
        home = path.with_name(path.stem[1:])
        if path.suffix == ".old" and path.exists() and not home.exists():
            path.rename(home)
        shutil.rmtree(path, ignore_errors=True)
