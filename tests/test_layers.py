"""Who may import what (CONTRIBUTING.md, house rules)."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import em_kernels

ROOT = Path(em_kernels.__file__).parent
CORE = [path for path in ROOT.rglob("*.py") if "training" not in path.relative_to(ROOT).parts]


def imported(path):
    """Absolute names of the modules that a file imports, anywhere in it."""
    package = ["em_kernels", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_reference_stands_alone():
    assert not [name for name in imported(ROOT / "reference.py") if name.startswith("em_kernels")]


def test_imports_go_one_way():
    order = ["functional", "ops", "chunked", "slabs", "gradients", "sparse", "problem", "rows"]
    order.append("reference")
    for path in CORE:
        layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if layer in order:
            above = tuple(f"em_kernels.{name}" for name in order[: order.index(layer)])
            assert not [name for name in imported(path) if name.startswith(above)], path


def test_only_ops_touches_torch_library():
    touching = {path.name for path in CORE if "torch.library" in path.read_text()}
    assert touching == {"ops.py"}


def test_import_is_light():
    code = "import sys, em_kernels; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout.split()
    assert "em_kernels.ops" in loaded
    heavy = {"transformers", "triton", "tokenizers", "sentencepiece", "tiktoken", "accelerate"}
    assert not heavy & set(loaded)
