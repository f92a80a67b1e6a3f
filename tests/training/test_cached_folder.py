"""Folders in the cache: whole or not made at all, by one process at a time."""

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from spawned import HANG_S, wait_for

from em_kernels.training.models.cached_folder import MANIFEST, Recipe, cached_folder
from em_kernels.training.settings import UserError

NAME = "model-[v1] of two files"  # as a GGUF file may be called


def recipe(write=lambda folder: None, key="k1", needed_bytes=0):
    """Return a recipe that first calls write(folder), and then writes two files."""

    def both(folder, console):
        write(folder)
        (folder / "weights").write_bytes(b"12345678")
        (folder / "config").write_text("{}")

    return Recipe(NAME, key, needed_bytes, both)


def never(folder):
    raise AssertionError("made again")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_is_made_once(tmp_path, capfd):
    folder = cached_folder(recipe(), tmp_path / "new" / "cache")
    assert folder == tmp_path / "new" / "cache" / NAME
    assert names(folder) == ["config", MANIFEST, "weights"]
    assert names(folder.parent) == [NAME, f"{NAME}.lock"]
    assert capfd.readouterr() == ("", f"Making {folder}, one process at a time\n")
    assert cached_folder(recipe(never), tmp_path / "new" / "cache") == folder
    assert capfd.readouterr() == ("", "")


def test_where_it_is(tmp_path, monkeypatch):
    """Without a folder given, it is in $XDG_CACHE_HOME, or in .cache in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cached_folder(recipe()) == tmp_path / "home" / ".cache" / "em_kernels" / NAME
    assert cached_folder(recipe(), Path("~/mine")) == tmp_path / "home" / "mine" / NAME
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cached_folder(recipe()) == tmp_path / "xdg" / "em_kernels" / NAME
    monkeypatch.chdir(tmp_path)
    assert cached_folder(recipe(), Path("here")) == tmp_path / "here" / NAME


def test_quiet_prints_nothing(tmp_path, capfd):
    cached_folder(recipe(), tmp_path, quiet=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["a file cut", "a file missing", "no manifest", "another key"])
def test_what_is_in_the_way_is_neither_taken_nor_deleted(tmp_path, damage):
    folder = cached_folder(recipe(), tmp_path)
    if damage == "a file cut":
        (folder / "weights").write_bytes(b"1234")
    elif damage != "another key":
        (folder / ("config" if damage == "a file missing" else MANIFEST)).unlink()
    before = names(folder)
    key = "k2" if damage == "another key" else "k1"
    with pytest.raises(UserError, match="damaged or not .*move or remove it") as caught:
        cached_folder(recipe(never, key), tmp_path, quiet=True)
    assert str(folder) in str(caught.value) and names(folder) == before
    folder.rename(tmp_path / "moved")
    assert cached_folder(recipe(key=key), tmp_path, quiet=True) == folder


def failing(error):
    def write(folder):
        (folder / "weights").write_bytes(b"half")
        (folder.parent / "download").write_bytes(b"half")
        raise error

    return write


@pytest.mark.parametrize(
    "error, said",
    [
        (KeyboardInterrupt(), None),
        (UserError("not the published file"), "^not the published file$"),
        (OSError(28, "No space left on device"), r"No space left.*\): make room in .*XDG_CACHE"),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), "run `pip install gguf`"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_failure_leaves_nothing(tmp_path, error, said):
    with pytest.raises(UserError if said else type(error), match=said) as caught:
        cached_folder(recipe(failing(error)), tmp_path, quiet=True)
    assert "\n" not in str(caught.value) and names(tmp_path) == [f"{NAME}.lock"]
    cached_folder(recipe(), tmp_path, quiet=True)


def test_too_little_disk_is_known_before_it_is_made(tmp_path):
    needed = shutil.disk_usage(tmp_path).total + 10**9
    where = re.escape(str(tmp_path))
    why = rf"GB of disk free, {needed / 1e9:.1f} needed.*make room in {where}, or set XDG_CACHE"
    with pytest.raises(UserError, match=why):
        cached_folder(recipe(never, needed_bytes=needed), tmp_path, quiet=True)
    assert names(tmp_path) == [f"{NAME}.lock"]


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to another folder"):
        cached_folder(recipe(never), tmp_path / "file", quiet=True)


KILLED = """
import os, sys
from pathlib import Path
from em_kernels.training.models.cached_folder import Recipe, cached_folder

def write(folder, console):
    (folder / "weights").write_bytes(b"half")
    os.kill(os.getpid(), 9)

cached_folder(Recipe(sys.argv[1], "k1", 0, write), Path(sys.argv[2]))
"""


def test_what_a_killed_process_leaves_does_not_matter(tmp_path):
    """Neither its lock nor its half of a folder, which the next process removes."""
    killed = subprocess.run([sys.executable, "-c", KILLED, NAME, str(tmp_path)], check=False)
    assert killed.returncode == -9
    (partial,) = tmp_path.glob("*.partial-*")
    assert (partial / NAME / "weights").read_bytes() == b"half"
    (tmp_path / "other.partial-1").mkdir()
    folder = cached_folder(recipe(), tmp_path, quiet=True)
    assert names(folder) == ["config", MANIFEST, "weights"]
    assert names(tmp_path) == [NAME, f"{NAME}.lock", "other.partial-1"]


def test_callers_at_once_make_it_once(tmp_path):
    calls, found, threads, together = [], [], [], threading.Barrier(3)

    def write(folder):
        calls.append(folder)
        wait_for(lambda: sum(thread.is_alive() for thread in threads) == 3)

    def call():
        together.wait(HANG_S)
        found.append(cached_folder(recipe(write), tmp_path, quiet=True))

    threads += [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / NAME] * 3 and len(calls) == 1
