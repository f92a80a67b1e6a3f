import json

import pytest
import torch
from training.evaluations import NAMES, evaluation_file
from training.lives import BASE, MODES, command
from training.tiny import make_model, make_tokenizer, save_tiny, settings
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from em_kernels.training.models.demo_model import fetch_demo
from em_kernels.training.planning import planner

disable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def measurements():
    """Measure each model once: that takes seconds and depends on nothing else."""
    kept, real = {}, planner.ModelMemory

    def measured(config, dtype, attention, lora):
        facts = {**config.to_dict(), "_name_or_path": None}
        adapters = (lora.lora_rank, lora.lora_targets) if lora else None
        key = (type(config), json.dumps(facts, default=repr), dtype, attention, adapters)
        return kept.get(key) or kept.setdefault(key, real(config, dtype, attention, lora))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "ModelMemory", measured)
        yield


@pytest.fixture
def tokenizer():
    """Make a tokenizer that a test may change."""
    return make_tokenizer()


@pytest.fixture
def exact_model():
    """Make a model in fp64, in which rounding cannot flip a token."""
    return make_model(dtype=torch.float64)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def demo():
    """Return the 135M model and its tokenizer; a skip would hide a broken conversion."""
    folder = fetch_demo()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Save llama with tied (True) and untied (False) weights, and falcon."""
    home = tmp_path_factory.mktemp("models")
    found = {tied: save_tiny(home / str(tied), tied=tied) for tied in (True, False)}
    return {**found, "falcon": save_tiny(home / "falcon", "falcon")}


@pytest.fixture(params=NAMES)
def evaluation(request, tmp_path):
    """Return the path of an evaluation file, and the number of its rows."""
    return evaluation_file(request.param, tmp_path)


@pytest.fixture
def start(folder, tmp_path):
    """Return start(name, *points, **settings), which starts a new run in that folder."""

    def start(name, *points, **changes):
        config = settings(folder, tmp_path / name, **{**BASE, **changes})
        if config.offload_dir is not None:
            config = config.model_copy(update={"offload_dir": tmp_path / config.offload_dir})
        path = tmp_path / f"{name}.yaml"
        path.write_text(config.to_yaml())
        return command(["train", "--config", path], tmp_path / name, *points)

    return start


@pytest.fixture
def resume(tmp_path):
    def resume(name, *flags, points=()):
        return command(["train", "--resume", tmp_path / name, *flags], tmp_path / name, *points)

    return resume


@pytest.fixture(scope="session")
def whole_of(folder, tmp_path_factory):
    """Return a function that gives the folder of a mode's run that was never stopped."""
    found = {}

    def whole_of(mode):
        if mode not in found:
            home = tmp_path_factory.mktemp("whole")
            config = settings(folder, home / "run", **{**BASE, **MODES[mode]})
            (home / "run.yaml").write_text(config.to_yaml())
            assert command(["train", "--config", home / "run.yaml"], home / "log").code == 0
            found[mode] = home / "run"
        return found[mode]

    return whole_of
