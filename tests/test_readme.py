"""The README's Python blocks run as they stand."""

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.S
)


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block):
    names = {}
    exec(block, names)
    assert names["hidden"].grad.isfinite().all() and names["weight"].grad.abs().sum() > 0


def test_there_is_a_block():
    assert BLOCKS
