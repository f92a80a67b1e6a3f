"""Checkpoints: their contents, and that kills, full disks and damage lose no run."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from training.tiny import make_model, make_tokenizer, rounded
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from em_kernels.training.config import Sampling, TrainConfig
from em_kernels.training.run_folder import update_of
from em_kernels.training.runs.checkpoint import (
    FACTS,
    STATE,
    defining_settings,
    newest_state,
    read_state,
    save_checkpoint,
    write_model,
)
from em_kernels.training.settings import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
SETTINGS = defining_settings(TrainConfig(model="demo"))


def state_of(update, numel=1001):
    """Return a state with odd sizes and mixed dtypes, as an optimizer's has."""
    gen = torch.Generator().manual_seed(update)
    return {
        "moment": torch.randn(numel, generator=gen).bfloat16(),
        "master": torch.randn(7, 3, generator=gen),
        "steps": torch.tensor(update),
        "none": torch.empty(0, 4),
        "transposed": torch.randn(5, 3, generator=gen).T,
    }


def facts_of(update, settings=SETTINGS):
    return {"update": update, "settings": settings}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint folder of a model."""
    folder = tmp_path_factory.mktemp("whole") / "step-00000"
    save_checkpoint(write_model(make_model(), make_tokenizer()), folder)
    AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids
    return folder


@pytest.fixture
def save(whole, tmp_path):
    """save(update, ...) writes a checkpoint of the run tmp_path; its model is a copy of `whole`."""

    def save(update, state=True, settings=SETTINGS, **options):
        folder = tmp_path / "checkpoints" / f"step-{update:05d}"
        state, facts = (state_of(update), facts_of(update, settings)) if state else (None, None)
        write = partial(shutil.copytree, whole, dirs_exist_ok=True)
        return save_checkpoint(write, folder, state, facts, **options)

    return save


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_state(found, update):
    assert found is not None and update_of(found) == update
    read, expected = read_state(found), state_of(update)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def in_child(work):
    """Run work in a forked process and return its exit code; -n: it was killed by signal n."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    return child.exitcode


def content(folder):
    """Return the bytes of the model's files."""
    paths = [path for path in folder.iterdir() if path.name not in (STATE, FACTS)]
    return {path.name: path.read_bytes() for path in paths}


# What a folder holds


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bf16_folder_of_any_weights(dtype, tied, tmp_path):
    model = make_model(dtype=dtype, tied=tied)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    folder = save_checkpoint(write_model(model, make_tokenizer()), tmp_path / "step-00001")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != tied
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.dtype is torch.bfloat16
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, rounded(before[name]))
    assert AutoTokenizer.from_pretrained(folder).chat_template == make_tokenizer().chat_template
    for name, weight in model.state_dict().items():
        assert weight.dtype is dtype and torch.equal(weight, before[name])
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.iterdir())


def test_generation_config_is_kept(tmp_path):
    """Llama 2 has sampling flags without do_sample, which save_pretrained refuses."""
    model = make_model()
    published = GenerationConfig(eos_token_id=[0, 9], temperature=0.6, top_p=0.9)
    model.generation_config = published
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "strict")
    folder = save_checkpoint(write_model(model, make_tokenizer()), tmp_path / "step-00001")
    assert model.generation_config is published
    kept = GenerationConfig.from_pretrained(folder)
    assert (kept.eos_token_id, kept.temperature, kept.top_p) == ([0, 9], 0.6, 0.9)


def test_state_is_what_safetensors_reads(save, tmp_path):
    folder = save(3)
    assert_state(newest_state(tmp_path, SETTINGS)[0], 3)
    for name, tensor in load_file(folder / STATE).items():
        assert torch.equal(tensor, state_of(3)[name])
        assert tensor.data_ptr() % tensor.element_size() == 0
    facts = json.loads((folder / FACTS).read_text())
    assert facts["update"] == 3 and facts["settings"] == SETTINGS and len(facts["sha256"]) == 64


def test_a_checkpoint_replaced(tmp_path):
    model = make_model()
    write = write_model(model, make_tokenizer())
    folder = save_checkpoint(write, tmp_path / "step-00001")
    (folder / "stray").touch()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    save_checkpoint(write, folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again.lm_head.weight, rounded(model.lm_head.weight))
    assert list(tmp_path.iterdir()) == [folder] and not (folder / "stray").exists()


