"""Completions from a server with OpenAI's API: vLLM, SGLang, llama.cpp, transformers serve.

Every sampling field is sent, as servers fill in missing ones from the model's generation_config.
"""

import asyncio
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..config import Sampling
from ..settings import UserError, in_one_line

try:
    import openai
except ImportError:
    raise UserError("server: the package openai is missing; pip install openai") from None

RETRIES = 4  # by the openai client; they take about 7 s
TIMEOUT_S = 3600  # A long completion may also wait in the server's queue.
UNKNOWN_FIELD = re.compile("unexpected|unrecogni[sz]ed|unknown|not permitted|unsupported")
FIX_REQUEST = "shorten the prompt, lower sampling.max_new_tokens, or name a model that it serves"
SET_KEY = "set OPENAI_API_KEY to a key that it accepts"
CHECK_ADDRESS = "check the address, and that the model is one it serves"
CHECK_LOG = "is it running there? See its log, then run this again"
REMEDIES = {400: FIX_REQUEST, 401: SET_KEY, 403: SET_KEY, 404: CHECK_ADDRESS, 422: FIX_REQUEST}


def _client(kind: Any, url: str) -> Any:
    """Return a client: openai.OpenAI, or its asynchronous twin."""
    address = url if "://" in url else f"http://{url}"
    try:
        return kind(
            base_url=address.rstrip("/").removesuffix("/v1") + "/v1",
            api_key=os.environ.get("OPENAI_API_KEY") or "none",  # Local servers need no key.
            max_retries=RETRIES,
            timeout=openai.Timeout(TIMEOUT_S, connect=10),
        )
    except Exception as error:  # InvalidURL, of the client's httpx
        raise UserError(f"server: {url}: {error}; give an address like http://HOST:PORT") from None


def _server_message(error: openai.APIError) -> str:
    """Return the server's error message, in one line."""
    body = error.body
    if isinstance(body, dict):  # OpenAI's API sends a message, FastAPI a detail.
        body = body.get("message") or body.get("detail") or body
    return in_one_line(body or error.__cause__ or error.message)


@contextmanager
def _as_user_error(url: str) -> Iterator[None]:
    """Turn the client's exceptions into UserErrors."""
    try:
        yield
    except openai.APIError as error:
        remedy = REMEDIES.get(getattr(error, "status_code", 0), CHECK_LOG)
        raise UserError(f"server: {url}: {_server_message(error)[:300]}; {remedy}") from None
    except (AttributeError, IndexError, TypeError, ValueError):
        why = f"{url} does not answer as OpenAI's API does"
        raise UserError(f"server: {why}; {CHECK_ADDRESS}") from None


def model_name(url: str, model: str) -> str:
    """Return the model; if it is "", the only one of the server, or UserError if it has others."""
    if model:
        return model
    with _client(openai.OpenAI, url) as client, _as_user_error(url):
        names = [entry.id for entry in client.models.list().data]
    if len(names) != 1:
        raise UserError(f"model: name one of those at {url}: {', '.join(names) or 'it lists none'}")
    return names[0]


def _dialects(sampling: Sampling) -> list[dict[str, Any]]:
    """Return request fields for what OpenAI's API lacks, per kind of server, in order of trial."""
    top_k, penalty = sampling.top_k, sampling.repetition_penalty
    both = {"min_p": 0, "repetition_penalty": penalty}
    fields = both | {
        "top_k": top_k or -1,  # For vLLM and SGLang, which ignore the rest; some refuse 0.
        "repeat_penalty": penalty,  # For llama.cpp, which ignores the others.
        "repeat_last_n": 2**17,  # Longer than any context; some versions refuse -1.
        "samplers": ["penalties", "temperature", "top_k", "top_p"],  # in transformers' order
    }
    # For transformers serve, which is greedy by default.
    config = json.dumps(both | {"top_k": top_k, "do_sample": sampling.temperature > 0})
    # Without these fields a completion is right only if top_k and the penalty are off.
    off: list[dict[str, Any]] = [{}] if top_k == 0 and penalty == 1 else []
    return [fields, {"generation_config": config}, *off]


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
    """Request a completion for each prompt: text raw, messages through the chat template.

    Args:
        seeds: one for each prompt, of which servers get 31 bits.
        on_done: called as completions arrive, in any order, with the prompt's index, the text, its
            length in tokens if the server says, and whether it ended by itself.
    """
    dialects, pending = _dialects(sampling), iter(range(len(prompts)))
    common: dict[str, Any] = {"model": model, "temperature": sampling.temperature}
    common |= {"top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens}
    common["stop"] = list(sampling.stop) or None
    chat_fields = {"chat_template_kwargs": dict(template_kwargs)} if template_kwargs else {}

    async def ask(create: Any, fields: dict[str, Any], extra: dict[str, Any]) -> Any:
        while dialects:
            dialect = dialects[0]
            try:
                return await create(**fields, extra_body=dialect | extra)
            except openai.APIStatusError as error:
                said = _server_message(error).lower()
                if not UNKNOWN_FIELD.search(said) or not any(field in said for field in dialect):
                    raise
                if dialect in dialects:  # Another request may have removed it meanwhile.
                    dialects.remove(dialect)
        remedy = "set sampling.top_k 0 and sampling.repetition_penalty 1"
        raise UserError(f"server: {url} takes no top_k or repetition_penalty; {remedy}")

    async def work(client: Any) -> None:
        for i in pending:
            raw = isinstance(prompts[i], str)
            fields = common | {"prompt" if raw else "messages": prompts[i]}
            fields["seed"] = seeds[i] % 2**31
            with _as_user_error(url):
                create = (client if raw else client.chat).completions.create
                answer = await ask(create, fields, {} if raw else chat_fields)
                choice, usage = answer.choices[0], answer.usage
                text = choice.text if raw else choice.message.content
                tokens = usage.completion_tokens if usage else None
                ended = choice.finish_reason != "length"
            on_done(i, text or "", tokens, ended)

    async def work_in_parallel() -> None:
        async with _client(openai.AsyncOpenAI, url) as client:
            await asyncio.gather(*(work(client) for _ in range(parallel)))

    asyncio.run(work_in_parallel())
