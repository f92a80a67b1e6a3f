"""A vocabulary split by rows of the weight over a process group, merged by equation (7)."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import reference
from ..reference import RowParts


class VocabularyShard:
    """This rank's rows of the weight within the whole vocabulary.

    Creating one is a collective call. `collectives` stands for the collective calls that will
    follow: any number that differs where these do.
    """

    def __init__(
        self, group: ProcessGroup, local_size: int, device: torch.device, collectives: int
    ) -> None:
        self.group = group
        self.device = device
        local = torch.tensor([[local_size, collectives]], device=device)
        gathered = local.new_empty(dist.get_world_size(group), 2)
        dist.all_gather_into_tensor(gathered, local, group)
        sizes, numbers = gathered.t().tolist()
        if len(set(numbers)) > 1:  # the ranks would wait for each other for ever
            raise ValueError(
                "process_group: its ranks differ in what they ask for, or in requires_grad of "
                "hidden or of the head; give all ranks the same"
            )
        self.sizes: list[int] = sizes
        self.start = sum(self.sizes[: dist.get_rank(group)])

    def smallest(self, count: int) -> int:
        """Return the smallest of the ranks' counts."""
        least = torch.tensor(count, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN, self.group)
        return int(least)

    def gather(self, parts: RowParts) -> RowParts:
        """Return every shard's part of the same rows, (ranks, rows), the same on all ranks."""
        merged = reference.merge(parts)  # ranks may differ in how many parts they have
        if merged.argmax is not None:
            merged = merged._replace(argmax=merged.argmax + self.start)
        names = [name for name, field in merged._asdict().items() if field is not None]
        # fp64 holds an argmax exactly.
        local = torch.stack([getattr(merged, name).double() for name in names])
        by_name = self.all_gather(local).unbind(1)
        return merged._replace(
            **{
                name: field.to(getattr(merged, name).dtype)
                for name, field in zip(names, by_name, strict=True)
            }
        )

    def all_gather(self, local: Tensor) -> Tensor:
        """Return every shard's tensor of the same shape, (ranks, ...)."""
        gathered = local.new_empty(len(self.sizes) * len(local), *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local, group=self.group)
        return gathered.view(len(self.sizes), *local.shape)

    def maximum(self, partial: Tensor) -> None:
        """Take the largest of the shards' values, in place."""
        dist.all_reduce(partial, dist.ReduceOp.MAX, group=self.group)

    def sum(self, partial: Tensor) -> None:
        """Add the shards' partial results, in place."""
        dist.all_reduce(partial, group=self.group)
