"""Model folders in the cache: made on first use, whole or not at all, by one process at a time."""

import glob
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from filelock import FileLock
from rich.console import Console

from ..console import Terminal
from ..settings import UserError

MANIFEST = "source.json"


class Recipe(NamedTuple):
    """How to make a model folder, and how to recognise it."""

    name: str
    """Name of the folder in the cache."""
    key: str
    """Identifies the source; a folder with another key is not this model's."""
    needed_bytes: int
    """Disk space that making it takes."""
    write: Callable[[Path, Console], None]
    """Write the files into a new folder; its parent may hold other files meanwhile."""


def cached_folder(recipe: Recipe, cache: Path | None = None, quiet: bool = False) -> Path:
    """Return a model's folder, made on the first call; of several processes one makes it.

    Args:
        recipe: what to make.
        cache: parent folder; default: `$XDG_CACHE_HOME/em_kernels` or `~/.cache/em_kernels`.
        quiet: print no progress to stderr.

    Raises:
        UserError: disk space or write access is missing, another folder is in the way, or `write`
            fails for a reason that the user can mend.
    """
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "em_kernels")
    folder = cache.expanduser().absolute() / recipe.name
    if not is_whole(folder, recipe.key):
        try:
            _make(recipe, folder, Terminal(stderr=True, quiet=quiet))
        except ImportError as error:
            raise UserError(f"{error}: run `pip install {error.name}`") from error
        except OSError as error:
            remedy = f"make room in {folder.parent}, or set XDG_CACHE_HOME to another folder"
            raise UserError(f"cannot make {recipe.name} ({error}): {remedy}") from error
    return folder


def is_whole(folder: Path, key: str) -> bool:
    """Return True if the folder was made from this source and no file has been cut since."""
    try:
        made = json.loads((folder / MANIFEST).read_text())
        sizes = {name: (folder / name).stat().st_size for name in made["bytes"]}
        return made["key"] == key and sizes == made["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _make(recipe: Recipe, folder: Path, console: Console) -> None:
    name, cache = recipe.name, folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    console.print(f"Making {folder}, one process at a time", soft_wrap=True, markup=False)
    with FileLock(f"{folder}.lock"):
        if is_whole(folder, recipe.key):
            return
        if folder.exists():
            raise UserError(f"{folder} is damaged or not {name}: move or remove it")
        for leftover in cache.glob(f"{glob.escape(name)}.partial-*"):  # from killed runs
            shutil.rmtree(leftover)
        free, needed = shutil.disk_usage(cache).free, recipe.needed_bytes
        if free < needed:
            raise OSError(f"{free / 1e9:.1f} GB of disk free, {needed / 1e9:.1f} needed")
        with TemporaryDirectory(prefix=f"{name}.partial-", dir=cache) as work:
            (made := Path(work, name)).mkdir()
            recipe.write(made, console)
            manifest = {"key": recipe.key, "bytes": {}}
            manifest["bytes"] = {path.name: path.stat().st_size for path in made.iterdir()}
            (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            made.rename(folder)
