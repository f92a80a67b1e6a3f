"""Intrinsic rewards by name in FusedGRPOTrainer: their values, their cost, and what they train."""

import copy
import math

import pytest

pytest.importorskip("trl", reason="trl needs Python 3.11")
import torch
from test_trl import PROMPTS, Plain, assert_same_training, make_trainer, train, varied
from torch.testing import assert_close
from training.tiny import make_model, save_tiny
from transformers import LlamaForCausalLM

from em_kernels.losses import em_rl_token_reward, rent_reward
from em_kernels.trl import INTRINSIC_REWARDS, FusedGRPOTrainer

pytestmark = pytest.mark.slow  # each with transformers' Trainer, some seconds

MEANS = ("rent", "intuitor")


def expected_rewards(model, ids, mask, counts, temperature):
    """Return each reward's definition on full logits; counts (B, T) are the completions' tokens."""
    length = counts.shape[1]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1] / temperature
    logp = logits.log_softmax(-1)
    tokens = {
        "rent": (logp.exp() * logp).sum(-1),
        "intuitor": -(logp + math.log(logp.shape[-1])).mean(-1),
        "em_rl_sequence": logp.gather(-1, ids[:, -length:, None])[..., 0],
    }
    tokens["em_rl_token"] = tokens["rent"]
    divisor = {name: counts.sum(1) if name in MEANS else 1 for name in tokens}
    return {name: (x * counts).sum(1) / divisor[name] for name, x in tokens.items()}


def logged(trainer):
    return {name: list(x) for name, x in trainer._logs["rewards"].items()}


@pytest.mark.parametrize("iterations", [1, 2])
def test_rewards_are_those_of_the_logits(iterations, tmp_path):
    """Mixed with a callable, weighted, logged under their names, and scored in evaluation too."""
    model = make_model(dtype=torch.float64)
    before = copy.deepcopy(model)
    names = [*INTRINSIC_REWARDS, "varied"]
    settings = {"temperature": 0.7, "num_iterations": iterations, "steps": 1}
    reward = [*INTRINSIC_REWARDS, varied]
    settings |= {"reward_weights": [1.0, 0.5, 0.1, 0.2, 1.0], "reward": reward}
    trainer, _ = train(FusedGRPOTrainer, model, tmp_path, **settings)
    assert reward == [*INTRINSIC_REWARDS, varied] and trainer.reward_func_names == names
    ids, mask, length, *_ = trainer.seen[0]
    with torch.no_grad():
        expected = expected_rewards(before, ids, mask, mask[:, -length:], 0.7)
    assert {*logged(trainer)} == {*names}
    for name, wanted in expected.items():
        assert_close(torch.tensor(logged(trainer)[name]), wanted.float(), rtol=1e-6, atol=1e-6)
        mean = trainer.state.log_history[0][f"rewards/{name}/mean"]
        assert mean == pytest.approx(wanted.mean().item(), rel=1e-5)
    found = trainer.evaluate(trainer.train_dataset)
    assert all(math.isfinite(found[f"eval_rewards/{name}/mean"]) for name in names)


def forwards(model):
    """Count the model's forwards from now on, but those that sample."""
    calls = []
    hook = model.model.register_forward_pre_hook
    hook(lambda m, a, kw: calls.append(kw.get("use_cache")), with_kwargs=True)
    return lambda: calls.count(False)


@pytest.mark.parametrize(
    "changes, passes",
    [
        ({"num_iterations": 2}, (3, 3)),  # one generation: its pass, two updates
        (
            {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_generations": 4},
            (8, 8),
        ),
        ({}, (2, 4)),  # two generations; TRL has no pass before the update
    ],
)
def test_rewards_cost_no_further_forward(changes, passes, tmp_path):
    counts = []
    for reward in (varied, ["rent", "intuitor", varied]):
        model = make_model()
        trainer = make_trainer(FusedGRPOTrainer, model, tmp_path, reward, steps=2, **changes)
        count = forwards(model)
        trainer.train()
        counts.append(count())
    assert tuple(counts) == passes


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}, {"beta": 0.1}])
def test_training_is_that_of_a_callable_with_these_rewards(changes, tmp_path):
    """A TRL trainer that is told the rewards goes through the same updates."""
    given, taken = [], []

    class Spy(FusedGRPOTrainer):
        def _calculate_rewards(self, *arguments):
            given.append(super()._calculate_rewards(*arguments))
            return given[-1]

    def replay(completions, **others):
        taken.append(given[len(taken)][:, 0].tolist())
        return taken[-1]

    folder = save_tiny(tmp_path / "model", dtype=torch.float64)
    runs = []
    for kind, reward in ((Spy, "em_rl_sequence"), (Plain, replay)):
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
        runs.append(train(kind, model, tmp_path, reward, **changes))
    assert len(taken) == len(given) > 0
    seen = runs[0][0].seen
    if "num_iterations" not in changes:  # TRL's old log-probabilities are those of the update
        del seen[:: len(seen) // len(given)]
    assert_same_training(*runs, 1e-9)


def rollout(prompts, trainer):
    """Return completions of which another program wrote some tokens."""
    completions = [[5, 9, 7, 0], [8, 3], [4, 6, 11], [7, 7, 7, 7]]
    masks = [[1, 0, 0, 1], [1, 1], [0, 1, 1], [1, 1, 1, 0]]
    ids = trainer.processing_class(text=prompts)["input_ids"]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None, "env_mask": masks}


def test_tokens_of_tools_do_not_count(tmp_path):
    model = make_model(dtype=torch.float64)
    before = copy.deepcopy(model)
    trainer = make_trainer(FusedGRPOTrainer, model, tmp_path, [*INTRINSIC_REWARDS], steps=1)
    trainer.rollout_func = rollout
    trainer.train()
    ids, mask, length, *_ = trainer.seen[0]
    own = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]])
    with torch.no_grad():
        expected = expected_rewards(before, ids, mask, own, 1.0)
    for name, wanted in expected.items():
        assert_close(torch.tensor(logged(trainer)[name]), wanted.float(), rtol=1e-6, atol=1e-6)


def test_completions_that_are_left_out_have_no_reward(tmp_path):
    settings = {"mask_truncated_completions": True, "max_completion_length": 4}
    trainer = make_trainer(FusedGRPOTrainer, make_model(), tmp_path, "rent", steps=1, **settings)
    trainer.train()
    ended = trainer.seen[0][1][:, -1 * trainer.seen[0][2]] > 0
    rewards = torch.tensor(logged(trainer)["rent"])
    assert 0 < ended.sum() < len(PROMPTS) and torch.equal(~rewards.isnan(), ended)


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="^reward_funcs: 'rents' is none of rent, intuitor, em_rl"):
        make_trainer(FusedGRPOTrainer, make_model(), tmp_path, [varied, "rents"])
    for name, reward in (("rent", rent_reward), ("em_rl_token", em_rl_token_reward)):
        with pytest.raises(TypeError, match=f'^reward_funcs: {name}_reward .*, "{name}"$'):
            FusedGRPOTrainer("model", ["intuitor", reward])
    with pytest.raises(TypeError, match="^reward_funcs: expected .*, or a list .* got tuple"):
        make_trainer(FusedGRPOTrainer, make_model(), tmp_path, (varied, "rent"))
