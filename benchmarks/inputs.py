"""Hidden states and heads to measure on: a model's own, LM-like ones of any size, the worst case.

The cost of a gradient with a tolerance depends on how peaked the distributions are. With a Gaussian
head they have no peaks: nothing could be left out, and times would say nothing about a real model.
`python -m benchmarks.inputs` compares LM-like inputs with a model's.
"""

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

TEMPERATURES = (0.5, 1.0)
PROMPT = (  # One-shot EM's own (arXiv 2505.20282)
    r"The pressure \( P \) exerted by wind on a sail varies jointly as the area \( A \) of the "
    r"sail and the cube of the wind's velocity \( V \). When the velocity is \( 8 \) miles per "
    r"hour, the pressure on a sail of \( 2 \) square feet is \( 4 \) pounds. Find the wind "
    r"velocity when the pressure on \( 4 \) square feet of sail is \( 32 \) pounds."
)
# Parameters of lm_like, fitted to `real` at V = 49152 and 1024 tokens (November 2026)
VOCAB = 49152
LOGIT_VARIANCE = 12.8  # of a token's logits; times log V / log VOCAB, which keeps the entropy
TEXTS = 4  # The tokens are those of this many texts, one after the other.
SHARED = 0.57  # share of the variance that all tokens of a text have in common
# At V > VOCAB, SHARED is multiplied by (VOCAB / V) ** SHARED_FALL, so that the share of active
# entries does not fall.
SHARED_FALL = 0.3
# Norms of weight rows are those of vectors of 3 normals, which makes the upper tail exponential.
NORM_FREEDOM = 3
SURENESS = 0.4  # log-normal spread of each token's own part: some tokens are sure, some not
PROBLEMS = Path(__file__).parent / "math500_ten.jsonl"  # every 50th of MATH-500 (MIT licence)
BLOCK = 4096  # Rows drawn from one seed: any number of threads draws the same.


