"""Problems (prompts with answers) from files, the hub or generators, and their token ids."""

import difflib
import json
import math
import random
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import yaml
from transformers import PreTrainedTokenizerBase

from ..config import TrainConfig
from ..presets import ADDITION_SHOTS
from ..settings import UserError, has_surrogates, in_one_line
from .grading import boxed

PROMPT_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "final_answer", "ground_truth")
# The prompt of Qwen2.5-Math's evaluation, and of the paper's.
QWEN25_MATH_COT = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within "
    "\\boxed{{}}.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
Conversation: TypeAlias = list[dict[str, Any]]  # messages whose contents are text


class Problem(NamedTuple):
    """A prompt, its answer if known, and how a worked example writes the answer."""

    prompt: str | Conversation  # A single user message is stored as its text.
    answer: str | None = None
    worked: str | None = None

    @property
    def completion(self) -> str:
        """Return the text that follows "A:" in a worked example."""
        return f" {self.worked or self.answer}\n"


def read_rows(path: Path, setting: str = "prompt_from") -> list[dict[str, Any]]:
    """Read the rows of a .jsonl, .json or .parquet file that a setting names."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        if path.suffix in (".jsonl", ".json"):
            text = path.read_text(encoding="utf-8-sig")
            if text.lstrip().startswith("["):
                return json.loads(text)
            return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: deep nesting
        raise UserError(f"{setting}: cannot read {path}: {in_one_line(error)}") from error
    raise UserError(f"{setting}: {path} is neither .jsonl nor .parquet")


def as_problem(row: Any, where: object, setting: str = "prompt_from") -> Problem:
    """Return a row's prompt and answer, whichever of the usual columns hold them."""
    if not isinstance(row, dict):
        raise UserError(f"{setting}: {where}: a row is {type(row).__name__}, not an object")
    prompt: Any = next((row[name] for name in PROMPT_COLUMNS if row.get(name)), None)
    if isinstance(prompt, list):
        prompt = _conversation(prompt, f"{setting}: {where}")
    texts = texts_of(prompt) if isinstance(prompt, (str, list)) else []
    if not any(text.strip() for text in texts):
        known = ", ".join(PROMPT_COLUMNS)
        raise UserError(f"{setting}: {where}: a row has no text in any of the columns {known}")
    if any(not text.isprintable() and has_surrogates(text) for text in texts):
        raise UserError(f"{setting}: {where}: the prompt is not text in UTF-8")
    reward = row.get("reward_model")
    answers = {**row, **(reward if isinstance(reward, dict) else {})}
    given = [as_answer(answers.get(name)) for name in ANSWER_COLUMNS]
    if isinstance(solution := row.get("solution"), str):  # Minerva
        given.append(boxed(solution))
    return Problem(prompt, next(filter(None, given), None))


def as_answer(value: Any) -> str | None:
    """Return a data file's answer as text: a list is joined, a GSM8K solution is cut to what
    follows "####". None for a missing value (tables use NaN), a truth value or an object.
    """
    if isinstance(value, list):
        parts = [as_answer(part) or "" for part in value]
        return ", ".join(parts) if all(parts) else None
    missing = isinstance(value, float | Decimal) and not math.isfinite(value)
    if missing or isinstance(value, bool | dict | None):
        return None
    return str(value).split("####")[-1].strip()


def _conversation(messages: list[Any], where: str) -> str | Conversation:
    """Return messages as a chat template takes them, each content as one text."""
    kept: Conversation = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{where}: a message of the conversation has no role")
        content = message.get("content")
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) else part for part in content]
            if not all(isinstance(text, str) for text in texts):
                raise UserError(f"{where}: a message has a part that is not text")
            content = "".join(map(str, texts))
        if not isinstance(content, str | None):
            raise UserError(f"{where}: a message's content is not text")
        given = {key: value for key, value in message.items() if value is not None}
        kept.append({**given, "content": content or ""})
    if len(kept) == 1 and kept == [{"role": "user", "content": kept[0]["content"]}]:
        return kept[0]["content"]
    return kept


def texts_of(prompt: str | Conversation) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]


def problems_of(config: TrainConfig) -> list[Problem]:
    """Return the problems that a run trains on."""
    if config.prompt is not None:
        return [Problem(config.prompt, config.answer)]
    path = config.prompt_from
    assert path is not None
    rows = read_rows(path)
    for row in config.prompt_rows:
        if row >= len(rows):
            raise UserError(f"prompt_rows: {row} is not in {path}, which has {len(rows)} rows")
    return [as_problem(rows[row], f"{path}, row {row}") for row in config.prompt_rows]


