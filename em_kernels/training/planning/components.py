"""Memory and disk of a run by component: what always stays, the head's loss, sampling."""

from typing import TypeAlias

import torch

from ...ops.memory import TILE, chunk_length
from ...ops.sparse import SAMPLE
from ...ops.weight_gradient import MIN_SLAB_ENTRIES
from ...ops.weight_gradient import SLAB_BYTES as HEAD_SLAB_BYTES
from ..config import TrainConfig
from ..data.grading import WORKER_BYTES, WORKERS
from ..distributed import LaunchSpec
from ..engines.offload import BUFFER_BYTES
from ..engines.optimizer import PRECISIONS, SLAB, state_bytes
from ..models.rounding import LENGTH
from ..rollouts.next_tokens import has_candidates
from .activations import ModelMemory
from .plan import GIB, MIB

# Estimates for CUDA, until a GPU has run the trainer.
CONTEXT_BYTES = GIB // 2  # CUDA's context, libraries' workspaces included
LIBRARIES_BYTES = 256 * MIB  # of the context: libraries that the first kernels load
SPARE_SHARE = 0.03  # of the device's memory, left free
PROCESS_BYTES = GIB  # of the host beside a GPU: torch and CUDA's libraries
# Of memory that comes and goes, lost between the allocator's blocks, and in the mask and repeated
# keys of attention without flash attention: 0.126 in simulated runs of LoRA on 7B.
FRAGMENTED_SHARE = 0.13
# The same on a CPU, measured: 0 with Qwen2.5-0.5B, 0.17 with LoRA on 1.5B.
CPU_FRAGMENTED_SHARE = 0.15
# Measured: resident memory of a process that has planned a run (torch 2.13, transformers 5.23).
CPU_PROCESS_BYTES = 700 * MIB
# Sizes that the code of this library and of transformers sets.
STAGING_BYTES = 2 * BUFFER_BYTES  # offload.Bounce
SCRATCH_BYTES = 3 * 4 * SLAB  # MasterAdamW: three rows of fp32
NOISE_BYTES = 4 * LENGTH  # rounding.to_half
WRITTEN_BYTES = 2 * GIB  # a model is written in shards of 2 GB
LOADED_BYTES = 5 * GIB  # a published model comes in shards of at most 5 GB
CHUNK_BYTES = 256 * MIB  # the default of chunk_bytes
SMALL_STATE_BYTES = 8 * GIB  # of the optimizer, which save_optimizer "auto" saves
BUCKET_ELEMENTS = 2 * 500_000_000  # two buckets of DeepSpeed's default reduce_bucket_size
# Measured as the peaks of `entropy_loss_into` and of `generate` under torch.profiler on a CPU; the
# same for small and large vocabularies, for 8 and 16 rows.
STATISTICS_BYTES = 132  # per token
CHOICE_BYTES = 36  # per vocabulary entry, where the columns that need a gradient are chosen
# Per vocabulary entry, where a token is chosen among all of them.
WHOLE_CDF_BYTES, WHOLE_TOP_P_BYTES = 24, 30
CUDA_SORT_BYTES = 24  # per vocabulary entry: keys and indices again, in a GPU's sort (estimated)


# Bytes that stay all the time, by component: on the device, the host, the disk.
FixedBytes: TypeAlias = tuple[dict[str, int], dict[str, int], dict[str, int]]


def fixed_bytes(config: TrainConfig, model: ModelMemory, cuda: bool) -> FixedBytes:
    """Return what stays in the memory of a rank that holds the whole model."""
    sizes = model.sizes
    device = {"weights": sizes.weight_bytes, "buffers": sizes.buffer_bytes}
    if config.four_bit:  # 4 bits each, a one-byte scale per 64 weights, a float per 64 * 256
        linear = sizes.linear_parameters
        packed = linear // 2 + linear // 64 + linear // (64 * 256) * 4
        device["weights"] += packed - linear * model.itemsize
    if config.mode == "lora":
        device["adapters"] = sizes.trained_bytes
    elif config.kl_weight:
        device["base model"] = sizes.weight_bytes + sizes.buffer_bytes
    offload, folder = config.mode == "offload" and cuda, config.offload_dir is not None
    itemsize = sizes.trained_bytes // sizes.trained_parameters
    moments, gradients = PRECISIONS[config.moments], PRECISIONS[config.gradients]
    shared = itemsize == 4 and not offload and not folder
    state = state_bytes(sizes.trained_parameters, itemsize, moments, gradients, shared)
    disk = {f"{n} (offload)": state.pop(n) for n in ("master", "moments") if folder}
    graded = config.answer is not None or config.prompt_from is not None
    graders = {"graders": WORKERS * WORKER_BYTES} if graded else {}
    state["scratch"] = SCRATCH_BYTES + (NOISE_BYTES if itemsize < 4 else 0)
    if not cuda:
        return {"process": CPU_PROCESS_BYTES, **graders, **device, **state}, {}, disk
    host = {"process": PROCESS_BYTES, **graders}
    host["saving"] = bf16_copy_bytes(config, model) or min(WRITTEN_BYTES, sizes.weight_bytes)
    if offload:
        host |= {**state, "staging": STAGING_BYTES}
    else:
        device |= state
    # A shard's memory is free again before host memory other than the process's is allocated.
    shard = min(LOADED_BYTES, sizes.weight_bytes)
    host["loading"] = max(0, shard - sum(host.values()) + PROCESS_BYTES)
    return {**device, "context": CONTEXT_BYTES}, host, disk


