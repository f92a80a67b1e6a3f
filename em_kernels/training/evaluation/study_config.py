"""Settings of a study."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from ..config import Sampling
from ..settings import Positive
from .evaluate import Temperatures
from .task import TaskSettings


class StudyConfig(TaskSettings):
    """Test whether the choice of the prompt matters, and whether training does more than a lower
    sampling temperature: train a model on many prompts, one at a time, and compare.
    """

    model: str = "demo"
    """Hub id, local folder, or "demo" (135M)."""
    data: str = "addition"
    """Problems with answers: a .jsonl or .parquet file, a hub dataset (owner/name), "addition", or
    gym:TASK[?setting=value&...] (a reasoning-gym task).
    """
    count: Positive | None = None
    """Not for a study: it takes --pool and --held-out problems."""
    template: Annotated[str, Field(pattern="^few-shot$")] = "few-shot"  # type: ignore[assignment]
    """Only few-shot: answers are teacher-forced, so each must have one written form."""
    sampling: Sampling = Sampling(
        temperature=1, top_k=0, top_p=1, repetition_penalty=1, max_new_tokens=24
    )
    """Sampling settings for selection and training."""
    pool: Positive = 200
    """Prompts to choose from."""
    samples: Annotated[int, Field(ge=2)] = 16
    """Completions of each prompt of the pool, to estimate how often the model is right."""
    prompts: Annotated[int, Field(ge=4)] = 8
    """Prompts trained on in each of the three arms."""
    held_out: Positive = 1000
    """Held-out problems on which every trained model is scored."""
    updates: Annotated[tuple[Positive, ...], Field(min_length=1)] = (2, 5)
    """Optimizer updates after which the model is evaluated; conclusions use the last."""
    lr: Annotated[float, Field(gt=0, lt=1)] = 5e-6
    """Learning rate, constant."""
    rollouts: Positive = 32
    """Completions per update."""
    temperatures: Temperatures = (1.0, 0.5, 0.25)
    """Sampling temperatures of the untrained model; the trained one, at 1, must beat the best."""
    output: Path = Path("runs/study")
    """Folder for scores and results, and each run's records."""
