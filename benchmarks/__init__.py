"""The benchmark suite: see ``python -m benchmarks --help``."""
