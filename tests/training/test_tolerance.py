"""Training with the sparse gradient."""

import pytest
from training.test_step import ROLLOUTS
from training.tiny import (
    PLAIN,
    loss_and_gradients,
    make_model,
    make_optimizer,
    read,
    run,
    save_tiny,
    settings,
)

from em_kernels.hf import head_of
from em_kernels.training.config import TrainConfig
from em_kernels.training.engines.step import entropy_step
from em_kernels.training.rollouts.sampling import generate


def test_default_tolerance_is_reported(tmp_path):
    """Check the shares in the metrics, and gradients close to the exact ones."""
    model = make_model(initializer_range=1.0)
    found = {}
    for tolerance in (0.0, TrainConfig().grad_tolerance):
        config = settings("-", tmp_path, grad_tolerance=tolerance, loss_temperature=0.25)
        found[tolerance] = loss_and_gradients(model, ROLLOUTS, config)
    (exact, true), (sparse, ours) = found.values()
    assert sparse.entropy == exact.entropy and exact[1:3] == (1.0, 0.0)
    assert sparse.active_share < 0.9 and 0 < sparse.dropped_share <= 2**-9
    error = sum((ours[name] - true[name]).square().sum() for name in true)
    assert 0 < error < (4 * 2**-9) ** 2 * sum(g.square().sum() for g in true.values())
    folder = save_tiny(tmp_path / "model", initializer_range=1.0)
    run(settings(folder, tmp_path / "run", grad_tolerance=2**-9))
    for row in read(tmp_path / "run" / "metrics.jsonl"):
        assert 0 < row["active_share"] <= 1 and 0 <= row["dropped_share"] <= 2**-9


@pytest.mark.slow
def test_tolerance_does_not_change_training(demo):
    """Ten updates of the real model with and without a tolerance, on the same completions."""
    model, tokenizer = demo
    start = {name: x.detach().clone() for name, x in model.named_parameters()}
    config = settings(
        "demo", "-", lr=2e-5, sampling=PLAIN.model_copy(update={"max_new_tokens": 64})
    )
    prompts = [tokenizer("Q: What is 31 + 52?\nA:").input_ids]
    losses, ends, rollouts = {}, {}, {}
    for tolerance in (0.0, 2**-9):
        model.load_state_dict(start, strict=False)
        config = config.model_copy(update={"grad_tolerance": tolerance})
        optimizer = make_optimizer(model, config)
        losses[tolerance] = []
        for update in range(10):
            if update not in rollouts:
                keys = [(0, update, i) for i in range(16)]
                rollouts[update] = generate(
                    model, tokenizer, prompts * 16, keys, config.sampling, batch_size=16
                )
            loss = entropy_step(
                model, head_of(model), rollouts[update], config, optimizer, 1024, lambda: None
            )
            losses[tolerance].append(loss.entropy)
            optimizer.step(optimizer.norm())
        optimizer.close()
        ends[tolerance] = {n: x.detach().clone() for n, x in model.named_parameters()}
    exact, sparse = losses.values()
    assert exact[-1] < 0.9 * exact[0]
    assert sparse == pytest.approx(exact, rel=0.01)

    def norm(of):
        return sum(x.square().sum() for x in of.values()).sqrt()

    difference = {name: ends[2**-9][name] - x for name, x in ends[0.0].items()}
    rounded = {name: x - x.bfloat16().float() for name, x in ends[0.0].items()}
    assert 0 < norm(difference) < 0.2 * norm(rounded)
