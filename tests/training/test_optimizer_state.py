"""The optimizer's state: saved, loaded, its bytes, its files, and full disks."""

import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from spawned import HANG_S, outlived
from torch import nn
from training.lives import CHILDREN
from training.updates import BF16, FP32, FP64, Net, assert_same, backwards, make, run, weights

from em_kernels.training.engines.optimizer import state_bytes
from em_kernels.training.settings import UserError


@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize("dtype, moments", [(FP32, FP32), (BF16, BF16)])
def test_state_continues(dtype, moments, files, tmp_path):
    model = Net(dtype)
    folder = tmp_path / "state" if files else None
    ours = make(model, moments=moments, folder=folder)
    run(model, ours, range(3))
    state = ours.state()
    assert state["master.words"].data_ptr() == ours.state()["master.words"].data_ptr()
    assert (state["master.words"].data_ptr() == model.words.data_ptr()) == (
        dtype == FP32 and not files
    )
    save_file(state, tmp_path / "state.safetensors")
    other = Net(dtype)
    with torch.no_grad():
        other.words.fill_(7)
    again = make(other, moments=moments)
    backwards(other, 5)  # load() forgets this gradient
    again.load(load_file(tmp_path / "state.safetensors"))
    assert_same(weights(model), weights(other))
    assert run(model, ours, [3, 4]) == run(other, again, [3, 4])
    assert_same(weights(model), weights(other))
    assert_same(ours.state(), again.state())


def test_load_of_another_state_changes_nothing():
    model, trained = Net(), Net()
    ours, source = make(model), make(trained)
    run(trained, source, range(2))
    good, before = source.state(), {k: v.clone() for k, v in ours.state().items()}
    lacks = {k: v for k, v in good.items() if k != "exp_avg.scale"}
    extra = good | {"master.other": torch.zeros(2)}
    shaped = good | {"exp_avg_sq.sometimes": torch.zeros(1, 9)}
    for state, name in [
        (lacks, "exp_avg.scale"),
        (extra, "master.other"),
        (shaped, "exp_avg_sq.sometimes"),
    ]:
        with pytest.raises(ValueError, match=name):
            ours.load(state)
        assert_same(ours.state(), before)
    ours.load(good)
    assert_same(weights(model), weights(trained))


@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16])
@pytest.mark.parametrize("moments, gradients", [(FP32, BF16), (BF16, FP32)])
def test_state_bytes(dtype, moments, gradients, files, tmp_path):
    model = Net(dtype)
    folder = tmp_path if files else None
    ours = make(model, moments=moments, gradients=gradients, folder=folder)
    slots = list(ours._slots.values())
    shared = dtype != BF16 and not files
    assert all((s.master.data_ptr() == s.parameter.data_ptr()) == shared for s in slots)
    real = {
        "master": 0 if shared else sum(s.master.nbytes for s in slots),
        "moments": sum(s.exp_avg.nbytes + s.exp_avg_sq.nbytes for s in slots),
        "gradients": sum(s.gradient.nbytes for s in slots),
    }
    assert real == state_bytes(
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        weight_bytes=dtype.itemsize,
        moments=moments,
        gradients=gradients,
        shared=shared,
    )


def taken(into):
    """Put the bytes that an optimizer makes resident, in a process that has freed nothing yet."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    parameter = nn.Parameter(torch.zeros(2**23, dtype=BF16))
    before = resident()
    ours = make(nn.ParameterDict({"one": parameter}))
    into.put((resident() - before, ours.norm()))


def test_memory_is_taken_at_the_start():
    answers = CHILDREN.SimpleQueue()
    process = CHILDREN.Process(target=taken, args=(answers,))
    process.start()
    with outlived(process):
        process.join(HANG_S)
        assert process.exitcode == 0
    size, norm = answers.get()
    assert size > 0.95 * 4 * 4 * 2**23  # masters, moments, gradients
    assert norm == 0


def test_files_leave_nothing(tmp_path):
    model = Net()
    ours = make(model, folder=tmp_path / "deep" / "folder")
    assert not list((tmp_path / "deep" / "folder").iterdir())  # the files are unlinked, and mapped
    mapped = Path("/proc/self/maps").read_text()
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        assert f"{tmp_path}/deep/folder/{kind}." in mapped
    run(model, ours, range(2))
    assert not list((tmp_path / "deep" / "folder").iterdir())


def test_full_disk(tmp_path):
    huge = nn.Parameter(torch.zeros(1).expand(2**44))  # takes no memory
    with pytest.raises(UserError, match=r"offload_dir: .* needs 196608.0 GiB, [\d.]+ are free; "):
        make(nn.ParameterDict({"huge": huge}), folder=tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # the second file does not fit
    try:
        parameters = [nn.Parameter(torch.ones(n)) for n in (400, 9)]
        with pytest.raises(UserError, match="offload_dir: .*: File too large; choose") as raised:
            make(nn.ParameterList(parameters), folder=tmp_path, moments=FP64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    assert "\n" not in str(raised.value)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="offload_dir: .*: (File exists|Not a directory); choose"):
        make(Net(), folder=tmp_path / "file")
