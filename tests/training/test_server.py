"""Completions from `transformers serve` with a tiny model, and from servers that misbehave."""

import os
import signal
import socket
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from json import dumps, loads
from urllib.request import urlopen

import pytest
import torch
from spawned import HANG_S, wait_for
from training.tiny import PLAIN, TEMPLATE, make_model, make_tokenizer

from em_kernels.cli import main
from em_kernels.training.config import Sampling
from em_kernels.training.rollouts import server
from em_kernels.training.rollouts.sampling import generate
from em_kernels.training.rollouts.server import complete, model_name
from em_kernels.training.settings import UserError

NAME = "tiny/llama"
SERVE = """\
import functools, socket, sys
import uvicorn
from transformers.cli.transformers import main

bound = socket.socket(fileno=int(sys.argv.pop(1)))
uvicorn.Server.run = functools.partialmethod(uvicorn.Server.run, sockets=[bound])
main()
"""
GREEDY = PLAIN.model_copy(update={"temperature": 0.0})
QUESTIONS = ["What is 2 + 3?", "abc", "Name the 3 the's.\n\n"]


@pytest.fixture(scope="module", autouse=True)
def no_proxy():
    """Requests to this machine bypass any proxy."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1")
        yield


def asked(question):
    return [{"role": "user", "content": question}]


def collect(url, model, prompts, sampling=GREEDY, seeds=None, **options):
    """Return what on_done was called with, by index."""
    done = {}
    options["on_done"] = lambda i, *rest: done.update({i: rest})
    complete(url, model, prompts, seeds or range(len(prompts)), sampling, **options)
    return done


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer whose chat template takes a hint."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<|assistant|>", "<|assistant|>{{ hint }}")
    return tokenizer


@pytest.fixture(scope="module")
def model():
    """An fp64 model: rounding cannot flip a token."""
    return make_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def url(model, tokenizer, tmp_path_factory):
    """Address of `transformers serve`, whose model looks as if downloaded from the hub."""
    cache = tmp_path_factory.mktemp("hub")
    repository, revision = cache / f"models--{NAME.replace('/', '--')}", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for part in (model, tokenizer):
        part.save_pretrained(repository / "snapshots" / revision)
    log = tmp_path_factory.mktemp("log") / "stderr"
    with socket.socket() as bound, open(log, "w") as stderr:
        bound.bind(("127.0.0.1", 0))  # No other process can take this port.
        port = bound.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(bound.fileno()), "serve", NAME, "--device", "cpu"]
            + ["--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=[bound.fileno()],
            start_new_session=True,
        )
        address = f"http://127.0.0.1:{port}"

        def answers():
            try:
                return not urlopen(f"{address}/health", timeout=HANG_S).close()
            except OSError:
                return False

        try:
            wait_for(answers, lambda: process.poll() is None or pytest.fail(log.read_text("utf-8")))
            yield address
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ours(model, tokenizer, prompts, sampling, **template):
    """Return generate's completions in the form that on_done gets."""
    ids = [
        tokenizer(p).input_ids
        if isinstance(p, str)
        else tokenizer.apply_chat_template(p, add_generation_prompt=True, **template)["input_ids"]
        for p in prompts
    ]
    rollouts = generate(model, tokenizer, ids, [(i,) for i in range(len(ids))], sampling)
    texts = tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
    told = [(t, len(r.response_ids), r.ended) for t, r in zip(texts, rollouts, strict=True)]
    return dict(enumerate(told))


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text_is_that_of_generate(penalty, url, model, tokenizer):
    sampling = GREEDY.model_copy(update={"repetition_penalty": penalty})
    prompts = [*QUESTIONS, *(asked(q) for q in QUESTIONS)]
    assert collect(url, NAME, prompts, sampling) == ours(model, tokenizer, prompts, sampling)


def test_template_kwargs(url, model, tokenizer):
    prompts = [asked(q) for q in QUESTIONS]
    hinted = collect(url, NAME, prompts, template_kwargs={"hint": "abc"})
    assert hinted == ours(model, tokenizer, prompts, GREEDY, hint="abc")
    assert hinted != collect(url, NAME, prompts)


def test_a_stop_string_ends_a_completion(url, model, tokenizer):
    text = ours(model, tokenizer, QUESTIONS[:1], GREEDY)[0][0]
    sampling = GREEDY.model_copy(update={"stop": (text[4], "never there")})
    done = collect(url, NAME, QUESTIONS[:1], sampling)
    assert done == ours(model, tokenizer, QUESTIONS[:1], sampling)
    assert done[0][2] and done[0][1] < GREEDY.max_new_tokens


