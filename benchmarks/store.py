"""results/<device>.json: one file per device, which every benchmark adds to."""

import json
import platform
import re
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
SCHEMA = 2


class BenchError(Exception):
    """An error that the user can mend; the message is one line."""


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = "unknown CPU"
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        model = found[1] if found else model
    return f"{model}, {torch.get_num_threads()} threads"


def path_of(device: str) -> Path:
    return RESULTS / (re.sub(r"\W+", "-", device_name(device)).strip("-").lower() + ".json")


def load(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise BenchError(f"{path}: not JSON ({error}); move it away") from error
    found = content.get("schema", 1) if isinstance(content, dict) else None
    if found != SCHEMA:
        raise BenchError(
            f"{path}: results of version {found}, this suite reads {SCHEMA}; move it away"
        )
    return content


def is_measured(row: dict) -> bool:
    return "skipped" not in row and not row.get("failed")


def merge(path: Path, device: str, section: str, results: dict[str, dict]) -> None:
    """Add results to a section of the file, keep the rest, and write it whole or not at all."""
    content = load(path) if path.exists() else {"schema": SCHEMA, "device": device_name(device)}
    facts = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    kept = content.setdefault(section, {})
    for key, row in results.items():
        # A skip never replaces a result.
        if "skipped" not in row or "skipped" in kept.get(key, row):
            kept[key] = row | facts
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(content, indent=1) + "\n")
    whole.replace(path)