def test_keep_and_one_state(save, tmp_path):
    for update in (1, 2, 9, 10, 100_000):
        save(update, keep=3)
    assert names(tmp_path) == ["step-00009", "step-00010", "step-100000"]
    assert [path.parent.name for path in tmp_path.rglob(STATE)] == ["step-100000"]
    assert [path.parent.name for path in tmp_path.rglob(FACTS)] == ["step-100000"]
    (tmp_path / "checkpoints" / "step-9-mine").mkdir()
    save(11, keep=1)  # older than one there, which a resume refused
    assert names(tmp_path) == ["step-00011", "step-9-mine"]


def test_a_checkpoint_without_a_state_leaves_the_last_one(save, tmp_path):
    save(1)
    save(2, state=False)
    assert_state(newest_state(tmp_path, SETTINGS)[0], 1)


# Kills


def scenarios(save):
    """Return functions that prepare the disk, and that save."""

    def start():
        save(1, state=False)
        save(2)

    return {
        "next": (start, lambda: save(3, keep=2)),  # It takes the state of 2 and removes 1.
        "first": (lambda: None, lambda: save(3)),
        "replaced": (start, lambda: save(2)),
    }


@pytest.mark.parametrize("scenario", ["next", "first", "replaced"])
def test_a_kill_before_any_operation(scenario, save, whole, tmp_path):
    """SIGKILL before the n-th file operation, for every n."""
    start, work = scenarios(save)[scenario]
    operations = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod")
    start()
    shutil.copytree(tmp_path, tmp_path / "before")
    seen = set()

    def killed_at(n):
        left = [n]

        def audit(event, arguments):
            if event in operations:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1

        sys.addaudithook(audit)
        work()

    for n in range(1000):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        if (tmp_path / "before" / "checkpoints").exists():
            shutil.copytree(tmp_path / "before" / "checkpoints", tmp_path / "checkpoints")
        code = in_child(lambda n=n: killed_at(n))
        seen.add(tuple(names(tmp_path)) if (tmp_path / "checkpoints").exists() else ())
        found, refused = newest_state(tmp_path, SETTINGS)
        assert refused == []
        if found is None:
            assert scenario == "first" and code
        else:
            assert_state(found, update_of(found))
        for folder in (tmp_path / "checkpoints").glob("*"):
            assert folder.name.startswith("step-") and content(folder) == content(whole)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if n % 7 == 0:
            work()
            found, _ = newest_state(tmp_path, SETTINGS)
            assert update_of(found) == (2 if scenario == "replaced" else 3)
    assert n > 20
    stages = {name.rpartition(".")[2] for listing in seen for name in listing if name[0] == "."}
    assert stages == ({"partial", "old"} if scenario == "replaced" else {"partial"})


def limited(size, action, work):
    """Run work with files limited to `size` bytes; a write beyond fails, or kills the process."""
    signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    work()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999, 1, 1.5, 1.999])