def test_sampling_reaches_the_server(url, model, tokenizer):
    one_at_a_time = partial(collect, url, NAME, QUESTIONS[:1] * 4, parallel=1)
    first, second, again, folded = one_at_a_time(PLAIN, seeds=[3, 4, 3, 3 + 2**62]).values()
    assert first == again == folded != second
    only = PLAIN.model_copy(update={"top_k": 1})
    assert set(one_at_a_time(only).values()) == {collect(url, NAME, QUESTIONS[:1])[0]}


def test_model_name(url):
    assert model_name(url, "") == NAME
    assert model_name(url, "any") == "any"


def test_a_model_the_server_lacks(url):
    with pytest.raises(UserError, match=r"^server: .*pinned to 'tiny/llama'.*name a model"):
        collect(url, "tiny/lamma", QUESTIONS)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        body = loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        self.server.seen.append((self.path, self.headers["authorization"], body))
        status, answer = self.server.answer(body)
        data = (answer if isinstance(answer, str) else dumps(answer)).encode()
        self.send_response(status)
        kind = "text/html" if isinstance(answer, str) else "application/json"
        headers = {"content-type": kind, "content-length": len(data), "retry-after-ms": 1}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *what):
        pass


@pytest.fixture
def serve():
    """serve(answer) starts a server; returns its address, and the list of requests it gets."""
    servers = []

    def start(answer):
        one = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        one.answer, one.seen = answer, []
        threading.Thread(target=one.serve_forever, args=[0.01]).start()
        servers.append(one)
        return f"http://127.0.0.1:{one.server_port}", one.seen

    yield start
    for one in servers:
        one.shutdown()
        one.server_close()


def completion(body, text="four", reason="stop", **more):
    said = {"message": {"content": text}} if "messages" in body else {"text": text}
    return 200, {"choices": [{"index": 0, "finish_reason": reason, **said}], **more}


def refusal(status, message):
    return status, {"error": {"message": message, "type": "invalid_request_error"}}


def test_every_field_is_sent(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    url, seen = serve(completion)
    sampling = Sampling(temperature=0.5, top_k=0, max_new_tokens=512)
    collect(url, "m", ["2 + 2"], sampling, seeds=[2**40 + 5], template_kwargs={"think": False})
    sampling = sampling.model_copy(update={"top_k": 50, "stop": ("\n",)})
    collect(url, "m", [asked("2")], sampling, seeds=[6], template_kwargs={"think": False})
    fields = {"model": "m", "temperature": 0.5, "top_p": 0.95, "max_tokens": 512, "min_p": 0}
    fields |= {"repetition_penalty": 1.15, "repeat_penalty": 1.15, "repeat_last_n": 2**17}
    fields["samplers"] = ["penalties", "temperature", "top_k", "top_p"]
    raw = {"prompt": "2 + 2", "seed": 5, "stop": None, "top_k": -1}
    chat = {"messages": asked("2"), "seed": 6, "stop": ["\n"], "top_k": 50}
    chat["chat_template_kwargs"] = {"think": False}
    assert seen == [
        ("/v1/completions", "Bearer secret", fields | raw),
        ("/v1/chat/completions", "Bearer secret", fields | chat),
    ]


def test_what_on_done_is_told(serve):
    url, _ = serve(lambda body: completion(body, None, "length"))
    address = url.removeprefix("http://")
    assert collect(f"{url}/v1/", "m", [asked("2")]) == {0: ("", None, False)}
    threads = set()
    on_done = lambda *_: threads.add(threading.get_ident())  # noqa: E731
    complete(address, "m", ["2"] * 5, range(5), GREEDY, on_done=on_done)
    assert threads == {threading.get_ident()}


def strict(body):
    """Answer as OpenAI's own API: a field that it does not know is an error."""
    known = {"model", "prompt", "temperature", "top_p", "max_tokens", "stop", "seed"}
    if unknown := sorted(set(body) - known):
        return refusal(400, f"Unrecognized request argument supplied: {unknown[0]}")
    return completion(body)


def test_fields_that_a_server_refuses_are_left_out_where_they_are_off(serve):
    url, seen = serve(strict)
    assert len(collect(url, "m", ["2"] * 5, parallel=1)) == 5
    assert len(seen) == 7  # Each refused dialect is tried once.
    with pytest.raises(UserError, match=r"^server: .*set sampling\.top_k 0 and"):
        collect(url, "m", ["2"], GREEDY.model_copy(update={"top_k": 50}))


@pytest.mark.parametrize(
    ("status", "message", "remedy"),
    [
        (400, "The context is 128 tokens.", "lower sampling.max_new_tokens"),
        (401, "No key.", "set OPENAI_API_KEY"),
        (403, "Not yours.", "set OPENAI_API_KEY"),
        (404, "The model `m` does not exist.", "one it serves"),
    ],
)
def test_a_refusal_is_one_line_with_a_remedy(status, message, remedy, serve):
    url, seen = serve(lambda body: refusal(status, message))
    with pytest.raises(UserError) as error:
        collect(url, "m", ["2"] * 40, parallel=1)
    said = str(error.value)
    assert said.startswith(f"server: {url}: ") and message in said and remedy in said
    assert "\n" not in said and len(seen) == 1


def test_what_arrived_before_a_failure_is_delivered(serve):
    url, seen = serve(lambda b: refusal(503, "full") if b["prompt"] == "3" else completion(b))
    done = []
    with pytest.raises(UserError, match=r"^server: .*full.*; is it running there\? See its log"):
        options = {"parallel": 1, "on_done": lambda i, *_: done.append(i)}
        complete(url, "m", ["2", "2", "3", "2"], range(4), GREEDY, **options)
    assert done == [0, 1] and [body["prompt"] for *_, body in seen] == ["2", "2"] + ["3"] * 5


def test_a_server_that_recovers(serve):
    answers = iter([refusal(503, "starting"), refusal(429, "busy")])
    url, _ = serve(lambda body: next(answers, None) or completion(body))
    assert collect(url, "m", ["2"]) == {0: ("four", None, True)}


def test_what_on_done_raises_ends_the_call(serve):
    url, seen = serve(completion)

    def full(*what):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        complete(url, "m", ["2"] * 99, range(99), GREEDY, parallel=1, on_done=full)
    assert len(seen) < 99


def test_an_interrupt(serve):
    told, never, waiting = threading.Event(), threading.Event(), []

    def answer(body):
        if body["prompt"] == "slow":
            waiting.append(body)
            if len(waiting) == 2 and told.wait(HANG_S):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            never.wait(HANG_S)
        return completion(body)

    def on_done(i, *rest):
        done.append(i)
        told.set()

    url, seen = serve(answer)
    done, prompts = [], ["fast"] + ["slow"] * 9
    with pytest.raises(KeyboardInterrupt):
        complete(url, "m", prompts, range(10), GREEDY, parallel=2, on_done=on_done)
    assert not never.is_set() and done == [0]
    never.set()
    assert len(seen) == 3  # No request was sent after the call.


def test_a_server_that_stopped(monkeypatch):
    monkeypatch.setattr(server, "RETRIES", 1)  # Each waits longer than the one before.
    with socket.socket() as nobody:  # Bound but not listening.
        nobody.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"^server: {gone}: .*; is it running there\?"):
            collect(gone, "m", ["2"] * 50)


