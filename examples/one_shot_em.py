"""One-shot Entropy Minimization from Python: what `em-kernels train` does.

python examples/one_shot_em.py                         # a 135M model, half a minute on a CPU
python examples/one_shot_em.py --model Qwen/Qwen2.5-0.5B-Instruct --output runs/one
"""

import argparse
import tempfile
from pathlib import Path

from em_kernels.training.config import Sampling, TrainConfig
from em_kernels.training.trainer import train

SHOTS = "".join(
    f"Q: What is {a} + {b}?\nA: {a} + {b} = {a + b}\n\n" for a, b in [(12, 7), (23, 45)]
)

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", default="demo", help='hub id, folder, or "demo"')
parser.add_argument("--output", type=Path, help="folder of the run; default a temporary one")
options = parser.parse_args()

with tempfile.TemporaryDirectory() as temporary:
    result = train(
        TrainConfig(
            model=options.model,
            prompt=f"{SHOTS}Q: What is 38 + 45?\nA:",
            answer="83",  # reported as accuracy; the loss never sees it
            chat_template=False,
            output=options.output or Path(temporary) / "run",
            rollouts=32,
            steps=3,
            lr=5e-6,
            sampling=Sampling(
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                max_new_tokens=24,
                stop=("\n",),
            ),
        )
    )
    first, last = result.metrics[0], result.metrics[-1]
    print(f"entropy {first['entropy']:.3f} -> {last['entropy']:.3f} nats")
    print(f"accuracy {first['accuracy']:.2f} -> {last['accuracy']:.2f}")
    print(f"last checkpoint, a transformers folder: {result.checkpoint}")
