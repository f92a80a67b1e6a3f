"""Rows of data files as problems: the columns that hold the prompt, its choices and the answer."""

import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias

from ..settings import UserError, has_surrogates
from .math_verify_grading import boxed

# In each list the first column with a value counts; capitals do not matter.
PROMPT_COLUMNS = (
    *("problem", "question", "prompt", "query", "instruction"),
    *(TRANSCRIPTS := ("messages", "conversations")),  # which may end with the reply
)
ANSWER_COLUMNS = ("answer", "final_answer", "expected_answer", "ground_truth")
CHOICE_COLUMNS = ("choices", "options")
KEY_COLUMNS = (*ANSWER_COLUMNS, "answerkey", "answer_index", "answer_idx", "correct", "gold")
JOINED = {"question": ("body", "question"), "instruction": ("instruction", "input")}
NO_ANSWER = ("proof", "notfound")  # NuminaMath-1.5 has them in place of an answer
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
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


class Columns(NamedTuple):
    """The columns that the user names; None: the usual ones."""

    prompt: str | None = None
    answer: str | None = None


USUAL = Columns()


class UnusableRow(ValueError):
    """A row without a prompt that a model can be asked; the text says why."""


def problem_of(row: Any, columns: Columns = USUAL) -> Problem:
    """Return a row's prompt and answer, from the named columns or the usual ones.

    Raises: UnusableRow.
    """
    if not isinstance(row, dict):
        raise UnusableRow(f"a row is {type(row).__name__}, not an object")
    row = _lowered(row, columns)
    known = (columns.prompt.lower(),) if columns.prompt else PROMPT_COLUMNS
    name = next((name for name in known if row.get(name)), known[0])
    prompt, replies = row.get(name), list[str]()
    if isinstance(prompt, list):
        prompt, replies = _conversation(prompt, name in TRANSCRIPTS)
    halves = [row.get(half) for half in JOINED.get(name, ()) if not columns.prompt]
    is_joined = bool(halves) and all(isinstance(half, str) and half.strip() for half in halves)
    prompt = "\n".join(map(str, halves)) if is_joined else prompt
    texts = texts_of(prompt) if isinstance(prompt, (str, list)) else []
    if not any(text.strip() for text in texts):
        which = f"any of the columns {', '.join(known)}" if len(known) > 1 else f"column {known[0]}"
        raise UnusableRow(f"a row has no text in {which}")
    if any(not text.isprintable() and has_surrogates(text) for text in texts):
        raise UnusableRow("the prompt is not text in UTF-8")
    if choices := _choices(row):
        names = (columns.answer.lower(),) if columns.answer else KEY_COLUMNS
        letters = [_letter(row.get(name), choices) for name in names]
        return Problem(_with_choices(prompt, choices), next(filter(None, letters), None))
    answer = _answer(row, columns, replies)
    if is_joined:  # ASDiv writes the unit behind: 3 (apples)
        answer = re.sub(r"^([-\d.,/]+) *\([^()]*\)$", r"\1", answer or "") or None
    return Problem(prompt, answer)


def check_columns(rows: Sequence[Any], columns: Columns, source: object) -> None:
    """Raise UserError if no row has a column that the user named."""
    names = dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)
    for setting, asked in columns._asdict().items():
        if rows and asked and asked.lower() not in _lowered(names, columns):
            has = f"it has {', '.join(names)}" if names else "its rows have none"
            raise UserError(f"{setting}_column: {source} has no column {asked!r}; {has}")


def as_answer(value: Any) -> str | None:
    """Return a data file's answer as text; None for a missing value (tables use NaN), a truth
    value or an object without an answer.

    A list is joined; a worked solution is cut to the answer that it marks.
    """
    if isinstance(value, str) and value.startswith(('["', '{"')):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, dict):
        row = _lowered(value, USUAL)
        return next(filter(None, (as_answer(row.get(name)) for name in ANSWER_COLUMNS)), None)
    if isinstance(value, list):
        parts = [as_answer(part) or "" for part in value]
        return ", ".join(parts) if all(parts) else None
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return None
    text = str(value)
    marked = _marked(text)
    text = text.strip() if marked is None else marked
    return None if text.lower() in NO_ANSWER or has_surrogates(text) else text or None


def with_system(prompt: str | Conversation, system: str | None) -> str | Conversation:
    """Put a system message first, in place of the prompt's own; an empty text only removes that,
    None changes nothing.
    """
    if system is None:
        return prompt
    own = [message for message in messages_of(prompt) if message["role"] != "system"]
    return _simplest([{"role": "system", "content": system}, *own] if system else own) or prompt


def texts_of(prompt: str | Conversation) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]


