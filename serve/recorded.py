"""Decode steps on the CPU, recorded once for each number of sequences and repeated (kernels/recording.py).

With one sequence Python takes a third of a step of a 1.1 B model, with thirty-two a thirtieth. A recording holds what
the layers computed, 1.3 MB a sequence there, so only so many are kept. A model whose step depends on contents beyond
what the operators read (experts chosen in Python, a cache torch has to gather) cannot be recorded: that is found out
once, and it runs as before.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.recording import Recording, Unrecordable, record
from ..models.batch import Batch

LARGEST = 32
# Sequences of all recordings together; those not used for longest go.
_KEPT = 48
_LOG = logging.getLogger(__name__)


class Recorded:
    """`forward` for batches of decode rows only; `pages` is the width a block table can have."""

    def __init__(self, forward: Callable[[Batch], Tensor], pages: int) -> None:
        self._forward, self._pages = forward, pages
        self._found: dict[tuple[int, int], tuple[Batch, Recording]] = {}
        self._possible = True

    def run(self, batch: Batch) -> Tensor | None:
        """What `forward` returns, in a tensor that the next run overwrites; None for a batch not to be recorded."""
        rows = batch.ids.shape[0]
        if not self._possible or rows > LARGEST or batch.num_decode != rows:
            return None
        # Products divide their work among as many threads as there were.
        key = (rows, torch.get_num_threads())
        if key in self._found:
            own, recording = self._found[key] = self._found.pop(key)
            _fill(own, batch)
            return recording()
        own = replace(
            batch,
            block_table=batch.block_table.new_zeros(rows, self._pages),
            **{name: getattr(batch, name).clone() for name in _CONTENTS},
        )
        _fill(own, batch)
        try:
            recording = record(lambda: self._forward(own))
        except Unrecordable as reason:
            _LOG.info("decode steps are not recorded: %s", reason)
            self._possible = False
            return None
        while sum(rows for rows, _ in self._found) > _KEPT - rows:
            del self._found[next(iter(self._found))]
        self._found[key] = own, recording
        return recording.output


# What differs between two batches of decode rows, besides the block table.
_CONTENTS = ("ids", "positions", "context_len", "slots")


def _fill(own: Batch, batch: Batch) -> None:
    for name in _CONTENTS:
        getattr(own, name).copy_(getattr(batch, name))
    own.block_table[:, : batch.block_table.shape[1]].copy_(batch.block_table)
