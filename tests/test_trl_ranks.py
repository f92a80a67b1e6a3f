"""Our trainers for TRL on two gloo processes that hold parts of the model, against one process."""

import gc
import os
from importlib.util import find_spec

import pytest

pytest.importorskip("trl", reason="trl needs Python 3.11")
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from other_sums import assert_as_near, other_sums
from peft import LoraConfig
from spawned import HANG_S, spawn
from test_trl import make_trainer, varied
from test_trl_distillation import WIDER
from test_trl_distillation import make_trainer as make_distillation
from torch.distributed.tensor import DTensor
from training.tiny import make_model
from transformers import AutoModelForCausalLM

from em_kernels.trl import FusedDistillationTrainer, FusedGRPOTrainer

pytestmark = pytest.mark.slow
LORA = LoraConfig(target_modules=["q_proj", "lm_head"], r=3, init_lora_weights=False)
CASES = {  # the model and the trainer's settings
    "tied": ({}, {"reward": ["rent", varied], "num_iterations": 2}),
    "untied": ({"tied": False}, {"reward": ["intuitor", varied], "entropy_coef": 0.1}),
    "recomputed": ({}, {"gradient_checkpointing": True}),
    "adapter": ({}, {"peft_config": LORA, "beta": 0.1, "num_iterations": 2}),
    "reference": ({}, {"beta": 0.1, "entropy_coef": -0.1, "num_iterations": 2}),
    "distilled": ({"tied": False}, {"beta": 0.5, "learning_rate": 0.2}),
    "distilled adapter": ({}, {"beta": 1.0, "learning_rate": 0.2, "peft_config": LORA}),
    "experts": ({"kind": "mixtral", "num_local_experts": 2}, {"router_aux_loss_coef": 0.1}),
}


def completions(seeds):
    """Return completions that depend on the prompts alone, equally long on each rank."""
    return [[3 + (7 * seed + 11 * t * t) % 250 for t in range(6)] for seed in seeds]


def rollout(prompts, trainer):
    found = completions(sum(map(ord, text)) + 5 * (i % 2) for i, text in enumerate(prompts))
    ids = trainer.processing_class(text=prompts)["input_ids"]
    return {"prompt_ids": ids, "completion_ids": found, "logprobs": None}


class Distillation(FusedDistillationTrainer):
    def _generate_single_turn(self, prompt_ids, *others):
        return completions(map(sum, prompt_ids))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def run(case, folder, rollout_func=rollout, **changes):
    """Train; return the trainer, the logged numbers and the weights."""
    shape, settings = CASES[case]
    torch.manual_seed(0)
    model = load(f"{folder}/{case}")
    settings = {**settings, **changes}
    if case.startswith("distilled"):
        settings = {"per_device_train_batch_size": 4, **settings, "gradient_accumulation_steps": 1}
        teacher = load(f"{folder}/teacher")
        trainer = make_distillation(Distillation, model, teacher, folder, **settings)
    else:
        trainer = make_trainer(FusedGRPOTrainer, model, folder, **settings)
        trainer.rollout_func = rollout_func
    trainer.train()
    names = ("loss", "grad_norm", "entropy", "reward")
    logs = [[x.get(name, 0.0) for name in names] for x in trainer.state.log_history[:-1]]
    weights = {name: whole(x).detach() for name, x in trainer.model.named_parameters()}
    return trainer, torch.tensor(logs), weights


def whole(x):
    """Gather a parameter that FSDP2 or ZeRO-3 has split."""
    if hasattr(x, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([x]):
            return x.detach().clone()
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_on_cpus():
    """Let accelerate take its plugin for FSDP on CPUs too, where it would use DDP."""
    init = AcceleratorState.__init__

    def with_plugin(self, *arguments, fsdp_plugin=None, **settings):
        init(self, *arguments, fsdp_plugin=fsdp_plugin, **settings)
        self.fsdp_plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if self.fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = with_plugin


ENGINES = {
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2}},
    "zero3": {
        "deepspeed": {
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_clipping"), "auto"),
        }
    },
}


def worker(rank, folder, engine):
    shard_on_cpus()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""}
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{folder}/extensions")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found, settings = {}, {**ENGINES[engine], "per_device_train_batch_size": 2}
    trainer, logs, _ = run("untied", folder, None, steps=1, **settings)  # it samples for itself
    assert logs[:, 1] > 0 and len(trainer.seen) == 2
    for case in CASES:
        if engine == "zero3" and "adapter" in case:
            with pytest.raises(TypeError, match="^model: its head carries an adapter, and DeepSp"):
                run(case, folder, **settings)
            continue
        trainer, *found[case] = run(case, folder, **settings)
        kinds = {"FSDPModule", "DeepSpeedEngine"}
        assert kinds & {kind.__name__ for kind in type(trainer.model_wrapped).__mro__}
    torch.save(found, f"{folder}/{rank}.pt")
    del trainer
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=ENGINES)
def ranks(request, tmp_path_factory):
    if request.param == "zero3" and find_spec("deepspeed") is None:
        pytest.skip("no deepspeed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed")
    folder = tmp_path_factory.mktemp(request.param)
    for case, (shape, _) in CASES.items():
        make_model(**shape).save_pretrained(folder / case)
    make_model(tied=False, **WIDER).save_pretrained(folder / "teacher")
    spawn(worker, str(folder), request.param, nprocs=2, timeout_s=2 * HANG_S)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_processes_with_parts_of_the_model_equal_one(ranks, case):
    folder, results = ranks
    if case not in results[0]:
        return  # refused, as the processes have seen
    _, logs, weights = run(case, folder)
    with other_sums(1):
        _, near_logs, near = run(case, folder)
    _, _, start = run(case, folder, learning_rate=0.0)
    moved = [name for name, x in weights.items() if (x - start[name]).norm() > 1e-4 * x.norm()]
    assert moved == [n for n in weights if "lora" in n or "adapter" not in case]
    for found_logs, found in (result[case] for result in results):
        assert_as_near([found_logs], [logs], [[near_logs]])
        assert_as_near(found.values(), weights.values(), [[*near.values()]])
