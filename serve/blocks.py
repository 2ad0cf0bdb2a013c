"""Who owns which block of the paged KV cache: a free list and a reference count per block, nothing else.

The cache is cut into blocks of `block_size` token slots. A sequence's block table lists its blocks in order: token `i`
lives in slot `table[i // block_size] * block_size + i % block_size` (PagedAttention, https://arxiv.org/abs/2309.06180).
Tables belong to the sequences; the manager only hands blocks out and takes them back. A count above one means that
tables share the block (`share`), as a prefix cache will. Copy-on-write is left out: only complete blocks, which are
never written again, may be shared.

Pure Python: no tensor, no torch.
"""

from collections import Counter, deque
from collections.abc import Iterable

from ..errors import UserError


class BlockManager:
    """A pool of `num_blocks` blocks of `block_size` token slots each. UserError if either is not positive."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                hint = "give the KV cache more memory" if name == "num_blocks" else "16 is the usual value"
                raise UserError(f"{name} is {value}: the KV cache needs at least 1; {hint}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(num_blocks))
        self._refs = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Token slots in the whole pool."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def missing(self, table: list[int], num_tokens: int) -> int:
        """Blocks `table` lacks to hold `num_tokens` tokens."""
        return max(0, self.blocks_for(num_tokens) - len(table))

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Append free blocks to `table` until it holds `num_tokens` tokens.

        False, and nothing taken, if too few are free.
        """
        wanted = self.missing(table, num_tokens)
        if wanted > self.num_free:
            return False
        for _ in range(wanted):
            block = self._free.popleft()
            self._refs[block] = 1
            table.append(block)
        return True

    def share(self, table: list[int], blocks: Iterable[int]) -> None:
        """Append `blocks`, complete and held by another table, to `table` as well."""
        for block in blocks:
            assert self._refs[block] > 0, f"block {block} is free and cannot be shared"
            self._refs[block] += 1
            table.append(block)

    def free(self, table: list[int]) -> None:
        """Give up every block of `table` and empty it. A block is free again when no table holds it."""
        self.shrink(table, 0)

    def shrink(self, table: list[int], num_tokens: int) -> None:
        """Give up the blocks of `table` beyond those that hold `num_tokens` tokens."""
        # Last block first: the head of a prompt, worth most to a prefix cache, is reused last.
        while len(table) > self.blocks_for(num_tokens):
            block = table.pop()
            assert self._refs[block] > 0, f"block {block} is freed twice"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free.append(block)

    def slot(self, table: list[int], position: int) -> int:
        """The cache slot of token `position`."""
        return table[position // self.block_size] * self.block_size + position % self.block_size

    def check_integrity(self, tables: Iterable[list[int]] = ()) -> None:
        """AssertionError unless `tables` (all that are alive) and the free list account for every block exactly.

        Cheap enough to call whenever the scheduler is idle.
        """
        held = Counter(block for table in tables for block in table)
        free = set(self._free)
        assert len(free) == len(self._free), "a block is in the free list twice"
        for block, refs in enumerate(self._refs):
            assert refs == held[block], f"block {block}: {refs} references counted, {held[block]} tables hold it"
            assert (refs == 0) == (block in free), (
                f"block {block}: {refs} references, in the free list: {block in free}"
            )
