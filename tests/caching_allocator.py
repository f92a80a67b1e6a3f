"""torch's caching allocator of GPU memory, simulated: which blocks it reserves, splits and joins.

Sizes and rules are those of torch 2.13 (c10/core/AllocatorConfig.h and
c10/cuda/CUDACachingAllocator.cpp) for one stream and default settings, with expandable segments or
without. Not simulated: other streams, memory pools of CUDA graphs, a driver that is itself short.
"""

import bisect
from dataclasses import dataclass

MIB = 1 << 20
SMALL, SMALL_SEGMENT, LARGE_SEGMENT = MIB, 2 * MIB, 20 * MIB  # also the pages that segments grow by
BLOCK, MIN_OWN_SEGMENT, SEGMENT_STEP = 512, 10 * MIB, 2 * MIB
ADDRESSES = LARGE_SEGMENT << 26  # of a segment that grows: whole pages


class OutOfMemory(Exception):
    """Neither a free block nor a new one has room."""


@dataclass(eq=False)
class Block:
    """A stretch of one segment: in use, free, or (in a segment that grows) without memory."""

    start: int
    size: int
    pool: "Pool"
    in_use: bool = False
    is_mapped: bool = True
    before: "Block | None" = None
    after: "Block | None" = None

    @property
    def is_free(self) -> bool:
        return self.is_mapped and not self.in_use

    def split(self, size: int) -> None:
        """Keep the first bytes, and make a block of the rest."""
        rest = Block(self.start + size, self.size - size, self.pool, False, self.is_mapped)
        rest.before, rest.after, self.after, self.size = self, self.after, rest, size
        if rest.after is not None:
            rest.after.before = rest

    def join(self, other: "Block") -> None:
        """Take in the next block."""
        self.size += other.size
        self.after = other.after
        if self.after is not None:
            self.after.before = self


class Pool:
    """Segments of small tensors, or of large ones."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.free: list[tuple[int, int, Block]] = []  # by size, then by address
        self.unmapped: list[Block] = []  # by address

    def put(self, block: Block) -> None:
        """Make a block free, joined with its free neighbours."""
        block.in_use = False
        if block.before is not None and block.before.is_free:
            self.take(block.before)
            block.before.join(block)
            block = block.before
        if block.after is not None and block.after.is_free:
            self.take(block.after)
            block.join(block.after)
        bisect.insort(self.free, (block.size, block.start, block), key=lambda entry: entry[:2])

    def take(self, block: Block) -> None:
        """Remove a block from the free ones."""
        key = (block.size, block.start)
        del self.free[bisect.bisect_left(self.free, key, key=lambda entry: entry[:2])]

    def best_fit(self, size: int) -> Block | None:
        """Return the smallest free block of at least this size; one that can grow comes last."""
        at = bisect.bisect_left(self.free, size, key=lambda entry: entry[0])
        fitting = [entry[2] for entry in self.free[at : at + 2]]
        for block in fitting:
            if block.after is None or block.after.is_mapped:
                return block
        return fitting[0] if fitting else None


class CachingAllocator:
    """Memory of one GPU; `limit`: bytes that it may reserve."""

    def __init__(self, limit: int, expandable: bool) -> None:
        self.limit, self.expandable = limit, expandable
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.small, self.large = Pool(SMALL_SEGMENT), Pool(LARGE_SEGMENT)
        self.next_start = 0
        for pool in (self.small, self.large) if expandable else ():
            pool.unmapped.append(Block(self.next_start, ADDRESSES, pool, is_mapped=False))
            self.next_start += ADDRESSES

    def malloc(self, nbytes: int) -> Block:
        """Return a block of at least so many bytes, or raise OutOfMemory."""
        size = max(BLOCK, -(-nbytes // BLOCK) * BLOCK)
        pool = self.small if size <= SMALL else self.large
        block = pool.best_fit(size) or self._new(pool, size)
        if block is None:
            self._release_free()
            block = self._new(pool, size)
        if block is None:
            sizes = f"{size} bytes more than {self.reserved} reserved, {self.allocated} in use"
            raise OutOfMemory(f"{sizes}, of {self.limit}")
        pool.take(block)
        block.in_use = True
        rest = block.size - size
        if rest >= BLOCK if self.expandable or pool is self.small else rest > SMALL:
            block.split(size)
            pool.put(block.after)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Give a block back to its pool; the pool keeps the memory."""
        self.allocated -= block.size
        block.pool.put(block)

    def _new(self, pool: Pool, size: int) -> Block | None:
        """Return a free block in new memory, or None if the limit does not allow it."""
        if self.expandable:
            return self._grown(pool, size)
        step = pool.page if size < MIN_OWN_SEGMENT else SEGMENT_STEP
        segment = -(-size // step) * step
        if not self._reserve(segment):
            return None
        block = Block(self.next_start, segment, pool)
        self.next_start += 2 * segment  # no segment is another's neighbour
        pool.put(block)
        return block

    def _grown(self, pool: Pool, size: int) -> Block | None:
        """Map pages beside the first free block that can become large enough."""
        for hole in pool.unmapped:
            first = hole.before if hole.before is not None and hole.before.is_free else None
            start = first.start if first else hole.start
            missing = start + size - hole.start
            pages = min(hole.size, -(-missing // pool.page) * pool.page)
            after = hole.after if hole.after is not None and hole.after.is_free else None
            if pages < missing and (after is None or pages + after.size < missing):
                continue
            if not self._reserve(pages):
                return None
            pool.unmapped.remove(hole)
            if pages < hole.size:
                hole.split(pages)
                bisect.insort(pool.unmapped, hole.after, key=lambda block: block.start)
            hole.is_mapped = True
            pool.put(hole)
            return pool.best_fit(size)
        return None

    def _reserve(self, size: int) -> bool:
        if self.reserved + size > self.limit:
            return False
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _release_free(self) -> None:
        """Give segments that are free, or free pages of those that grow, back to the driver."""
        for pool in (self.small, self.large):
            for _, _, block in list(pool.free):
                if self.expandable:
                    self._unmap(pool, block)
                elif block.before is None and block.after is None:
                    pool.take(block)
                    self.reserved -= block.size

    def _unmap(self, pool: Pool, block: Block) -> None:
        start = -(-block.start // pool.page) * pool.page
        end = (block.start + block.size) // pool.page * pool.page
        if end <= start:
            return
        pool.take(block)
        pages = block
        if start > block.start:
            block.split(start - block.start)
            pages = block.after
        pages.in_use = True  # not joined with what stays mapped
        if pages is not block:
            pool.put(block)
        if end < pages.start + pages.size:
            pages.split(end - pages.start)
            pool.put(pages.after)
        self.reserved -= pages.size
        pages.in_use, pages.is_mapped = False, False
        for hole in (pages.before, pages.after):
            if hole is not None and not hole.is_mapped:
                pool.unmapped.remove(hole)
                first, second = (hole, pages) if hole.start < pages.start else (pages, hole)
                first.join(second)
                pages = first
        bisect.insort(pool.unmapped, pages, key=lambda block: block.start)