def test_a_kill_inside_a_file(share, save, whole, tmp_path):
    """The kernel kills in the middle of a write of the weights, or of the state."""
    save(1)
    model, size = make_model(), (whole / "model.safetensors").stat().st_size
    state = {"moments": torch.zeros(size // 2)}
    folder = tmp_path / "checkpoints" / "step-00002"

    def work():
        save_checkpoint(write_model(model, make_tokenizer()), folder, state, facts_of(2))

    code = in_child(lambda: limited(int(share * size), signal.SIG_DFL, work))
    assert code == -signal.SIGXFSZ
    assert ".step-00002.partial" in names(tmp_path)
    assert_state(newest_state(tmp_path, SETTINGS)[0], 1)
    assert names(tmp_path) == ["step-00001"]
    work()
    assert newest_state(tmp_path, SETTINGS) == (folder, [])
    AutoModelForCausalLM.from_pretrained(folder)


# Full disks


@pytest.mark.parametrize("share", [0, 0.5, 1.5])
def test_a_disk_that_fills_up(share, save, whole, tmp_path):
    """A write of any file, of the weights or of the state fails in the middle."""
    save(1)
    model, size = make_model(), (whole / "model.safetensors").stat().st_size
    state = {"moments": torch.zeros(size // 2)}
    folder = tmp_path / "checkpoints" / "step-00002"

    def work():
        message = f"output: cannot write the checkpoint {folder}: .*File too large"
        with pytest.raises(UserError, match=message) as error:
            save_checkpoint(write_model(model, make_tokenizer()), folder, state, facts_of(2))
        assert "\n" not in str(error.value)

    assert in_child(lambda: limited(int(share * size), signal.SIG_IGN, work)) == 0
    assert names(tmp_path) == ["step-00001"]
    assert_state(newest_state(tmp_path, SETTINGS)[0], 1)


def test_a_failure_leaves_the_checkpoint_to_be_replaced(save, tmp_path):
    save(1)
    with pytest.raises(UserError, match="step-00001: division by zero"):
        save_checkpoint(lambda partial: 1 / 0, tmp_path / "checkpoints" / "step-00001", {}, {})
    assert_state(newest_state(tmp_path, SETTINGS)[0], 1)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output: cannot write the checkpoint .*Not a directory"):
        save_checkpoint(lambda partial: None, tmp_path / "file" / "step-00001")


# Damage


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def edit(folder, **changes):
    facts = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps({**facts, **changes}))


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / STATE, 2000), f"{STATE} is truncated or corrupted"),
    "empty": (lambda f: os.truncate(f / STATE, 0), f"{STATE} is truncated or corrupted"),
    "longer": (lambda f: os.truncate(f / STATE, 9999), f"{STATE} is truncated or corrupted"),
    "first bit": (lambda f: flip(f / STATE, 0), f"{STATE} is truncated or corrupted"),
    "last bit": (lambda f: flip(f / STATE, -1), f"{STATE} is truncated or corrupted"),
    "no tensors": (lambda f: (f / STATE).unlink(), f"cannot read .*{STATE}: No such file"),
    "no facts": (lambda f: (f / FACTS).unlink(), f"cannot read .*{FACTS}: No such file"),
    "torn facts": (lambda f: os.truncate(f / FACTS, 100), f"{FACTS} is corrupted"),
    "empty facts": (lambda f: os.truncate(f / FACTS, 0), f"{FACTS} is corrupted"),
    "listed facts": (lambda f: (f / FACTS).write_text("[]"), f"{FACTS} is corrupted"),
    "null settings": (lambda f: edit(f, settings=None), f"{FACTS} is corrupted"),
    "no binary": (lambda f: (f / FACTS).write_bytes(b"\xff\xfe"), f"{FACTS} is corrupted"),
    "other update": (lambda f: edit(f, update=4), f"{FACTS} is of another update"),
    "folder": (lambda f: ((f / STATE).unlink(), (f / STATE).mkdir()), "cannot read .*directory"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_state_before_it_used(kind, save, tmp_path):
    save(1)
    shutil.copytree(tmp_path / "checkpoints" / "step-00001", tmp_path / "kept")
    newest = save(3)
    shutil.copytree(tmp_path / "kept", tmp_path / "checkpoints" / "step-00001", dirs_exist_ok=True)
    save(2, state=False)
    damage, message = DAMAGE[kind]
    damage(newest)
    found, (refused,) = newest_state(tmp_path, SETTINGS)
    assert_state(found, 1)
    assert refused.startswith(f"{newest} cannot be resumed from: ") and "\n" not in refused
    with pytest.raises(UserError, match=message):
        raise UserError(refused)
    shutil.rmtree(found)
    assert newest_state(tmp_path, SETTINGS) == (None, [refused])


def test_settings_that_differ_are_named(save, tmp_path):
    config = TrainConfig(model="demo", lr=1e-5)
    folder = save(1, settings=defining_settings(config))
    assert newest_state(tmp_path, defining_settings(config)) == (folder, [])
    other = config.model_copy(update={"sampling": Sampling(top_k=7)})
    found, (refused,) = newest_state(tmp_path, defining_settings(other))
    assert found is None and refused.endswith("it was made with sampling.top_k 50, not 7")
    _, (refused,) = newest_state(tmp_path, SETTINGS)
    assert refused.endswith("it was made with lr 1e-05, not null")
    found, (refused,) = newest_state(tmp_path, {**defining_settings(config), "new": 1})
    assert found is None and refused.endswith("it was made with new null, not 1")


def test_settings_that_do_not_matter(tmp_path):
    config = TrainConfig(model="demo")
    free = {"output": tmp_path, "steps": 99, "save_at": (7,), "keep": 2, "host_memory": 3.0}
    free |= {"save_optimizer": True, "offload_dir": tmp_path, "answer": "3", "stop_below": 0.5}
    assert defining_settings(config.model_copy(update=free)) == defining_settings(config)
    for name in ("micro_batch", "dtype", "mode", "chunk_bytes", "seed", "sampling.temperature"):
        assert name in SETTINGS
    assert json.loads(json.dumps(SETTINGS)) == SETTINGS


def test_a_run_without_checkpoints(tmp_path):
    assert newest_state(tmp_path, SETTINGS) == (None, [])
