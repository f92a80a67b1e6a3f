"""Command-line flags and the settings they stand for, in both directions."""

import argparse
from pathlib import Path
from typing import TypeVar

import tyro

from ..training.config import PRESETS, Settings, TrainConfig, UserError, preset, read_yaml
from ..training.run_folder import CONFIG

T = TypeVar("T", bound=Settings)


def train_settings(command: str, arguments: list[str], examples: str) -> tuple[TrainConfig, bool]:
    """TrainConfig of flags over --resume RUN, --config FILE or --preset NAME; and whether to
    resume.
    """
    before = argparse.ArgumentParser(prog=f"em-kernels {command}", add_help=False)
    before.allow_abbrev = False
    start = before.add_mutually_exclusive_group()
    start.add_argument("--preset")
    start.add_argument("--config", type=Path)
    if command == "train":
        start.add_argument("--resume", type=Path)
    known, rest = before.parse_known_args(arguments)
    run = getattr(known, "resume", None)
    if run is not None and not (run / CONFIG).exists():
        raise UserError(f"resume: {run} is not the folder of a run: it has no {CONFIG}")
    default = TrainConfig()
    if run is not None:
        default = read_yaml(run / CONFIG).model_copy(update={"output": run})
    elif known.config is not None:
        default = read_yaml(known.config)
    elif known.preset is not None:
        default = preset(known.preset)
    # of prompt and file the flag's wins
    given = {argument.split("=")[0].replace("_", "-") for argument in rest}
    if "--prompt-from" in given and "--prompt" not in given:
        default = default.model_copy(update={"prompt": None, "answer": None})
    if "--prompt" in given and "--prompt-from" not in given:
        default = default.model_copy(update={"prompt_from": None, "answer": None})
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[TrainConfig],
        args=rest,
        default=default,
        prog=f"em-kernels {command}",
        description=f"{TrainConfig.__doc__}\n--preset NAME starts from one of "
        f"{', '.join(PRESETS)} (the paper's recipe; its train.py's loss and counts; a 135M model "
        "on addition); --config FILE from YAML (a run's config.yaml, say); flags win."
        f"\n\n{examples}",
    )
    return config, run is not None


def parse_settings(kind: type[T], command: str, arguments: list[str], text: str) -> T:
    """Settings from a command's flags, over their defaults; --help explains each."""
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[kind],  # type: ignore[valid-type, misc]
        args=arguments,
        default=kind(),
        prog=f"em-kernels {command}",
        description=f"{' '.join((kind.__doc__ or '').split())}\n\n{text}",
    )


def as_flags(config: TrainConfig) -> list[str]:
    """Flags for `em-kernels train` that reproduce the settings that differ from the defaults."""
    default = TrainConfig()
    pairs = [
        (name, getattr(config, name), getattr(default, name)) for name in type(config).model_fields
    ]
    for name in type(config.sampling).model_fields:
        pairs.append((name, getattr(config.sampling, name), getattr(default.sampling, name)))
    found: list[str] = []
    for name, value, usual in pairs:
        flag = "4bit" if name == "four_bit" else name.replace("_", "-")
        if value == usual or name == "sampling":
            continue
        if isinstance(usual, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            found += [f"--{flag}", *map(str, value)]
        else:
            found += [f"--{flag}", str(value)]
    return found
