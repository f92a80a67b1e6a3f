"""CUDA graphs of the simulated CUDA device: operations that run again on the same memory."""

import torch
from simulated_memory import poison
from simulated_tensors import SimulatedCuda
from torch.utils._pytree import tree_leaves


class Graph:
    """torch.cuda.CUDAGraph. What is captured does not run: its results are poison until replay."""

    def __init__(self, keep_graph=False):
        self.operations, self.is_valid = [], True

    def capture_begin(self, *pool, **options):
        SimulatedCuda.active.graph = self

    def capture_end(self):
        SimulatedCuda.active.graph = None
        if not self.is_valid:  # torch.cuda.graph then leaves its stream the current one
            raise RuntimeError("operation failed due to a previous error during capture")
        for *_, results in self.operations:
            for x in results:
                if x.is_contiguous():
                    poison(x)

    def record(self, run, arguments, named, found):
        given = {x.untyped_storage()._cdata for x in _tensors((arguments, named))}
        results = [x for x in _tensors(found) if x.untyped_storage()._cdata not in given]
        self.operations.append((run, arguments, named, results))

    def replay(self):
        for run, arguments, named, results in self.operations:
            SimulatedCuda.active.use(_tensors((arguments, named)), results)
            again = _tensors(run(*arguments, **named))
            for x, new in zip(results, again if results else (), strict=True):
                x.copy_(new)


def _tensors(x):
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor)]
