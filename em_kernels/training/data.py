"""Problems: prompts, and answers where they are known, from text, .jsonl and .parquet files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .config import TrainConfig, UserError

PROMPT_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "final_answer", "ground_truth")


@dataclass(frozen=True)
class Problem:
    """A prompt, and its answer where it is known."""

    prompt: str
    answer: str | None = None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl or .parquet file."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        if path.suffix in (".jsonl", ".json"):
            lines = path.read_text(encoding="utf-8").split("\n")
            return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:  # pyarrow's and json's errors are ValueErrors
        reason = " ".join(str(error).split())
        raise UserError(f"prompt_from: cannot read {path}: {reason}") from error
    raise UserError(f"prompt_from: {path} is neither .jsonl nor .parquet")


def as_problem(row: Any, path: Path) -> Problem:
    """The prompt and answer of a row, whichever of the usual columns hold them."""
    if not isinstance(row, dict):
        raise UserError(f"prompt_from: {path}: a row is {type(row).__name__}, not an object")
    prompt = next((row[name] for name in PROMPT_COLUMNS if row.get(name)), None)
    if isinstance(prompt, list):  # chat messages, as in the parquet files of RLVR projects
        messages = [m for m in reversed(prompt) if isinstance(m, dict)]
        prompt = next((m.get("content") for m in messages if m.get("role") == "user"), None)
    if not isinstance(prompt, str) or not prompt.strip():
        known = ", ".join(PROMPT_COLUMNS)
        raise UserError(f"prompt_from: {path}: a row has no text in any of the columns {known}")
    reward = row.get("reward_model")
    answers = {**row, **(reward if isinstance(reward, dict) else {})}
    answer = next((answers[n] for n in ANSWER_COLUMNS if answers.get(n) is not None), None)
    if isinstance(answer, list):
        answer = answer[0] if answer else None
    return Problem(prompt, None if answer is None else str(answer).split("####")[-1].strip())


def problems_of(config: TrainConfig) -> list[Problem]:
    """The problems that a run trains on."""
    if config.prompt is not None:
        return [Problem(config.prompt, config.answer)]
    assert config.prompt_from is not None
    rows = read_rows(config.prompt_from)
    for row in config.prompt_rows:
        if row >= len(rows):
            raise UserError(
                f"prompt_rows: {row} is not in {config.prompt_from}, which has {len(rows)} rows"
            )
    return [as_problem(rows[row], config.prompt_from) for row in config.prompt_rows]


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat_template: bool) -> list[int]:
    """Token ids of a prompt, tokenised whole; as a user message where a chat template is wanted."""
    if not chat_template:
        return tokenizer(prompt).input_ids
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False).input_ids
