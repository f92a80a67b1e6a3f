"""The scripts of examples/: on a tiny model in this process, and as a user starts them."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from training.tiny import save_tiny

FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
NUMBERS = {  # the entropies that each prints
    "one_shot_em": r"(?m)^entropy (\S+) -> (\S+) nats$",
    "plain_loop": r"(?m)^update \d+: entropy (\S+) nats",
    "transformers_trainer": r"(?m)^mean entropy (\S+) nats",
    "trl_grpo": r"'entropy': '(\S+)'",
}


def entropies(name, printed):
    found = re.findall(NUMBERS[name], printed)
    return [float(x) for group in found for x in ([group] if isinstance(group, str) else group)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    # The prompts have about 100 tokens, as many as the tiny model's usual context.
    return save_tiny(tmp_path_factory.mktemp("examples") / "tiny", max_position_embeddings=256)


def test_every_script_is_covered():
    assert NUMBERS.keys() == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs(name, tiny, tmp_path, monkeypatch, capfd):
    if name == "trl_grpo":
        pytest.importorskip("trl", reason="trl needs Python 3.11")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--model", str(tiny)])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    found = entropies(name, capfd.readouterr().out)
    assert found and all(0 < x < 10 for x in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs_on_the_demo_model(name, tmp_path):
    if name == "trl_grpo":
        pytest.importorskip("trl", reason="trl needs Python 3.11")
    run = [sys.executable, str(FOLDER / f"{name}.py")]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = entropies(name, done.stdout)
    assert found and all(0 < x < 10 for x in found)
    if name in ("one_shot_em", "plain_loop"):
        assert found[-1] < found[0]
