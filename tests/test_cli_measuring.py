"""The commands that select and evaluate: their help, and what they refuse."""

import re

import pytest
from test_cli import help_of
from test_cli_refusals import contents, refused

from em_kernels.commands.flags import train_settings as settings
from em_kernels.training.config import TrainConfig
from em_kernels.training.evaluation.evaluate import EvalConfig
from em_kernels.training.evaluation.select import SelectConfig
from em_kernels.training.evaluation.study import StudyConfig
from em_kernels.training.presets import PRESETS


@pytest.mark.parametrize(
    "command, config, more",
    [
        ("select", SelectConfig, ["(default: runs/selection)", "(default: 1.15)"]),
        ("eval", EvalConfig, ["--regrade DIR", "--against DIR", "(default: evals/eval)"]),
        ("study", StudyConfig, ["(default: 2 5)", "(default: 5e-06)", "(default: addition)"]),
    ],
)
def test_help(command, config, more, capfd):
    text = help_of(command, config, capfd)
    assert all(part in text for part in more)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["select", "--samples", "1"], "samples: 1: .* greater than or equal to 2"),
        (["select", "--promising", "0"], "promising: 0.0: .* greater than 0"),
        (["eval", "--temperature", "1e-40"], "sampling.temperature: 1e-40: is below 0.01"),
        (["eval", "--temperatures", "0"], "temperatures.0: 0.0: .* greater than or equal to 0.01"),
        (
            ["eval", "--server", "here", "--teacher-forced"],
            "teacher_forced: needs template few-shot",
        ),
        (["study", "--updates"], "updates: "),
        (["study", "--prompts", "1"], "prompts: 1: .* greater than or equal to 4"),
        (["study", "--temperature", "nan"], "sampling.temperature: nan"),
        (["report", "nowhere"], "nowhere"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_values_that_are_refused(arguments, said, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    line = refused(arguments, capfd)
    assert re.search(f"^em-kernels {arguments[0]}: error: .*{said}", line), line
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("equals", [True, False])
def test_a_file_of_prompts_takes_the_place_of_a_prompt(equals, tmp_path):
    """A prompt replaces a file, too; giving both is refused later."""
    given = ["--prompt-from=rows.jsonl"] if equals else ["--prompt-from", "rows.jsonl"]
    config, resume = settings("train", ["--preset", "demo", *given], "")
    found = config.model_dump(exclude={"prompt", "answer", "prompt_from"})
    start = TrainConfig(**PRESETS["demo"])
    assert found == start.model_dump(exclude={"prompt", "answer", "prompt_from"}) and not resume
    assert (config.prompt, config.answer, str(config.prompt_from)) == (None, None, "rows.jsonl")
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    config, _ = settings("train", ["--config", str(tmp_path / "run.yaml"), "--prompt", "p"], "")
    assert (config.prompt, config.answer, config.prompt_from) == ("p", None, None)
    config, _ = settings("train", ["--preset", "demo", "--prompt", "p", *given], "")
    assert (config.prompt, str(config.prompt_from)) == ("p", "rows.jsonl")
