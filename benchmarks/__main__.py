"""Entry point of `python -m benchmarks`, which needs a checkout."""

import sys

from benchmarks.suite import main

sys.exit(main(sys.argv[1:]))
