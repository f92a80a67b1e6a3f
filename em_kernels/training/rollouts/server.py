"""Completions from a server of OpenAI's API: vLLM's, SGLang's, llama.cpp's, transformers serve.

Every sampling field is sent: for a missing one servers take the model's generation_config.
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

RETRIES = 4  # the client's own, which take about 7 s
TIMEOUT_S = 3600  # a long completion, behind others in the server's queue
UNKNOWN_FIELD = re.compile("unexpected|unrecogni[sz]ed|unknown|not permitted|unsupported")
READ = "shorten the prompt, lower sampling.max_new_tokens, or name a model it serves, as it says"
KEY = "set OPENAI_API_KEY to a key it takes"
ADDRESS = "check the address, and that the model is one it serves"
RUNNING = "is it running there? See its log, then run this again"
OFF = "set sampling.top_k 0 and sampling.repetition_penalty 1"
REMEDIES = {400: READ, 401: KEY, 403: KEY, 404: ADDRESS, 422: READ}


def _client(kind: Any, url: str) -> Any:
    """An openai.OpenAI, or of another kind."""
    address = url if "://" in url else f"http://{url}"
    try:
        return kind(
            base_url=address.rstrip("/").removesuffix("/v1") + "/v1",
            api_key=os.environ.get("OPENAI_API_KEY") or "none",  # local servers want none
            max_retries=RETRIES,
            timeout=openai.Timeout(TIMEOUT_S, connect=10),
        )
    except Exception as error:  # InvalidURL, of whichever httpx it uses
        raise UserError(f"server: {url}: {error}; an address is http://HOST:PORT") from None


def _said(error: openai.APIError) -> str:
    """The server's error message, in one line."""
    body = error.body
    if isinstance(body, dict):  # OpenAI's API has a message, FastAPI a detail
        body = body.get("message") or body.get("detail") or body
    return in_one_line(body or error.__cause__ or error.message)


@contextmanager
def _in_one_line(url: str) -> Iterator[None]:
    """Turn the client's exceptions into UserErrors."""
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
    with _client(openai.OpenAI, url) as client, _in_one_line(url):
        names = [entry.id for entry in client.models.list().data]
    if len(names) != 1:
        raise UserError(f"model: name one of those at {url}: {', '.join(names) or 'it lists none'}")
    return names[0]


def _ways(sampling: Sampling) -> list[dict[str, Any]]:
    """How servers are told what OpenAI's API has no field for, in the order to try."""
    top_k, penalty = sampling.top_k, sampling.repetition_penalty
    both = {"min_p": 0, "repetition_penalty": penalty}
    fields = both | {
        "top_k": top_k or -1,  # vLLM and SGLang, which pass over the rest; some versions refuse 0
        "repeat_penalty": penalty,  # llama.cpp, which does so too
        "repeat_last_n": 2**17,  # any context; some versions refuse -1
        "samplers": ["penalties", "temperature", "top_k", "top_p"],  # transformers' order
    }
    # transformers serve, which is greedy unless told otherwise
    config = json.dumps(both | {"top_k": top_k, "do_sample": sampling.temperature > 0})
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
    """A completion for each prompt: a text is completed as it is, messages by the chat template.

    Args:
        seeds: one for each prompt; servers get 31 bits of it.
        parallel: requests at a time.
        on_done: called as completions arrive, in any order, with the prompt's index, the text, its
            tokens where the server counts them, and whether it ended by itself.

    Raises: UserError for a server that cannot be reached, refuses a request or keeps failing.
    """
    ways, left = _ways(sampling), iter(range(len(prompts)))
    common: dict[str, Any] = {"model": model, "temperature": sampling.temperature}
    common |= {"top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens}
    common["stop"] = list(sampling.stop) or None
    of_chat = {"chat_template_kwargs": dict(template_kwargs)} if template_kwargs else {}

    async def ask(create: Any, fields: dict[str, Any], extra: dict[str, Any]) -> Any:
        while ways:
            way = ways[0]
            try:
                return await create(**fields, extra_body=way | extra)
            except openai.APIStatusError as error:
                said = _said(error).lower()
                if not UNKNOWN_FIELD.search(said) or not any(field in said for field in way):
                    raise
                if way in ways:
                    ways.remove(way)
        raise UserError(f"server: {url} has no top_k or repetition_penalty; {OFF}")

    async def work(client: Any) -> None:
        for i in left:
            raw = isinstance(prompts[i], str)
            fields = common | {"prompt" if raw else "messages": prompts[i]}
            fields["seed"] = seeds[i] % 2**31
            with _in_one_line(url):
                create = (client if raw else client.chat).completions.create
                said = await ask(create, fields, {} if raw else of_chat)
                choice, usage = said.choices[0], said.usage
                text = choice.text if raw else choice.message.content
                tokens = usage.completion_tokens if usage else None
                ended = choice.finish_reason != "length"
            on_done(i, text or "", tokens, ended)

    async def everything() -> None:
        async with _client(openai.AsyncOpenAI, url) as client:
            await asyncio.gather(*(work(client) for _ in range(parallel)))

    asyncio.run(everything())