@pytest.mark.parametrize("address", ["http://here:port", "http://[::1"])
def test_an_address_that_is_none(address):
    with pytest.raises(UserError, match=r"^server: .*give an address like http://HOST:PORT"):
        model_name(address, "")


@pytest.mark.parametrize("answer", ["<html>", {}, [], None, {"choices": []}])
def test_a_server_of_something_else(answer, serve):
    url, _ = serve(lambda body: (200, answer))
    with pytest.raises(UserError, match=r"^server: .*does not answer as OpenAI's API does"):
        collect(url, "m", ["2"])
    if answer != []:
        with pytest.raises(UserError, match=r"^(server|model): "):
            model_name(url, "")


def test_several_models(serve):
    url, _ = serve(lambda body: (200, {"data": [{"id": "a"}, {"id": "b"}]}))
    with pytest.raises(UserError, match=r"^model: name one of those at http.*: a, b$"):
        model_name(url, "")


def test_a_whole_evaluation(url, model, tokenizer, tmp_path):
    """`eval --server` equals `eval` on the same model; run again, it sends no request."""
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = [dumps({"problem": question, "answer": "5"}) + "\n" for question in QUESTIONS]
    (tmp_path / "data.jsonl").write_text("".join(rows))
    base = ["eval", "--data", str(tmp_path / "data.jsonl"), "--max-new-tokens", "12"]
    base += ["--template-kwargs", '{"hint": "the"}', "--dtype", "float32"]
    found = []
    for name, where in ((NAME, ["--server", url]), (str(tmp_path / "model"), [])):
        output = tmp_path / f"eval-{len(found)}"
        assert main([*base, *where, "--model", name, "--output", str(output)]) == 0
        lines = (output / "completions.jsonl").read_text("utf-8").splitlines()
        rows = sorted(map(loads, lines), key=lambda row: row["problem"])
        found.append([(row["problem"], row["text"], row["tokens"], row["ended"]) for row in rows])
    assert found[0] == found[1] and len(found[0]) == 3
    nobody = ["--server", "http://127.0.0.1:1", "--model", NAME]
    assert main([*base, *nobody, "--output", str(tmp_path / "eval-0")]) == 0
