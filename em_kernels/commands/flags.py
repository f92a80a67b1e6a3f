"""Convert command-line flags to settings, and settings back to flags."""

import argparse
from pathlib import Path
from typing import TypeVar

import tyro

from ..training.config import TrainConfig, read_yaml
from ..training.presets import preset
from ..training.run_folder import CONFIG
from ..training.settings import Settings, UserError

T = TypeVar("T", bound=Settings)
SOURCES = f"""--preset NAME starts from a preset; flags override it:
  paper          the paper's recipe, the same as the defaults; also called one-shot-em
  official       loss, rollouts, updates and 512 new tokens, as the paper's train.py has them now
  official-2505  the same with 2048 new tokens, as in May 2025, when the paper appeared
  demo           a 135M model on two-digit addition
--config FILE starts from a YAML file, such as a run's {CONFIG}; flags override it.

"""


def train_settings(command: str, arguments: list[str], examples: str) -> tuple[TrainConfig, bool]:
    """Return the settings, flags over --resume, --config or --preset; and whether to resume."""
    prog = f"em-kernels {command}"
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument("--preset", default="paper")
    sources.add_argument("--config", type=Path)
    if command == "train":
        sources.add_argument("--resume", type=Path)
    known, rest = parser.parse_known_args(arguments)
    run = getattr(known, "resume", None)
    if run is not None and not (run / CONFIG).exists():
        raise UserError(f"resume: {run} is not the folder of a run: it has no {CONFIG}")
    if run is not None:
        default = read_yaml(run / CONFIG).model_copy(update={"output": run})
    else:
        default = preset(known.preset) if known.config is None else read_yaml(known.config)
    # A prompt given by flag replaces the prompt of the source, be it a text or a file.
    given = {argument.split("=")[0].replace("_", "-") for argument in rest}
    if "--prompt-from" in given and "--prompt" not in given:
        default = default.model_copy(update={"prompt": None, "answer": None})
    if "--prompt" in given and "--prompt-from" not in given:
        of_file = dict.fromkeys(("prompt_from", "prompt_column", "answer_column", "answer"))
        default = default.model_copy(update=of_file)
    return parse_settings(default, command, rest, SOURCES + examples), run is not None


def parse_settings(default: T, command: str, arguments: list[str], text: str) -> T:
    """Parse a command's flags; --help shows `text` and explains each setting."""
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[type(default)],  # type: ignore[misc]
        args=arguments,
        default=default,
        prog=f"em-kernels {command}",
        description=f"{' '.join((default.__doc__ or '').split())}\n\n{text}",
    )


def as_flags(config: TrainConfig) -> list[str]:
    """Return flags for `em-kernels train` that reproduce the settings that differ from defaults."""
    default = TrainConfig()
    changed = {n: v for n, v in config if n != "sampling" and v != getattr(default, n)}
    changed |= {n: v for n, v in config.sampling if v != getattr(default.sampling, n)}
    flags = []
    for name, value in changed.items():
        flag = "4bit" if name == "four_bit" else name.replace("_", "-")
        if isinstance(getattr(default, name, None), bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return flags
