"""GGUF files as transformers folders: read and dequantised by transformers, once, in the cache."""

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from ..settings import UserError, in_one_line
from .cached_folder import Recipe, cached_folder

SUFFIX = ".gguf"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"  # as GGUF names them
FOLDER = "take the model's transformers folder"
# Quantised in different ways, one matrix differs from itself by 0.04 to 0.1 of its norm (4 and 8
# bits); unrelated matrices differ by 1.4.
SAME_MATRIX = 0.25
ROWS_COMPARED = 4096
BLOCK, BLOCKS = 1 << 16, 64  # hashed, evenly spread over a file, to recognise it


def folder_of(file: Path) -> Path:
    """Return the transformers folder of a GGUF file, made in the cache on the first call."""
    reader = _open(file)
    needed = sum(int(tensor.n_elements) for tensor in reader.tensors) * _dtype(reader).itemsize
    key = _key(file)
    name = f"{file.stem}-{key[:8]}"
    recipe = Recipe(
        name, key, needed + 10**8, lambda folder, console: convert(file, folder, console)
    )
    return cached_folder(recipe)


def read_config(file: Path) -> PreTrainedConfig:
    """Return a model's config from the header of its GGUF file; reads few of the weights."""
    reader = _open(file)
    try:
        with _silent():
            config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:  # transformers raises many kinds.
        raise _refused(file, error) from error
    config.tie_word_embeddings = _is_tied(reader)
    return config


@torch.no_grad()
def convert(file: Path, folder: Path, console: Console) -> None:
    """Write config, weights, tokenizer and chat template of a GGUF file into an empty folder."""
    reader, scratch = _open(file), folder.parent / "gguf"
    console.print(f"Dequantising {file.name}", soft_wrap=True, markup=False)
    # In a folder of its own, as transformers also reads an adapter_config.json beside the file.
    scratch.mkdir()
    (scratch / "model.gguf").symlink_to(file.absolute())
    try:
        source: dict[str, Any] = {
            "pretrained_model_name_or_path": str(scratch),
            "gguf_file": "model.gguf",
        }
        with _silent():
            tokenizer = AutoTokenizer.from_pretrained(**source)
            opened: Any = AutoModelForCausalLM.from_pretrained(
                **source,
                quantization_config=GgufConfig(dequantize=True),
                dtype=_dtype(reader),
                ignore_mismatched_sizes=True,  # They are refused below.
                output_loading_info=True,
            )
    except Exception as error:  # transformers and gguf raise many kinds.
        raise _refused(file, error) from error
    model, loading = opened
    _check(file, reader, model, loading)
    if HEAD in (names := [tensor.name for tensor in reader.tensors]) and _is_tied(reader):
        said = f"Tied: {HEAD} is {EMBEDDING}, quantised another way, and is kept for both"
        model.get_input_embeddings().weight = model.get_output_embeddings().weight
        model.config.tie_word_embeddings = True
    elif HEAD in names:
        said = f"Not tied: {HEAD} is a matrix of its own"
    else:
        said = f"Tied: the file has no {HEAD}"
    console.print(said, soft_wrap=True)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokenizer.model_max_length = context or tokenizer.model_max_length
    try:
        with _silent():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:  # safetensors and tokenizers have classes of their own.
        raise OSError(in_one_line(error)) from error
    for path in folder.iterdir():
        path.chmod(0o666 & (folder.stat().st_mode))  # safetensors are saved as 0600


