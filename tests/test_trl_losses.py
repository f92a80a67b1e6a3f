"""Each of TRL's losses with our statistics, against TRL's own and full logits in fp64."""

import re

import pytest

pytest.importorskip("trl", reason="trl needs Python 3.11")
import torch
from test_trl import Plain, make_trainer
from training.tiny import make_model
from trl import GRPOTrainer
from trl.trainer.grpo_config import GRPOConfig

from em_kernels.trl import FusedGRPOTrainer

pytestmark = pytest.mark.slow  # each with transformers' Trainer, some seconds

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")
VARIANTS = {
    "kl": {"beta": 0.3},
    "unbiased kl": {"beta": 0.3, "use_bias_correction_kl": True},
    "delta": {"delta": 1.1, "epsilon_high": 0.3},
    "entropy": {"entropy_coef": 0.2},
    "uncertain": {"top_entropy_quantile": 0.5, "entropy_coef": -0.2},
    "off policy": {"off_policy_mask_threshold": 0.01, "temperature": 0.7},
    "sampler": {},  # importance weights of another sampler, and a tool's tokens
    "all": {"beta": 0.3, "delta": 1.1, "entropy_coef": 0.2, "top_entropy_quantile": 0.5},
}
CASES = [
    *((level, {"loss_type": kind}) for kind in LOSS_TYPES for level in LEVELS),
    *((level, {**change, "name": name}) for name, change in VARIANTS.items() for level in LEVELS),
]


def test_loss_types_are_all_of_trls():
    documented = GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert set(LOSS_TYPES) == set(re.findall(r"'(\w+)'(?: \(default\))?: ", documented))


def make_inputs(trainer, name):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 267, (4, 13), generator=generator)
    prompt, length = 5, 8
    inputs = {"prompt_ids": ids[:, :prompt], "completion_ids": ids[:, prompt:]}
    inputs["prompt_mask"] = (torch.arange(prompt) >= torch.tensor([[0], [2], [1], [3]])).long()
    lengths = torch.tensor([[8], [3], [6], [5]])
    inputs["completion_mask"] = (torch.arange(length) < lengths).long()
    inputs["advantages"] = torch.tensor([1.0, -0.5, -1.5, 0.7])
    inputs["num_items_in_batch"] = lengths.sum()
    whole = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1)
    with torch.no_grad():
        logps, *_ = Plain._get_per_token_logps_and_entropies(trainer, trainer.model, ids, whole, 8)
    for key, size in (("old_per_token_logps", 0.3), ("ref_per_token_logps", 0.5)):
        noise = torch.randn(logps.shape, generator=generator)
        inputs[key] = logps.float() + size * noise
    if name == "sampler":
        inputs["importance_sampling_ratio"] = torch.rand(4, length, generator=generator)
        inputs["tool_mask"] = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]).expand(4, -1)
    return inputs


def loss_and_gradients(kind, model, folder, name=None, inputs=None, **settings):
    trainer = make_trainer(kind, model, folder, **settings)
    trainer.current_gradient_accumulation_steps = 1
    trainer.use_vllm = name == "sampler"  # whose weights are then in the inputs
    inputs = inputs or make_inputs(trainer, name)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    named = trainer.model.named_parameters()
    return [loss.detach(), *(x.grad for _, x in named if x.grad is not None)], inputs


def assert_no_less_exact(ours, theirs, truth):
    for found, other, true in zip(ours, theirs, truth, strict=True):
        error, allowed = (found - true).norm(), 2 * (other - true).norm()
        assert error <= allowed + 1e-6 * true.norm() + 1e-7, (error, allowed, true.norm())
    assert all(x.any() for x in truth)


def compare(make, folder, truth_kind=Plain, **settings):
    # The reference model that beta asks for is read from a folder, and not used here.
    make(torch.float32).save_pretrained(folder)
    models = [make(dtype) for dtype in (torch.float64, torch.float32, torch.float32)]
    models[0].load_state_dict(models[1].state_dict())  # in fp64 other weights are drawn
    for model in models:
        model.config._name_or_path = str(folder)
    truth, inputs = loss_and_gradients(truth_kind, models[0], folder, **settings)
    ours, _ = loss_and_gradients(FusedGRPOTrainer, models[1], folder, inputs=inputs, **settings)
    theirs, _ = loss_and_gradients(GRPOTrainer, models[2], folder, inputs=inputs, **settings)
    assert_no_less_exact(ours, theirs, truth)


@pytest.mark.parametrize("level, changes", CASES)
def test_loss_and_gradients_are_trls(level, changes, tmp_path):
    compare(
        lambda dtype: make_model(dtype=dtype), tmp_path, importance_sampling_level=level, **changes
    )


MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize("coefficient", [None, 0.5])
def test_auxiliary_loss_of_a_mixture_of_experts(coefficient, tmp_path):
    """As TRL, and as transformers' own forward: by None the config's coefficient."""
    seen = []

    class Routed(Plain):
        def _get_per_token_logps_and_entropies(self, model, ids, mask, length, **others):
            found = super()._get_per_token_logps_and_entropies(model, ids, mask, length)
            if not others.get("compute_aux_loss"):
                return found
            output = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
            seen.append(output.aux_loss)
            return *found[:2], output.aux_loss

    def make(dtype):
        model = make_model("mixtral", dtype=dtype, router_aux_loss_coef=0.1, **MOE)
        model.set_experts_implementation("eager")  # grouped products are not made in fp64
        return model

    compare(make, tmp_path, truth_kind=Routed, router_aux_loss_coef=coefficient)
    assert len(seen) == 1 and seen[0] > 1
