"""Completions from a server of OpenAI's API: vLLM's, SGLang's, llama.cpp's, transformers serve.

Every sampling field is sent: for a missing one servers take the model's generation_config.
"""

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any

from .config import Sampling, UserError

RETRIES = 4  # the client's own, which take about 7 s
TIMEOUT_S = 3600  # a long completion, behind others in the server's queue
UNKNOWN_FIELD = re.compile("unexpected|unrecogni[sz]ed|unknown|not permitted|unsupported")
READ = "shorten the prompt, lower sampling.max_new_tokens, or name a model it serves, as it says"
KEY = "set OPENAI_API_KEY to a key it takes"
ADDRESS = "check the address, and that the model is one it serves"
RUNNING = "is it running there? See its log, then run this again"
OFF = "set sampling.top_k 0 and sampling.repetition_penalty 1"
REMEDIES = {400: READ, 401: KEY, 403: KEY, 404: ADDRESS, 422: READ}


def _client(url: str) -> Any:
    """An openai.OpenAI."""
    try:
        import openai
    except ImportError:
        raise UserError("server: the package openai is missing; pip install openai") from None
    address = url if "://" in url else f"http://{url}"
    try:
        return openai.OpenAI(
            base_url=address.rstrip("/").removesuffix("/v1") + "/v1",
            api_key=os.environ.get("OPENAI_API_KEY") or "none",  # local servers want none
            max_retries=RETRIES,
            timeout=openai.Timeout(TIMEOUT_S, connect=10),
        )
    except Exception as error:  # InvalidURL, of whichever httpx it uses
        raise UserError(f"server: {url}: {error}; an address is http://HOST:PORT") from None


def _said(error: Any) -> str:
    """What an openai.APIError was told, in one line."""
    body = error.body
    if isinstance(body, dict):  # OpenAI's API has a message, FastAPI a detail
        body = body.get("message") or body.get("detail") or body
    return " ".join(str(body or error.__cause__ or error.message).split())


def _refuses(error: Any, fields: Mapping[str, Any]) -> bool:
    """Whether a server refused a request because it does not know some of these fields."""
    said = _said(error).lower()
    return any(field in said for field in fields) and bool(UNKNOWN_FIELD.search(said))


@contextmanager
def _in_one_line(url: str) -> Iterator[None]:
    """What the client raises, as a UserError."""
    import openai

    try:
        yield
    except openai.APIError as error:
        remedy = REMEDIES.get(getattr(error, "status_code", 0), RUNNING)
        raise UserError(f"server: {url}: {_said(error)[:300]}; {remedy}") from None
    except (AttributeError, IndexError, TypeError, ValueError):
        raise UserError(f"server: {url} does not answer as OpenAI's API does; {ADDRESS}") from None


def model_name(url: str, model: str) -> str:
    """The model, or where none is named the only one of the server.

    Raises: UserError where it has several, none, or does not answer.
    """
    if model:
        return model
    with _client(url) as client, _in_one_line(url):
        names = [entry.id for entry in client.models.list().data]
    if len(names) != 1:
        raise UserError(f"model: name one of those at {url}: {', '.join(names) or 'it lists none'}")
    return names[0]


def _dialects(sampling: Sampling) -> list[dict[str, Any]]:
    """How servers are told what OpenAI's API has no field for, in the order to try."""
    top_k, penalty = sampling.top_k, sampling.repetition_penalty
    both = {"min_p": 0, "repetition_penalty": penalty}
    vllm = both | {"top_k": top_k or -1}  # and SGLang; some versions refuse 0
    llama_cpp = {  # which passes over what it does not know, as do those two
        "repeat_penalty": penalty,
        "repeat_last_n": 2**17,  # any context; some versions refuse -1
        "samplers": ["penalties", "temperature", "top_k", "top_p"],  # transformers' order
    }
    # transformers serve, which is greedy unless told otherwise
    config = json.dumps(both | {"top_k": top_k, "do_sample": sampling.temperature > 0})
    off: list[dict[str, Any]] = [{}] if top_k == 0 and penalty == 1 else []
    return [vllm | llama_cpp, vllm, {"generation_config": config}, *off]


def complete(
    url: str,
    model: str,
    prompts: Sequence[str | list[dict[str, str]]],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    template_kwargs: Mapping[str, Any] = {},
    parallel: int = 32,
    on_done: Callable[[int, str, int | None, bool], None],
) -> None:
    """A completion for each prompt: a text is completed as it is, messages by the chat template.

    Args:
        seeds: one for each prompt; servers get 31 bits of it.
        parallel: requests at a time.
        on_done: called in this thread as completions arrive, in any order, with the prompt's index,
            the text, its tokens where the server counts them, and whether it ended by itself.

    Raises: UserError for a server that cannot be reached, refuses a request or keeps failing.
    """
    dialects, spoken = _dialects(sampling), 0
    common: dict[str, Any] = {"model": model, "temperature": sampling.temperature}
    common |= {"top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens}
    common["stop"] = list(sampling.stop) or None
    client = _client(url)
    import openai

    def answer(i: int) -> tuple[str, int | None, bool]:
        nonlocal spoken
        raw = isinstance(prompts[i], str)
        fields = common | {"seed": seeds[i] % 2**31, "prompt" if raw else "messages": prompts[i]}
        extra = (
            {} if raw or not template_kwargs else {"chat_template_kwargs": dict(template_kwargs)}
        )
        create = (client if raw else client.chat).completions.create
        with _in_one_line(url):
            for tried in range(spoken, len(dialects)):
                try:
                    said = create(**fields, extra_body=dialects[tried] | extra)
                    break
                except openai.APIStatusError as error:
                    if not _refuses(error, dialects[tried]):
                        raise
                    spoken = max(spoken, tried + 1)
            else:
                raise UserError(f"server: {url} has no top_k or repetition_penalty; {OFF}")
            choice, usage = said.choices[0], said.usage
            text = choice.text if raw else choice.message.content
            tokens = usage.completion_tokens if usage else None
            return text or "", tokens, choice.finish_reason != "length"

    queued = deque(range(len(prompts)))
    arrived: SimpleQueue[tuple[int, Any]] = SimpleQueue()

    def work() -> None:
        with suppress(IndexError):  # of the queue, once it is empty
            while True:
                i = queued.popleft()
                try:
                    arrived.put((i, answer(i)))
                except Exception as error:
                    queued.clear()
                    arrived.put((i, error))

    for _ in range(min(parallel, len(prompts))):
        Thread(target=work, daemon=True).start()  # an exit does not wait for it
    try:
        for _ in prompts:
            i, outcome = arrived.get()
            if isinstance(outcome, Exception):  # what arrived before it has been handed on
                raise outcome
            on_done(i, *outcome)
    finally:
        queued.clear()
    client.close()  # after a failure others are still on their way
