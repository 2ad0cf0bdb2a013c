"""Seconds to load a model for the CPU in bfloat16, beside those of reading its files.

Both begin with files that are not in the system's cache, and alternate, so that a disk whose speed drifts meets both.
A first load, whose figure is not kept, imports the model's code.
"""

import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

from ..models.checkpoint import open_checkpoint
from ..models.load import load_model

READ, LOAD = "read-cold", "load-cold"
_PIECE = 8 << 20


def measure(path: str | Path, samples: int) -> dict[str, list[float]]:
    """Seconds of each sample: READ and LOAD."""
    files = open_checkpoint(path).files
    load_model(path, "cpu", "bfloat16")
    found: dict[str, list[float]] = {READ: [], LOAD: []}
    for _ in range(samples):
        _forget(files)
        start = time.perf_counter()
        read(files)
        found[READ].append(time.perf_counter() - start)
        _forget(files)
        start = time.perf_counter()
        model = load_model(path, "cpu", "bfloat16")
        found[LOAD].append(time.perf_counter() - start)
        del model
    return found


def ratio(seconds: dict[str, list[float]]) -> float:
    """How many times reading loading takes, by the medians."""
    return statistics.median(seconds[LOAD]) / statistics.median(seconds[READ])


def read(files: Iterable[Path]) -> int:
    """Read all bytes into one buffer; their number."""
    piece, total = bytearray(_PIECE), 0
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while count := handle.readinto(piece):
                total += count
    return total


def _forget(files: Iterable[Path]) -> None:
    """Drop the files from the system's cache, where it takes that advice."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            # Pages that are not on the disk yet would stay.
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