class Input(NamedTuple):
    """Inputs of a head, and target tokens."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,) int64; every other one is likely, the rest are random


class Figures(NamedTuple):
    """Statistics of logits y = hidden @ weight^T; entropies in nats; shares of V in percent."""

    entropy_half: float  # mean over tokens, at temperature 0.5
    entropy_one: float  # at temperature 1
    logit_std: float  # over the vocabulary, mean over tokens
    margin: float  # largest minus second largest y, mean over tokens
    active_half: float  # entries that hold 99.8 % of the gradient's L1 mass, at 0.5
    active_one: float


# Of 1024 tokens of `real(0.5)` (November 2026), which lm_like is calibrated to
SMOLLM2_FIGURES = Figures(0.45, 1.32, 3.4, 2.2, 1.8, 37.0)


def _normal(rows: int, columns: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """Draw (rows, columns) of N(0, 1), in blocks on several threads: a GiB takes seconds."""
    out = torch.empty(rows, columns, dtype=dtype, device=device)

    def draw(start: int) -> None:
        block = out[start : start + BLOCK]
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + start)
        block.copy_(torch.randn(block.shape, generator=generator, device=device))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, range(0, rows, BLOCK)))
    return out


def lm_like(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Input:
    """Make inputs with logits as peaked as a language model's: y_ij = r_j g_j . (shared + own_i).

    The weight rows' norms r_j vary, so a token's logits have a Gaussian body and an exponential
    tail: a few candidates, each some two nats below the one before, over a broad background.
    `shared`, one vector per text, makes the same entries likely in all of a text.
    """
    variance = LOGIT_VARIANCE * math.log(max(vocab_size, 2)) / math.log(VOCAB)
    shared_variance = variance * SHARED * min(1.0, VOCAB / vocab_size) ** SHARED_FALL
    weight = _normal(vocab_size, hidden_size, seed, dtype, device)
    norms = _normal(vocab_size, NORM_FREEDOM, seed + 1, torch.float32, device).norm(dim=1)
    for block, r in zip(weight.split(BLOCK), norms.split(BLOCK), strict=True):
        block.mul_(r[:, None] / math.sqrt(NORM_FREEDOM * hidden_size))
    own = _normal(tokens, hidden_size, seed + 2, torch.float32, device)
    sureness = _normal(tokens, 1, seed + 3, torch.float32, device)
    own *= math.sqrt(variance - shared_variance) * (SURENESS * sureness - SURENESS**2).exp()
    shared = _normal(TEXTS, hidden_size, seed + 4, torch.float32, device)
    text = torch.arange(tokens, device=device) * TEXTS // tokens
    hidden = own.add_(shared[text], alpha=math.sqrt(shared_variance)).to(dtype)
    return Input(hidden, weight, _targets(hidden, weight, seed))


def uniform(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Input:
    """Make inputs with logits of standard deviation 0.5, so that every vocabulary entry matters."""
    weight = _normal(vocab_size, hidden_size, seed, dtype, device)
    weight.mul_(1 / math.sqrt(hidden_size))
    hidden = 0.5 * _normal(tokens, hidden_size, seed + 2, dtype, device)
    return Input(hidden, weight, _targets(hidden, weight, seed))


class Real(NamedTuple):
    """A model whose own hidden states are an input."""

    shape: str  # name of its head in suite.SHAPES
    texts: str  # what it answers, for --help
    tokens: int  # generated at once, which takes minutes
    new_tokens: int  # of each completion


REAL = {  # by kind of input
    "real": Real("smollm2-135m", "SmolLM2 on One-shot EM's prompt", 1024, 96),
    "qwen2.5-0.5b": Real("qwen2.5-0.5b", "Qwen2.5-Coder-0.5B on ten of MATH-500", 2048, 256),
    "qwen2.5-1.5b": Real("qwen2.5-1.5b", "Qwen2.5-Coder-1.5B on ten of MATH-500", 2048, 256),
}


def real(
    kind: str,
    temperature: float,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Input:
    """Return hidden states and the tied head of one of REAL on its own completions.

    They are sampled at the temperature with top_k 50 and top_p 0.95. The first call makes the
    model's folder and generates them, later ones read them from the cache.
    """
    from safetensors.torch import load_file, save_file

    from em_kernels.training.models.demo_model import fetch_demo

    from . import models

    folder = fetch_demo(quiet=True) if kind == "real" else models.fetch_model(kind)
    name = "" if kind == "real" else f"{kind}-"
    cached = folder.parent / f"bench-states-{name}{temperature}.safetensors"
    hidden = load_file(cached)["hidden"] if cached.exists() else torch.empty(0)
    if len(hidden) < tokens:
        hidden = _generated(kind, folder, temperature, max(tokens, REAL[kind].tokens))
        whole = cached.with_suffix(f".{os.getpid()}")
        save_file({"hidden": hidden}, whole)
        whole.replace(cached)
    hidden = hidden[:tokens].to(device, dtype)
    weight = load_file(folder / "model.safetensors", device=device)["model.embed_tokens.weight"]
    weight = weight.to(dtype)
    return Input(hidden, weight, _targets(hidden, weight, 0))


def _generated(kind: str, folder: Path, temperature: float, tokens: int) -> Tensor:
    """Generate completions; return the hidden states (tokens, D) that their tokens came from."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from em_kernels.hf import hidden_states
    from em_kernels.training.config import Sampling
    from em_kernels.training.models.loading import auto_dtype
    from em_kernels.training.rollouts.sampling import generate

    disable_progress_bar()
    dtype = torch.float32 if kind == "real" else getattr(torch, auto_dtype("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    texts = [PROMPT] * 16
    if kind != "real":
        texts = [json.loads(line)["problem"] for line in PROBLEMS.read_text("utf-8").splitlines()]
    prompts = []
    for text in texts:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        prompts.append(tokenizer(chat, add_special_tokens=False).input_ids)
    sampling = Sampling(
        temperature=temperature,
        top_k=50,
        top_p=0.95,
        repetition_penalty=1.0,
        max_new_tokens=REAL[kind].new_tokens,
    )
    found: list[Tensor] = []
    start = 0
    while sum(map(len, found)) < tokens:
        seeds = [(0, i) for i in range(start, start + len(prompts))]
        for rollout in generate(model, tokenizer, prompts, seeds, sampling):
            ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
            with torch.no_grad():
                states = hidden_states(model, ids)[0]
            found.append(states[len(rollout.prompt_ids) - 1 : -1])
        start += len(seeds)
    return torch.cat(found)[:tokens].contiguous()


def _targets(hidden: Tensor, weight: Tensor, seed: int) -> Tensor:
    """Draw random targets; every other one is the likeliest of the first 4096 entries."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(len(weight), (len(hidden),), generator=generator).to(hidden.device)
    likely = (hidden[::2] @ weight[:BLOCK].t()).argmax(-1)
    targets[::2] = likely
    return targets


@torch.no_grad()
def figures(given: Input) -> Figures:
    """Measure the inputs, over all their tokens."""
    weight = given.weight.float()
    mass = {tau: weight.new_zeros(len(weight)) for tau in TEMPERATURES}
    entropy = dict.fromkeys(TEMPERATURES, 0.0)
    std = margin = 0.0
    for hidden in given.hidden.split(64):
        y = hidden.float() @ weight.t()
        std += y.std(-1).sum().item()
        first, second = y.topk(2).values.unbind(-1)
        margin += (first - second).sum().item()
        for tau in TEMPERATURES:
            logp = (y / tau).log_softmax(-1)
            p = logp.exp()
            h = -(p * logp).sum(-1, keepdim=True)
            entropy[tau] += h.sum().item()
            mass[tau] += (p * (logp + h)).abs_().sum(0)  # reference.py (8), without 1 / (N tau)
    n = len(given.hidden)
    active = []
    for tau in TEMPERATURES:
        sums = mass[tau].sort(descending=True).values.double().cumsum(0)
        kept = int((sums < 0.998 * sums[-1]).sum()) + 1
        active.append(100 * kept / len(weight))
    return Figures(*(entropy[tau] / n for tau in TEMPERATURES), std / n, margin / n, *active)


def calibration(shapes: dict[str, tuple[int, int]], tokens: int = 1024) -> Iterator[str]:
    """Yield the lines of a table: figures of `real`, and of lm_like at each shape (D, V)."""

    def line(name: str, row: Figures) -> str:
        half, one, std, margin, active_half, active_one = row
        text = (
            f"{half:8.2f}{one:8.2f}{std:9.2f}{margin:8.2f}{active_half:9.1f} %{active_one:8.0f} %"
        )
        return f"{name:<42}{text}"

    yield f"{'':<42}{'entropy [nats]':>16}{'logits':>9}{'top-1':>8}{'columns with 99.8 %':>21}"
    yield (
        f"{f'{tokens} tokens':<42}{'tau 0.5':>8}{'tau 1':>8}{'std':>9}{'margin':>8}"
        f"{'tau 0.5':>11}{'tau 1':>10}"
    )
    yield line("SmolLM2-135M, calibrated to", SMOLLM2_FIGURES)
    for tau in TEMPERATURES:
        yield line(f"SmolLM2-135M, text sampled at {tau}", figures(real("real", tau, tokens)))
    for name, (hidden_size, vocab_size) in shapes.items():
        given = lm_like(tokens, hidden_size, vocab_size)
        yield line(f"lm_like, {name}: {hidden_size} x {vocab_size}", figures(given))


if __name__ == "__main__":
    for text in calibration({"SmolLM2": (576, VOCAB), "Qwen2.5 1.5B": (1536, 151936)}):
        print(text, flush=True)
