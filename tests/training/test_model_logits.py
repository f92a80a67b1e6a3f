"""The figure of several models' logits, against plain transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import skew
from training.tiny import make_model, save_tiny

from em_kernels.cli import main
from em_kernels.training.report import model_logits
from em_kernels.training.rollouts.sampling import Rollout


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    sampling = model_logits.SAMPLING.model_copy(update={"max_new_tokens": 9})
    monkeypatch.setattr(model_logits, "SAMPLING", sampling)


def test_official_values_are_those_of_generate():
    """generate's scores are logits over the temperature, -inf below the 50 highest."""
    model, prompt = make_model("gemma2"), torch.tensor([[5, 6, 7, 8]])
    asked = {"do_sample": True, "temperature": 0.6, "top_k": 50, "max_new_tokens": 7}
    asked |= {"output_scores": True, "return_dict_in_generate": True, "eos_token_id": None}
    rollouts, scores = [], []
    for tokens in (7, 5):
        out = model.generate(prompt, **asked | {"max_new_tokens": tokens})
        rollouts.append(Rollout(prompt[0].tolist(), out.sequences[0, 4:].tolist(), False))
        scores += [x[0] for x in out.scores[:5]]
    values, tokens = model_logits.official_values(model, rollouts)
    expected = torch.stack(scores).flatten()
    expected = expected[expected.isfinite()].numpy()
    assert tokens == 5 and len(values) == len(expected) == 2 * 5 * 50
    np.testing.assert_allclose(np.sort(values), np.sort(expected), rtol=1e-4, atol=1e-5)


def test_the_command(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    save_tiny(Path("base"))
    torch.manual_seed(1)
    save_tiny(Path("trained"), "qwen2")
    rows = [{"prompt": f"What is {i} + 2?"} for i in range(30)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", "--models", "base", "trained", "--prompts", "rows.jsonl"]) == 0
    told = capfd.readouterr().out
    assert Path("logits.png").read_bytes().startswith(b"\x89PNG") and told.endswith("logits.png\n")
    (base, trained) = model_logits.model_logits(
        ["base", "trained"], Path("rows.jsonl"), model_logits.Console(quiet=True)
    )
    top = base.official.mean(), base.official.std(), skew(base.official)
    assert "  ".join(f"{x:.2f}" for x in top) in told
    assert len(base.official) == 20 * base.tokens * 50 and base.tokens <= 9
    assert base.whole.completions == trained.whole.completions == 20
    assert "The two are not comparable." in " ".join(told.split())


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "RUN: missing"),
        (["run", "--prompts", "rows.jsonl"], "prompts: goes with --models"),
        (["--models", "base"], "models: goes with --prompts, and without runs"),
        (["run", "--models", "base", "--prompts", "rows.jsonl"], "models: goes with --prompts"),
        (["--models", "nowhere/at/all", "--prompts", "none.jsonl"], "prompts: cannot read"),
    ],
)
def test_refusals(arguments, said, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"em-kernels report: error: {said}")
    assert err.count("\n") == 1 and not list(tmp_path.iterdir())
