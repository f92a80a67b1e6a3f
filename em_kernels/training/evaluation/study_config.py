"""Settings of a study."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from ..config import Sampling
from ..settings import Positive
from .completions import TaskSettings
from .evaluate import Temperatures


class StudyConfig(TaskSettings):
    """Does selecting the prompt matter, and does entropy minimisation do more than a lower
    temperature? Trains a model on many prompts, one at a time, and compares.
    """

    model: str = "demo"
    data: str = "addition"
    template: Annotated[str, Field(pattern="^few-shot$")] = "few-shot"  # type: ignore[assignment]
    """few-shot: answers must be such that can be written in one way."""
    sampling: Sampling = Sampling(
        temperature=1, top_k=0, top_p=1, repetition_penalty=1, max_new_tokens=24
    )
    """Sampling settings for selection and training."""
    pool: Positive = 200
    """Prompts to choose from."""
    samples: Annotated[int, Field(ge=2)] = 16
    """Completions of each, to estimate how often it is right; training samples others."""
    prompts: Annotated[int, Field(ge=4)] = 8
    """Prompts in each arm."""
    held_out: Positive = 1000
    """Problems that every trained model is scored on."""
    updates: Annotated[tuple[Positive, ...], Field(min_length=1)] = (2, 5)
    """Optimizer updates after which the model is evaluated; conclusions use the last."""
    lr: Annotated[float, Field(gt=0, lt=1)] = 5e-6
    """Learning rate, constant."""
    rollouts: Positive = 32
    """Completions per update."""
    temperatures: Temperatures = (1.0, 0.5, 0.25)
    """Temperatures for the untrained model; the trained one, at T = 1, must beat the best."""
    output: Path = Path("runs/study")
    """Folder of the study; holds every verdict, and a run's records for each prompt."""