def read_problems(
    source: str,
    *,
    subset: str | None = None,
    split: str = "test",
    count: int | None,  # None: all, or 1000 of a generator
    more: int = 0,  # problems beyond those, for worked examples and to skip
    seed: int = 0,
) -> list[Problem]:
    """Return problems of a file, "addition", "gym:NAME" (reasoning-gym) or a dataset of the hub."""
    generated = source == "addition" or source.startswith("gym:")
    if generated or count is not None:
        count = (count or 1000) + more
    if source == "addition":
        rng = random.Random(seed)
        pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
        pairs = [pair for pair in pairs if pair not in ADDITION_SHOTS]
        pairs = [*ADDITION_SHOTS, *rng.sample(pairs, len(pairs))]
        sums = [(f"{a} + {b}", str(a + b)) for a, b in pairs]
        found = [Problem(f"What is {task}?", total, f"{task} = {total}") for task, total in sums]
    elif generated:
        assert count is not None
        found = _gym(source.removeprefix("gym:"), count, seed)
    else:
        path = Path(source).expanduser()
        is_file = path.suffix in (".parquet", ".jsonl", ".json") or path.is_file()
        rows = read_rows(path, "data") if is_file else _hub(source, subset, split)
        found = [as_problem(row, f"{source}, row {i}", "data") for i, row in enumerate(rows)]
    if count is not None and len(found) < count:
        raise UserError(f"count: {source} has {len(found)} problems, {count} are asked for")
    if not found:
        raise UserError(f"data: {source} has no rows")
    return found[:count]


def _gym(name: str, count: int, seed: int) -> list[Problem]:
    import reasoning_gym
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS

    task, _, text = name.partition("?")
    try:
        pairs = urllib.parse.parse_qsl(text, strict_parsing=True) if text else []
        settings = {key: yaml.safe_load(value) for key, value in pairs}
    except (ValueError, yaml.YAMLError) as error:
        why = f"is not TASK?setting=value&...: {in_one_line(error)}"
        raise UserError(f"data: gym:{name} {why}") from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3) or sorted(DATASETS)
        raise UserError(f"data: reasoning-gym has no task {task!r}; it has {', '.join(near)}")
    found: dict[str, Problem] = {}  # A small task repeats itself.
    try:
        # Problem i has seed start + i: with start = seed, nearby seeds would share problems.
        start = random.Random(seed).getrandbits(31)
        items = reasoning_gym.create_dataset(task, size=20 * count, seed=start, **settings)
    except (AssertionError, TypeError) as error:
        raise UserError(f"data: gym:{name}: {error}") from error
    judges = type(items).score_answer is not ProceduralDataset.score_answer
    for item in items:
        question, answer = item["question"].strip(), str(item["answer"]).strip()
        # If a task judges answers itself, only a number or a word is sure to be the only right one.
        if item["answer"] is None or (judges and not re.fullmatch(r"-?[\d.]+|[A-Za-z]+", answer)):
            raise UserError(f"data: gym:{task} has no one right answer to compare with")
        found.setdefault(question, Problem(question, answer))
        if len(found) == count:
            break
    return list(found.values())


def _hub(name: str, subset: str | None, split: str) -> list[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, subset, split=split).to_list()
    except Exception as error:  # datasets and the hub client raise many kinds.
        raise UserError(f"data: cannot open {name}: {in_one_line(error)[:300]}") from error


def few_shot(shots: Sequence[Problem], problem: Problem) -> str:
    """Return worked examples and the problem as a raw prompt that ends where the answer begins."""
    if not all(isinstance(p.prompt, str) for p in (*shots, problem)):
        raise UserError("template: few-shot takes prompts of one text, not conversations; use chat")
    examples = "".join(f"Q: {shot.prompt}\nA:{shot.completion}\n" for shot in shots)
    return f"{examples}Q: {problem.prompt}\nA:"


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Conversation,
    chat_template: bool,
    template_kwargs: Mapping[str, Any] = {},
) -> list[int]:
    """Return a prompt's token ids, raw or through the chat template; a conversation that ends with
    the assistant's words is left open, so that the completion continues them.
    """
    if not chat_template:
        if not isinstance(prompt, str):
            why = f"is a conversation of {len(prompt)} messages, which only a chat template joins"
            raise UserError(f"prompt: {why}; use the model's, or give one text")
        return tokenised(tokenizer, prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    begun = messages[-1]["role"] == "assistant"
    settings: dict[str, Any] = {"add_generation_prompt": not begun, "continue_final_message": begun}
    settings |= {**template_kwargs, "tokenize": False}
    try:
        text = tokenizer.apply_chat_template(messages, **settings)
    except Exception as error:  # A template may raise anything.
        why = f"it refuses the prompt: {in_one_line(error)}"
        raise UserError(f"chat_template: {why}; change the prompt or template_kwargs") from error
    for message in messages if messages is prompt else ():
        # Templates drop the thoughts before an answer.
        content = message["content"].rpartition("</think>")[2].strip()
        if content not in text:
            why = f"the chat template leaves out what the {message['role']} says"
            raise UserError(f"prompt: {why}; say it in a user's message, or use no chat template")
    return tokenizer(text, add_special_tokens=False).input_ids


def tokenised(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return a raw prompt's token ids; without a final EOS, which would begin another text."""
    ids, written = tokenizer(text).input_ids, tokenizer(text, add_special_tokens=False).input_ids
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id}

    def at_end(ids: list[int]) -> int:
        return len(list(takewhile(ends.__contains__, reversed(ids))))

    return ids[: len(ids) - max(0, at_end(ids) - at_end(written))]
