"""A planned run's sampling and training at full size, on tensors without memory that say they are
CUDA's, with every allocation played to the simulated allocator.

The loops are the trainer's own. What they would read from the device is made up: numbers are 1, and
the head keeps 2% of its columns. Attention is the CPU's, which keeps as much as a GPU's flash or
memory-efficient kernels do.
"""

import weakref

import torch
from says_cuda import say_cuda
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from em_kernels.hf import head_of
from em_kernels.ops import sparse
from em_kernels.training.engines.optimizer import PRECISIONS, MasterAdamW, adamw_options
from em_kernels.training.engines.step import entropy_step
from em_kernels.training.planning.activations import FakeModel, without_values
from em_kernels.training.rollouts.next_tokens import next_tokens
from em_kernels.training.rollouts.sampling import Rollout
from em_kernels.training.rollouts.token_rows import TokenRows

STEPS = 4  # of sampling: all take alike, as the KV cache is allocated at once


class Allocations(TorchDispatchMode):
    """Plays the storages that operations make to an allocator, while they live."""

    def __init__(self, allocator):
        super().__init__()
        self.allocator, self.blocks = allocator, {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1
        out = function(*arguments, **(named or {}))
        for x in tree_leaves(out):
            self.hold(x)
        return out

    def hold(self, x):
        if not isinstance(x, torch.Tensor):
            return
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.blocks and storage.nbytes():
            self.blocks[key] = self.allocator.malloc(storage.nbytes())
            weakref.finalize(storage, self.let_go, key)

    def let_go(self, key):
        self.allocator.free(self.blocks.pop(key))


class NoKernel:
    """A Triton kernel that computes nothing."""

    def __getitem__(self, grid):
        return lambda *arguments, **named: None


class FewColumns:
    """Counts that a GPU would send: of the columns kept, and of those that are new."""

    def __init__(self, counts):
        pass

    def read(self):
        return [3000, 400]


class StateOnHost:
    """An optimizer with its state on the host; a gradient goes there as soon as it is whole."""

    scale = 1.0

    def __init__(self, parameters):
        for p in parameters:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def add(self, parameter, gradient, rows=None):
        pass

    def update(self):
        pass


class StateOnDevice(MasterAdamW):
    """The trainer's own optimizer."""

    def update(self):
        self.step(self.norm())


def as_on_a_gpu(patch):
    """Make tensors say that they are CUDA's, with kernels that compute nothing."""
    say_cuda(patch, lambda name: NoKernel())
    patch.setattr(sparse, "AsyncCounts", FewColumns)


def play(plan, model_config, prompt_tokens, allocator, updates=2):
    """Play a run's first updates; raises the allocator's OutOfMemory."""
    config = plan.config
    lora = config if config.mode == "lora" else None
    net = FakeModel(model_config, torch.bfloat16, "auto", lora)
    model, allocations = net.model, Allocations(allocator)
    for x in [*model.parameters(), *model.buffers()]:
        allocations.hold(x)
    prompt, new = [1] * prompt_tokens, config.sampling.max_new_tokens
    rollouts = [Rollout(prompt, [2] * new, False)] * config.rollouts
    with net.fake, allocations, without_values():
        if config.mode == "offload":
            optimizer = StateOnHost(model.parameters())
        else:
            optimizer = StateOnDevice(
                model.named_parameters(),
                **adamw_options(config),
                clip=config.clip,
                device=torch.device("cpu"),
                moments=PRECISIONS[config.moments],
                gradients=PRECISIONS[config.gradients],
            )
        for _ in range(updates):
            sample(model, config, [prompt] * config.rollout_batch)
            entropy_step(
                model, head_of(model), rollouts, config, optimizer, config.micro_batch, lambda: None
            )
            optimizer.update()


@torch.no_grad()
def sample(model, config, prompts):
    """Sample some tokens, as rollouts/sampling.py does, and let an eighth of the rows go."""
    batch = TokenRows(model, prompts, config.sampling.max_new_tokens)
    scores = None
    for step in range(STEPS):
        logits = batch.logits()
        if scores is None:
            scores = logits.new_empty(logits.shape, dtype=torch.float32)
        scores = scores[: len(batch)].copy_(logits)
        del logits
        uniforms = torch.empty(len(batch), dtype=torch.float64)
        batch.append(next_tokens(scores, batch.tokens, config.sampling, uniforms))
        if step == STEPS // 2:
            batch.keep(torch.arange(len(batch) - len(batch) // 8))