def bf16_copy_bytes(config: TrainConfig, model: ModelMemory) -> int:
    """Return the host's bytes for rounded weights while a checkpoint is written."""
    if config.mode == "lora" or config.dtype == "bfloat16":
        return 0
    return 2 * model.sizes.weight_bytes // model.itemsize


def sharded_bytes(
    config: TrainConfig, model: ModelMemory, launch: LaunchSpec, cuda: bool
) -> FixedBytes:
    """Return what stays in a rank's memory under FSDP2 or DeepSpeed; sampling needs all weights."""
    sizes, trained = model.sizes, model.sizes.trained_parameters
    each = {"master": 4, "moments": 8, "gradients": 4}
    state = {name: size * trained // launch.ranks for name, size in each.items()}
    device = {
        "weights": sizes.weight_bytes,
        "buffers": sizes.buffer_bytes,
        "head's gradient": model.vocab_size * model.hidden_size * (4 + model.itemsize),
    }
    if launch.engine == "deepspeed":
        device["buckets"] = min(BUCKET_ELEMENTS, 2 * trained) * model.itemsize
    # Rank 0 gathers the fp32 masters, makes a bf16 copy, and may gather the optimizer's state.
    saving = (18 if config.save_optimizer else 6) * trained // launch.on_machine
    if not cuda:
        return {"process": CPU_PROCESS_BYTES, **device, **state, "saving": saving}, {}, {}
    host = {"process": PROCESS_BYTES, "saving": saving}
    if launch.on_host:
        return {**device, "context": CONTEXT_BYTES}, {**host, **state}, {}
    return {**device, **state, "context": CONTEXT_BYTES}, host, {}


def logit_row_bytes(model: ModelMemory, cuda: bool) -> int:
    """Return bytes per token: fp32 logits; on a GPU also their gradient, and the next logits."""
    return model.vocab_size * (4 + (4 + model.itemsize) * cuda)


def default_chunk_bytes(model: ModelMemory, device_limit: int, cuda: bool) -> int:
    """Return the largest power of two that memory allows, or a GPU's whole tile of rows if that is
    at most 1/32 of its memory; but at least two rows of logits.
    """
    row = logit_row_bytes(model, cuda)
    allowed = min(CHUNK_BYTES, device_limit // 64)
    least = TILE if cuda and TILE * row <= device_limit // 32 else 2
    return max(least * row, 1 << max(0, allowed.bit_length() - 1))


def head_bytes(
    config: TrainConfig, model: ModelMemory, states: int, chunk_bytes: int, cuda: bool
) -> int:
    """Return the bytes of `entropy_loss_into` on so many states: logits, dhidden, a slab of the
    head's gradient; with a tolerance also a chunk's chosen columns, or a sample of the others.
    """
    vocab_size, hidden_size, itemsize = model.vocab_size, model.hidden_size, model.itemsize
    device, row = torch.device("cuda" if cuda else "cpu"), logit_row_bytes(model, cuda)
    rows = chunk_length(states, row, max(row, chunk_bytes), device)
    total = rows * row
    if cuda and not config.grad_tolerance:  # logit gradients of waiting chunks fill chunk_bytes
        total = min(states * vocab_size * (4 + itemsize), chunk_bytes)
    if config.kl_weight:  # logits of both models; the base model's states, and a second dhidden
        pair = vocab_size * (8 + itemsize * cuda)
        total = max(total, chunk_length(states, pair, max(pair, chunk_bytes), device) * pair)
        total += states * hidden_size * (4 + itemsize)
    total += states * (hidden_size * 4 + STATISTICS_BYTES)
    if config.mode != "lora":
        total += min(HEAD_SLAB_BYTES, vocab_size * hidden_size * 4)
    if config.grad_tolerance:
        column = rows * 8 + hidden_size * itemsize
        slab = max(MIN_SLAB_ENTRIES, min(HEAD_SLAB_BYTES, chunk_bytes) // column)
        chosen = min(vocab_size // 2, slab) * column
        sample = min(SAMPLE, vocab_size) * hidden_size * itemsize
        total += max(chosen, sample) + CHOICE_BYTES * vocab_size
    return total


def completion_bytes(
    config: TrainConfig, model: ModelMemory, prompt_tokens: int, cuda: bool
) -> dict[str, int]:
    """Return the bytes of one completion while it is sampled."""
    sampling, length = config.sampling, prompt_tokens + config.sampling.max_new_tokens
    per_entry = model.itemsize + 4  # logits, and their copy in fp32
    if sampling.temperature and not has_candidates(sampling, model.vocab_size):
        per_entry = WHOLE_CDF_BYTES
        if sampling.top_p < 1:
            per_entry = WHOLE_TOP_P_BYTES + CUDA_SORT_BYTES * cuda
    cache = model.cache_bytes(length)
    moved = cache // (2 * model.layers)  # a layer's keys, when rows leave the batch
    ids = 8 * (3 * length + sampling.max_new_tokens)
    logits = model.vocab_size * per_entry
    return {"KV cache": cache, "next tokens": logits + moved + ids}
