"""Named settings of a training run."""

from typing import Any

from .config import Sampling, TrainConfig
from .settings import UserError

ADDITION_SHOTS = ((12, 7), (23, 45))
DEMO_SHOTS = "".join(
    f"Q: What is {a} + {b}?\nA: {a} + {b} = {a + b}\n\n" for a, b in ADDITION_SHOTS
)
# The official train.py runs 8 GPUs that sample the same 8 completions each. Its "step" is a
# micro-batch of 2 of them; an update follows every fourth, and its results are those of step 10.
OFFICIAL = {"rollouts": 8, "steps": 2, "micro_batch_rows": 2, "official_loss": True}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "one-shot-em": {},  # another name of the paper's
    "official": OFFICIAL | {"sampling": Sampling(max_new_tokens=512)},
    "official-2505": OFFICIAL | {"sampling": Sampling(max_new_tokens=2048)},
    "demo": {
        "model": "demo",
        "prompt": f"{DEMO_SHOTS}Q: What is 38 + 45?\nA:",
        "answer": "83",
        "chat_template": False,
        "output": "runs/demo-train",
        "rollouts": 32,
        "steps": 5,
        "lr": 5e-6,
        "stop_below": 0.1,
        "save_at": (),
        "sampling": Sampling(
            temperature=1, top_k=0, top_p=1, repetition_penalty=1, max_new_tokens=24, stop=("\n",)
        ),
    },
}


def preset(name: str) -> TrainConfig:
    """Return the settings of a preset; those it leaves out have their defaults (the paper's)."""
    if name not in PRESETS:
        raise UserError(f"preset: {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return TrainConfig(**PRESETS[name])
