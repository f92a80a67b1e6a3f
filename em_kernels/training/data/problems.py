"""Problems (prompts with answers) from files, the hub or generators, and their token ids."""

import difflib
import json
import random
import re
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from ..config import TrainConfig
from ..presets import ADDITION_SHOTS
from ..settings import UserError, in_one_line
from .columns import (
    USUAL,
    Columns,
    Conversation,
    Problem,
    UnusableRow,
    check_columns,
    messages_of,
    problem_of,
    with_system,
)

READ_ROWS = 1024  # that are read at a time
# The prompt of Qwen2.5-Math's evaluation, and of the paper's.
QWEN25_MATH_COT = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within "
    "\\boxed{{}}.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def read_rows(
    path: Path, setting: str = "prompt_from", count: int | None = None
) -> list[dict[str, Any]]:
    """Read the first `count` rows, or all, of a .jsonl, .json or .parquet file that a setting
    names.
    """
    rows: list[dict[str, Any]] = []
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=min(count or READ_ROWS, READ_ROWS)):
                    rows += batch.to_pylist()
                    if count is not None and len(rows) >= count:
                        break
            return rows[:count]
        if path.suffix in (".jsonl", ".json"):
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    if text.strip() and not rows and text.lstrip().startswith("["):
                        return json.loads(text + file.read().decode())[:count]
                    if text.strip():
                        rows.append(_json_line(text, number))
                    if count is not None and len(rows) >= count:
                        break
            return rows
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: deep nesting
        raise UserError(f"{setting}: cannot read {path}: {in_one_line(error)}") from error
    raise UserError(f"{setting}: {path} is neither .jsonl nor .parquet")


def _json_line(text: str, number: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def as_problem(
    row: Any, where: object, setting: str = "prompt_from", columns: Columns = USUAL
) -> Problem:
    """Return a row's prompt and answer; UserError, naming its place, if it has no prompt."""
    try:
        return problem_of(row, columns)
    except UnusableRow as error:
        raise UserError(f"{setting}: {where}: {error}") from error


def problems_of(config: TrainConfig) -> list[Problem]:
    """Return the problems that a run trains on."""
    if config.prompt is not None:
        return [Problem(with_system(config.prompt, config.system), config.answer)]
    path = config.prompt_from
    assert path is not None
    rows = read_rows(path, count=max(config.prompt_rows) + 1)
    for row in config.prompt_rows:
        if row >= len(rows):
            raise UserError(f"prompt_rows: {row} is not in {path}, which has {len(rows)} rows")
    columns = Columns(config.prompt_column, config.answer_column)
    check_columns([rows[row] for row in config.prompt_rows], columns, path)
    found = []
    for row in config.prompt_rows:
        problem = as_problem(rows[row], f"{path}, row {row}", columns=columns)
        prompt, answer = with_system(problem.prompt, config.system), config.answer
        found.append(Problem(prompt, problem.answer if answer is None else answer))
    return found


def read_problems(
    source: str,
    *,
    subset: str | None = None,
    split: str = "test",
    count: int | None,  # None: all, or 1000 of a generator
    more: int = 0,  # problems beyond those, for worked examples and to skip
    seed: int = 0,
    columns: Columns = USUAL,
    system: str | None = None,
    fewer: bool = False,  # take a source that has fewer than `count`
) -> list[Problem | UnusableRow]:
    """Return problems of a file, "addition", "gym:NAME" (reasoning-gym) or a dataset of the hub;
    in place of a row without a prompt, why it has none.
    """
    generated = source == "addition" or source.startswith("gym:")
    found: list[Problem | UnusableRow]
    if generated or count is not None:
        count = (count or 1000) + more
    if generated and columns != USUAL:
        setting = "prompt_column" if columns.prompt else "answer_column"
        raise UserError(f"{setting}: goes with a file or a hub dataset, not with {source}")
    if source == "addition":
        rng = random.Random(seed)
        pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
        pairs = [pair for pair in pairs if pair not in ADDITION_SHOTS]
        pairs = [*ADDITION_SHOTS, *rng.sample(pairs, len(pairs))]
        sums = [(f"{a} + {b}", str(a + b)) for a, b in pairs]
        found = [Problem(f"What is {task}?", total, f"{task} = {total}") for task, total in sums]
    elif generated:
        assert count is not None
        found = [*_gym(source.removeprefix("gym:"), count, seed)]
    else:
        path = Path(source).expanduser()
        is_file = path.suffix in (".parquet", ".jsonl", ".json") or path.is_file()
        rows = read_rows(path, "data", count) if is_file else _hub(source, subset, split, count)
        found = _of_rows(rows, columns, source)
    if count is not None and len(found) < count and not fewer:
        raise UserError(f"count: {source} has {len(found)} problems, {count} are asked for")
    if not found:
        raise UserError(f"data: {source} has no rows")
    return [
        row
        if isinstance(row, UnusableRow)
        else row._replace(prompt=with_system(row.prompt, system))
        for row in found[:count]
    ]


def _of_rows(rows: list[Any], columns: Columns, source: str) -> list[Problem | UnusableRow]:
    """Return the rows' problems; UserError if not one row has a prompt."""
    check_columns(rows, columns, source)
    found: list[Problem | UnusableRow] = []
    for row in rows:
        try:
            found.append(problem_of(row, columns))
        except UnusableRow as error:
            found.append(error)
    if rows and all(isinstance(row, UnusableRow) for row in found):
        names = dict.fromkeys(str(name) for row in rows if isinstance(row, dict) for name in row)
        has = f"; its columns are {', '.join(names)}: name one with prompt_column" if names else ""
        reasons = counted(str(row) for row in found)
        raise UserError(f"data: none of {source}'s {len(rows)} rows can be used: {reasons}{has}")
    return found


def counted(reasons: Iterable[str]) -> str:
    """Return each reason with its number in brackets, the most frequent first."""
    return ", ".join(f"{reason} ({n})" for reason, n in Counter(reasons).most_common())


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


def _hub(name: str, subset: str | None, split: str, count: int | None) -> list[dict[str, Any]]:
    """Return the first `count` rows of a dataset, streamed; or all."""
    import datasets

    datasets.disable_progress_bars()
    # Only a whole download is in the cache, and only that knows slices such as test[:50].
    offline = datasets.config.HF_HUB_OFFLINE
    streams = count is not None and not offline and re.fullmatch(r"\w+", split) is not None
    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=streams)
        if not streams:
            return rows.select(range(min(len(rows), count or len(rows)))).to_list()
        # Pictures are not decoded, as no prompt has them. take() would open the next file, too.
        return list(islice(rows.decode(False) if rows.features else rows, count))
    except Exception as error:  # datasets and the hub client raise many kinds.
        splits: list[str] = []
        with suppress(Exception):
            splits = datasets.get_dataset_split_names(name, subset)
        if splits and re.split(r"\W", split)[0] not in splits:
            has = f"has no split {split!r}, but {', '.join(splits)}"
            raise UserError(f"split: {name} {has}; add --split {splits[0]}") from error
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
    messages = messages_of(prompt)
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
