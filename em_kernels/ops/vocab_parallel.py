"""A vocabulary split by rows over a process group: where each shard begins, and the merge of
(7).
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import reference
from ..reference import RowParts


class VocabularyShard:
    """This rank's rows of the weight within the whole vocabulary. A collective call: every rank
    makes it, with the same path: which collective calls will follow.
    """

    def __init__(self, group: ProcessGroup, local_size: int, device: torch.device, path: int):
        self.group = group
        self.device = device
        mine = torch.tensor([[local_size, path]], device=device)
        gathered = mine.new_empty(dist.get_world_size(group), 2)
        dist.all_gather_into_tensor(gathered, mine, group)
        sizes, paths = gathered.t().tolist()
        if len(set(paths)) > 1:  # else they would wait for each other
            raise ValueError(
                "process_group: its ranks differ in requires_grad of hidden or of the head; "
                "give all ranks the same"
            )
        self.sizes: list[int] = sizes
        self.start = sum(self.sizes[: dist.get_rank(group)])

    def smallest(self, count: int) -> int:
        """The least of the ranks' counts."""
        least = torch.tensor(count, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN, self.group)
        return int(least)

    def merge(self, parts: RowParts) -> RowParts:
        """The whole rows' parts, the same on every rank, from this shard's."""
        if parts.argmax is not None:
            parts = parts._replace(argmax=parts.argmax + self.start)
        there = [name for name, field in parts._asdict().items() if field is not None]
        # as fp64: an argmax is exact up to 2^53 words
        mine = torch.stack([getattr(parts, name).double() for name in there])
        gathered = mine.new_empty(len(self.sizes) * len(mine), mine.shape[1])
        dist.all_gather_into_tensor(gathered, mine, group=self.group)
        merged = reference.merge(
            [
                RowParts(**dict(zip(there, shard, strict=True)))
                for shard in gathered.view(len(self.sizes), *mine.shape)
            ]
        )
        return parts._replace(
            **{name: getattr(merged, name).to(getattr(parts, name).dtype) for name in there}
        )

    def sum(self, partial: Tensor) -> None:
        """Add the shards' partial results, in place."""
        dist.all_reduce(partial, group=self.group)
