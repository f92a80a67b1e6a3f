"""A vLLM server for one model, started, waited for and ended. Planned: no GPU has run it yet."""

import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ..models.loading import refuse_adapters, resolve_source
from ..settings import UserError, in_one_line

START_S = 1800  # to load a model, and to compile
STOP_S = 30


@contextmanager
def served(model: str, log: Path, console: Console) -> Iterator[str]:
    """Serve a model with `vllm serve` while the context lasts, and give its address.

    Raises: UserError if vllm is not installed, or ends before it answers.
    """
    source = resolve_source(model)
    refuse_adapters(source)
    if shutil.which("vllm") is None:
        remedy = "pip install vllm, or leave out --engine"
        raise UserError(f"engine: the command vllm is not installed; {remedy}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.parent.mkdir(parents=True, exist_ok=True)
    command = ["vllm", "serve", source, "--served-model-name", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--generation-config", "vllm"]
    with open(log, "wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        with console.status(escape(f"vllm serve {model}: starting; see {log}")):
            _wait(url, server, log)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait(url: str, server: subprocess.Popen, log: Path) -> None:
    """Wait until the server lists its model."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    lines = log.read_text(errors="replace").strip().splitlines()
    said = in_one_line(lines[-1])[:300] if lines else "it says nothing"
    why = f"did not answer in {START_S} s" if server.poll() is None else "ended"
    raise UserError(f"engine: vllm {why}: {said}; see {log}")