def messages_of(prompt: str | Conversation) -> Conversation:
    """Return the messages that a chat template gets."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _lowered(row: dict[Any, Any], columns: Columns) -> dict[str, Any]:
    """Return a row by lower-case names. Of names that differ in capitals alone the one that the
    user named wins, then the one without.
    """
    names = sorted(row, key=lambda name: (name in columns, str(name).islower()))
    return {str(name).strip().lower(): row[name] for name in names}


def _conversation(
    messages: list[Any], is_transcript: bool
) -> "tuple[str | Conversation, list[str]]":
    """Return messages as a chat template takes them, each content as one text; and, apart from
    them, what the assistant says at the end of a transcript.
    """
    if all(
        isinstance(part, dict) and {"role", "from", "type"} & {*part} == {"type"}
        for part in messages
    ):
        messages = [{"role": "user", "content": messages}]  # parts of one message
    kept: Conversation = []
    for message in messages:
        role = isinstance(message, dict) and (message.get("role") or message.get("from"))
        if not isinstance(role, str):
            raise UnusableRow("a message of the conversation has no role")
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) else part for part in content]
            if not all(isinstance(text, str) for text in texts):
                raise UnusableRow("a message has a part that is not text")
            content = "".join(map(str, texts))
        if not isinstance(content, str | None):
            raise UnusableRow("a message's content is not text")
        given = {key: value for key, value in message.items() if value is not None}
        given = {key: value for key, value in given.items() if key not in ("from", "value")}
        kept.append({**given, "role": ROLES.get(role, role), "content": content or ""})
    replies = []
    while is_transcript and kept and kept[-1]["role"] == "assistant":
        replies.append(kept.pop()["content"])
    return _simplest(kept), replies


def _simplest(messages: Conversation) -> str | Conversation:
    """Return the text alone of a single user message."""
    if len(messages) == 1 and messages == messages_of(messages[0]["content"]):
        return messages[0]["content"]
    return messages


def _answer(row: dict[str, Any], columns: Columns, replies: Sequence[str]) -> str | None:
    """Return the answer in a row's named column, or in the usual ones or a worked solution."""
    if columns.answer:
        return as_answer(row.get(columns.answer.lower()))
    reward = row.get("reward_model")
    row = {**row, **(_lowered(reward, columns) if isinstance(reward, dict) else {})}
    for value in (row.get(name) for name in ANSWER_COLUMNS):
        if str(value).strip().lower() in NO_ANSWER:
            return None  # whatever the solution has in a box
        if answer := as_answer(value):
            return answer
    solution = row.get("solution")
    worked = [text for text in (solution, *replies) if isinstance(text, str)]
    if marked := next(filter(None, map(_marked, worked)), None):
        return marked
    is_number = isinstance(solution, int | float)
    is_formula = isinstance(solution, str) and _is_formula(solution)
    return as_answer(solution) if is_number or is_formula else None


def _marked(text: str) -> str | None:
    """Return the answer that a worked solution marks: behind "####" (GSM8K), in the last box, or
    behind "The answer is" (MetaMath).
    """
    if "####" in text:
        return text.split("####")[-1].strip()
    if box := boxed(text):
        return box
    _, *ends = re.split(r"\b[Tt]he answer is:?\s", text)
    if ends and ends[-1].strip() and _is_formula(ends[-1]):
        return ends[-1].strip().removesuffix(".")
    return None


def _is_formula(text: str) -> bool:
    """Return True for a short text without words, such as 128 or $4$, which needs no marking."""
    text = re.sub(r"\\[A-Za-z]+(?:\s*\{[A-Za-z .*]*\})?", "", text.strip())
    words = re.search(r"[^\W\d_]{3,}|[^\W\d_]+\s+[^\W\d_]+", text)
    return words is None and len(text) <= 100 and "\n" not in text


class _Choice(NamedTuple):
    """One choice of a multiple-choice problem."""

    label: str  # the data's own name of it
    value: Any  # as the data has it
    text: str  # without a letter before it


def _choices(row: dict[str, Any]) -> list[_Choice]:
    """Return a row's choices; empty if it has none."""
    given: Any = next((row[name] for name in CHOICE_COLUMNS if row.get(name)), [])
    labels: Any = LETTERS
    if isinstance(given, dict) and "text" in given:  # ARC: a list of texts, one of labels
        given, labels = given["text"], given.get("label") or LETTERS
    elif isinstance(given, dict):  # MedQA: texts by label; a table has null for the others' labels
        given = {label: text for label, text in given.items() if text is not None}
        given, labels = list(given.values()), list(given)
    is_list = isinstance(given, list) and len(given) <= min(len(labels), len(LETTERS))
    if not is_list or not all(isinstance(value, str | int | float) for value in given):
        raise UnusableRow(f"its choices are no list of up to {len(LETTERS)} texts")
    texts = [str(value).strip() for value in given]
    begun = [
        re.match(rf"\(?{re.escape(a)}\s*[).:]\s*", t) for a, t in zip(LETTERS, texts, strict=False)
    ]
    if all(begun):  # AQuA: A)21
        texts = [text[len(match[0]) :] for text, match in zip(texts, begun, strict=True) if match]
    rows = zip(labels, given, texts, strict=False)
    return [_Choice(str(label), value, text) for label, value, text in rows]


def _with_choices(prompt: str | Conversation, choices: Sequence[_Choice]) -> str | Conversation:
    """Add lettered choices to the last message, unless the prompt has them already."""
    whole = " ".join(texts_of(prompt))
    lettered = list(zip(LETTERS, choices, strict=False))
    if all(re.search(rf"\b{a}\W{{1,4}}{re.escape(c.text)}", whole) for a, c in lettered):
        return prompt
    lines = "".join(f"\n({letter}) {choice.text}" for letter, choice in lettered)
    if isinstance(prompt, str):
        return prompt + lines
    return [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + lines}]


def _letter(value: Any, choices: Sequence[_Choice]) -> str | None:
    """Return the letter of the right choice, which the data names by letter or label, by its
    text, or by its index from 0.
    """
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if (text := as_answer(value)) is None:
        return None
    value = text if isinstance(value, str) else value
    for i, choice in enumerate(choices):
        if isinstance(value, str) and text.strip("(). ").lower() == choice.label.lower():
            return LETTERS[i]
    for i, choice in enumerate(choices):
        if type(choice.value) is type(value) and value in (choice.value, choice.text):
            return LETTERS[i]
    index = int(text.removesuffix(".0")) if re.fullmatch(r"\d{1,2}(\.0)?", text) else len(choices)
    return LETTERS[index] if index < len(choices) else None