@contextmanager
def _silent() -> Iterator[None]:
    """Hide warnings of transformers, and its progress bars, which would break the caller's."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def _check(file: Path, reader: Any, model: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Raise UserError where the model is not what the file holds, or its weights are not finite."""
    for name, stored, shape in sorted(loading["mismatched_keys"]):
        why = f"stores {name} as {tuple(stored)}, where transformers has {tuple(shape)}"
        raise UserError(f"model: {file} {why}; {FOLDER}")
    missing = sorted(loading["missing_keys"])
    missing += [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if missing:
        raise UserError(f"model: {file} lacks a usable {missing[0]}; take a complete copy")
    kept = {weight.data_ptr(): weight.numel() for weight in model.state_dict().values()}
    left = sum(int(tensor.n_elements) for tensor in reader.tensors) - sum(kept.values())
    if left > 0:
        why = f"has {left} weights that transformers' {type(model).__name__} has no place for"
        raise UserError(f"model: {file} {why}; {FOLDER}")


def _open(file: Path) -> Any:
    """Return a reader of a file that is complete, and that transformers would not misread."""
    import gguf

    if not file.is_file():
        raise UserError(f"model: there is no file {file}")
    try:
        reader = _quick_reader(file)
        fields = {name: field.contents() for name, field in reader.fields.items() if field.data}
    except Exception as error:  # The reader parses what it finds.
        said = f"{type(error).__name__}: {in_one_line(error)[:200]}"
        remedy = "take a complete copy of the file"
        raise UserError(f"model: cannot read {file} ({said}); {remedy}") from error
    names = {tensor.name for tensor in reader.tensors}
    if (parts := fields.get("split.count", 1)) > 1:
        remedy = "join the parts with llama.cpp's llama-gguf-split --merge"
        raise UserError(f"model: {file} is one of {parts} parts; {remedy}")
    if EMBEDDING not in names:
        raise UserError(f"model: {file} has no {EMBEDDING}; take the file of a whole model")
    architecture = fields.get("general.architecture")
    scaled = fields.get(f"{architecture}.rope.scaling.type", "none") != "none"
    scaled = scaled and architecture != "gpt-oss"  # the only one whose scaling is read
    if scaled or any(name.startswith(("rope_freqs.", "rope_factors_")) for name in names):
        why = "scales its rotary frequencies, which transformers does not read from GGUF"
        raise UserError(f"model: {file} {why}; {FOLDER}")
    for kind, tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.items():
        try:
            gguf.dequantize(tensor.data[:1], kind)
        except NotImplementedError as error:
            remedy = "take a file in Q4_K_M, Q8_0, F16 or BF16"
            raise UserError(f"model: {file} is quantised as {kind.name}; {remedy}") from error
    return reader


def _quick_reader(file: Path) -> Any:
    """Open a file with gguf's reader without its lists: those of a vocabulary take seconds."""
    import gguf

    class Reader(gguf.GGUFReader):
        def _get_field_parts(self, start: int, kind: int) -> Any:
            if kind != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(start, kind)
            data: Any = self.data
            of, count = struct.unpack_from("<IQ", data, start)
            end = start + 12
            if of == gguf.GGUFValueType.STRING:
                for _ in range(count):
                    end += 8 + struct.unpack_from("<Q", data, end)[0]
            else:
                end += count * self.gguf_scalar_to_np[of]().itemsize
            return end - start, [], [], [gguf.GGUFValueType.ARRAY]

    return Reader(file)


def _dtype(reader: Any) -> torch.dtype:
    """Return the dtype to store: fp32 and fp16 files are kept as they are; else bf16.

    bf16 rounds a dequantised weight by 2^-9, far less than quantisation did.
    """
    kind = next(t.tensor_type.name for t in reader.tensors if t.name == EMBEDDING)
    return {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)


def _is_tied(reader: Any) -> bool:
    """Return True if head and embedding are one matrix, from rows spread over the vocabulary."""
    import gguf

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if HEAD not in tensors:
        return True
    both = (tensors[name] for name in (EMBEDDING, HEAD))
    embedding, head = (
        torch.from_numpy(
            gguf.dequantize(t.data[:: -(-len(t.data) // ROWS_COMPARED)], t.tensor_type)
        )
        for t in both
    )
    return embedding.shape == head.shape and bool(
        (head - embedding).norm() < SAME_MATRIX * head.norm()
    )


def _key(file: Path) -> str:
    """Hash a file's size and blocks spread over it."""
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for n in range(BLOCKS):
            stream.seek(n * max(0, size - BLOCK) // (BLOCKS - 1))
            found.update(stream.read(BLOCK))
    return found.hexdigest()


def _refused(file: Path, error: Exception) -> UserError:
    said = f"{type(error).__name__}: {in_one_line(error)[:200]}"
    return UserError(f"model: transformers does not read {file} ({said}); {FOLDER}")
