"""Imports follow the layers of docs/design.md, without cycles."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import em_kernels

ROOT = Path(em_kernels.__file__).parent
ALL = list(ROOT.rglob("*.py"))
CORE = [path for path in ALL if not {"training", "commands"} & {*path.relative_to(ROOT).parts}]


def imported(path):
    """Yield the absolute names that a file imports, functions included."""
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


# From top to bottom: a module imports from its own layer and from those below.
LAYERS = """
cli
commands
training.report
training.evaluation
training.trainer
training.run
training.stopping
training.planning
training.engines training.task
training.runs
training.distributed training.models
training.rollouts training.data
training.presets
training.config
training.settings training.interrupts training.console training.run_folder training.device_memory
hf hf_head hf_trainer trl decoding
functional losses divergence drop_ins tolerance_report from_logits streamed_loss
ops.torch_library_divergence
ops.torch_library
ops.chunked ops.vocab_slabs ops.divergence ops.gathered ops.from_logits ops.saved_gradients
ops.gradients
ops.weight_gradient
ops.sparse ops.chosen
ops.inputs
ops.choice_costs
ops.gemm ops.vocab_parallel ops.support ops.checks ops.flops ops.memory
kernels ops.free_memory
reference_divergence
reference
"""


def layer_of(module):
    """Return the number of a module's layer, counted from the top; a folder is one layer."""
    parts = module.removeprefix("em_kernels.").split(".")
    names = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return next(n for n, line in enumerate(LAYERS.split("\n")) if names & {*line.split()})


def graph():
    """Map each module to the project's modules that it imports, at any depth of its code."""
    paths = {".".join(["em_kernels", *p.relative_to(ROOT).with_suffix("").parts]): p for p in ALL}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    found = {}
    for module, path in modules.items():
        names = {name if name in modules else name.rpartition(".")[0] for name in imported(path)}
        inside = {name for name in names if name in modules and not module.startswith(name + ".")}
        found[module] = inside - {module}
    return found


def test_imports_go_down():
    packages = {
        "em_kernels",
        "em_kernels.training",
        "em_kernels.ops",
    }  # their __init__.py imports nothing, or only the public functions
    wrong = [
        (module, name)
        for module, names in graph().items()
        for name in names
        if module not in packages and name not in packages and layer_of(module) > layer_of(name)
    ]
    assert not wrong


def test_there_is_no_circle():
    TopologicalSorter(graph()).prepare()


def test_only_ops_touches_torch_library():
    touching = {path.name for path in CORE if "torch.library" in path.read_text()}
    assert touching == {"torch_library.py", "torch_library_divergence.py"}


def test_import_is_light():
    code = "import sys, em_kernels; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout.split()
    assert "em_kernels.ops.torch_library" in loaded
    heavy = {"transformers", "triton", "tokenizers", "sentencepiece", "tiktoken", "accelerate"}
    assert not heavy & set(loaded)
