"""Speed of this CPU at a model's own layers, its sampling and AdamW, measured in a few seconds."""

import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ...hf import decoder_of, hidden_states
from ..config import Sampling
from ..engines.optimizer import SLAB, MasterAdamW
from ..rollouts.kv_cache import grouped_attention, new_cache
from ..rollouts.next_tokens import next_tokens
from .activations import with_depth
from .plan import CPU_RATES, MIB, Rates

LAYER_BYTES = 512 * MIB  # of weights that are multiplied with: more than a CPU's caches hold
MAX_DEPTH = 4
TIMED = 2  # calls of which the faster one counts
TOKENS = 256  # of a row in the forward and backward, and before a sampling step
TRAINED_ROWS = 2
FEW_ROWS, MANY_ROWS = 4, 32  # of a sampling step
SAMPLED_ROWS = 8  # of logits
UPDATED = 2 * SLAB  # weights that AdamW updates
UPDATED_BYTES = 2 * (4 + 2 + 2) + 4  # of each: master and bf16 moments read and written, gradient


def measured_rates(
    model_config: PreTrainedConfig, layer_bytes: int, dtype: torch.dtype, sampling: Sampling
) -> Rates:
    """Return what this CPU does in training and sampling a model of equal layers.

    Args:
        layer_bytes: weights of one layer.
        dtype: of the weights.
        sampling: how tokens are chosen.
    """
    depth = max(1, min(MAX_DEPTH, LAYER_BYTES // layer_bytes))
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(with_depth(model_config, depth), dtype=dtype)
    model.eval()
    embedding = model.get_input_embeddings().weight
    layers = [p for p in decoder_of(model).parameters() if p is not embedding]
    with torch.no_grad():
        for p in layers:  # Memory that was never written would be read from one page of zeros.
            p.fill_(0.01)
    matrices = sum(p.numel() for p in layers if p.dim() > 1)
    vocab_size = len(embedding)
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None) or -1
    tokens = min(TOKENS, context // 2) if context > 0 else TOKENS  # XLNet's -1 is no limit
    few, many = (_seconds(_sampling_step(model, rows, tokens)) for rows in (FEW_ROWS, MANY_ROWS))
    each_row = max(0.0, many - few) / (MANY_ROWS - FEW_ROWS)
    reading = max(few - FEW_ROWS * each_row, 0.1 * few)
    ids = torch.arange(TRAINED_ROWS * tokens).view(TRAINED_ROWS, tokens) % vocab_size
    embedding.requires_grad_(False)  # Its gradient is added up, which is planned by itself.
    source, target = torch.ones(2, LAYER_BYTES // 8)
    return CPU_RATES._replace(
        flops=6 * matrices * ids.numel() / _seconds(lambda: _train(model, ids)),
        sampled_flops=2 * matrices / max(each_row, 1e-3 * few),
        entries=SAMPLED_ROWS * vocab_size / _seconds(_choice(sampling, vocab_size)),
        read=matrices * dtype.itemsize / reading,
        bandwidth=2 * source.nbytes / _seconds(lambda: target.copy_(source)),
        host=UPDATED * UPDATED_BYTES / _seconds(_adamw(dtype)),
    )


def _seconds(work: Callable[[], object]) -> float:
    """Time the faster of the calls."""
    found = []
    for _ in range(TIMED):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def _train(model: PreTrainedModel, ids: torch.Tensor) -> None:
    states = hidden_states(model, ids)
    states.backward(torch.ones_like(states))
    model.zero_grad()


def _sampling_step(model: PreTrainedModel, rows: int, tokens: int) -> Callable[[], object]:
    """Return a function that runs the layers on one more token of each row, after so many."""
    cache = new_cache(model, tokens + TIMED)
    ids = torch.ones(rows, 1, dtype=torch.int64)

    @torch.no_grad()
    def step() -> None:
        with grouped_attention():
            decoder_of(model)(input_ids=ids, past_key_values=cache, use_cache=True)

    with torch.no_grad():
        decoder_of(model)(
            input_ids=ids[:1].expand(1, tokens), past_key_values=cache, use_cache=True
        )
    cache.batch_repeat_interleave(rows)
    return step


def _choice(sampling: Sampling, vocab_size: int) -> Callable[[], object]:
    """Return a function that chooses tokens by logits, as sampling does."""
    uniforms = torch.full((SAMPLED_ROWS,), 0.5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(SAMPLED_ROWS, vocab_size, generator=generator)
    ids = torch.zeros(SAMPLED_ROWS, 1, dtype=torch.int64)
    return lambda: next_tokens(scores.clone(), ids, sampling, uniforms)


def _adamw(dtype: torch.dtype) -> Callable[[], object]:
    """Return a function that updates weights of this dtype."""
    parameter = nn.Parameter(torch.ones(UPDATED, dtype=dtype))
    optimizer = MasterAdamW(
        [("weights", parameter)],
        lr=1e-5,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.01,
        clip=1.0,
        device=torch.device("cpu"),
        moments=torch.bfloat16,
        gradients=torch.float32,
    )
    gradient = torch.ones(UPDATED)

    def step() -> None:
        optimizer.add(parameter, gradient)
        optimizer.step(optimizer.norm())

    return step
