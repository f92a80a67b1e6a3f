"""A step of sampling on a GPU as one CUDA graph, instead of a launch for each operation.

Planned: no GPU has run it yet.
"""

import logging
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from .kv_cache import fixed_step, keeps_every_token, set_length
from .token_rows import TokenRows, takes_positions

BUCKET = 256  # tokens; keys up to the next multiple are read, and those to come are masked
MAX_DIFFERENCE = 0.02  # between graph and operations, in bf16: another attention kernel rounds anew
FAILED: WeakSet[nn.Module] = WeakSet()  # models that a graph cannot hold
log = logging.getLogger(__name__)


class GraphedRows(TokenRows):
    """TokenRows whose steps of one token replay a graph.

    A graph has fixed shapes and addresses: it is captured anew for the next bucket of lengths, and
    when rows have left. The first replay is compared with the operations themselves. Where capture
    fails or the two differ, the operations go on alone, and a warning is logged.
    """

    graph: torch.cuda.CUDAGraph | None = None
    is_checked = False

    def logits(self) -> Tensor:
        """Return the logits (rows, vocabulary) of each row's next token, until the next call."""
        if self.model in FAILED or self.length - self.known != 1:
            return super().logits()
        if self.graph is None or self.length > self.end:
            self._capture()
        if self.graph is None:
            return super().logits()
        self.place.fill_(self.known)
        self.graph.replay()
        self.known = self.length
        return self.output

    def keep(self, rows: Tensor) -> None:
        self.graph = None
        set_length(self.cache, self.known)
        super().keep(rows)

    def _capture(self) -> None:
        """Capture a step, or note that this model cannot do without its operations."""
        self.graph = None  # lets go of its memory before the next one takes its own
        set_length(self.cache, self.known)
        self.end = min(-(-self.length // BUCKET) * BUCKET, self.ids.shape[1])
        self.place = torch.tensor([self.known], device=self.device)
        graph, expected = torch.cuda.CUDAGraph(), None
        try:
            if not self.is_checked:
                expected = super().logits().float()
                self.known -= 1
            # A model that asks the cache for its length is told a wrong one, which the check finds:
            # the graph would keep the first length for ever.
            set_length(self.cache, self.end)
            # torch.cuda.graph leaves its own stream the current one where capture fails.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self.output = self._fixed_step()
            if expected is not None:
                graph.replay()
                difference = (self.output.float() - expected).norm() / expected.norm()
                if not difference <= MAX_DIFFERENCE:
                    raise RuntimeError(f"its logits differ by {difference:.2g}")
                self.is_checked = True
            self.graph = graph
        except torch.OutOfMemoryError:
            raise  # which a smaller batch may help
        except Exception as error:  # of the model's code, or of CUDA
            FAILED.add(self.model)
            log.warning("sampling without a CUDA graph, slower: %s", str(error).split("\n")[0])
        set_length(self.cache, self.known)

    def _fixed_step(self) -> Tensor:
        """Compute the token at `place`, which only the device knows; return its logits."""
        seen = torch.arange(self.end, device=self.device) <= self.place
        if self.mask is not None:
            seen = seen & self.mask[:, : self.end].bool()
        mask = torch.zeros(len(self), 1, 1, self.end, dtype=self.model.dtype, device=self.device)
        mask = mask.masked_fill(~seen.view(-1, 1, 1, self.end), -torch.inf)
        column = self.place.expand(len(self), 1)
        inputs = {"input_ids": self.ids.gather(1, column), "attention_mask": mask}
        with fixed_step(self.cache, self.place, self.end):
            return self.model(
                **inputs,
                position_ids=self.positions.gather(1, column),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]


def rows_for(model: PreTrainedModel) -> type[TokenRows]:
    """Return how to sample from a model: on a GPU with a graph, if its attention allows that."""
    takes_mask = model.config._attn_implementation in ("sdpa", "eager")
    alike = keeps_every_token(model) and takes_mask and takes_positions(model)
    on_gpu = model.device.type == "cuda" and not isinstance(model, FSDPModule)
    return GraphedRows if alike and on_gpu else TokenRows
