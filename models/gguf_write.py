"""Writing a GGUF file: header, then one tensor after the other, of which only a piece is in memory.

Everything goes to a temporary name beside the target, is fsynced and renamed: the path holds a whole file or none. A
file whose writing was cut off is written again from its start, which is copying: what takes long, choosing scales and
codes, is kept part by part by calibrate/store.py.

Layout: github.com/ggml-org/ggml, docs/gguf.md, version 3, little-endian.
"""

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..quant_formats.gguf_blocks import row_bytes, spec
from .gguf_file import TYPES

ALIGNMENT = 32
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TYPE_IDS = {name: number for number, (name, _, _) in TYPES.items()}
# Kind -> (value type, struct code); a kind with an s at its end is an array of the same.
_KINDS = {
    "uint16": (2, "H"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "string": (8, ""),
}
_ARRAY = 9
_LONGEST_NAME = 63

# Key -> (kind, value): "uint32", "float32", "bool", "string" ... or, with an s, an array of them.
Metadata = Mapping[str, tuple[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One tensor as the file will have it."""

    name: str
    # As torch orders it; the last dimension is that of a row.
    shape: tuple[int, ...]
    # "F16", "Q4_K" ...
    type_name: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * row_bytes(self.type_name, self.shape[-1])


def write(path: Path, metadata: Metadata, entries: Sequence[Entry], pieces: Callable[[Entry], Iterable[Tensor]]) -> int:
    """Write the file; returns its bytes.

    `pieces(entry)` gives the rows of a tensor from the first to the last in any number of tensors: uint8 [.., bytes of
    a row] for a block type, numbers [.., row] for F32, F16 and BF16 (rounded to it here). UserError for a tensor whose
    pieces are not as many bytes as its shape asks, a name that is too long, or a disk that is full.
    """
    header = _header(metadata, entries)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(header)
            for entry in entries:
                _tensor(file, entry, pieces(entry))
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}). Fix: free space, or another path") from error
    finally:
        temporary.unlink(missing_ok=True)
    return size


def as_read(metadata: Metadata) -> dict[str, Any]:
    """The values as gguf_file.py would give them back."""
    return {k: np.array(v) if kind.endswith("s") and kind != "strings" else v for k, (kind, v) in metadata.items()}


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(metadata: Metadata, entries: Sequence[Entry]) -> bytes:
    """Everything before the data, padded to where it begins."""
    found = [struct.pack("<4sIQQ", b"GGUF", 3, len(entries), len(metadata))]
    for key, (kind, value) in metadata.items():
        found += [_string(key), _value(key, kind, value)]
    offset, names = 0, set()
    for entry in entries:
        if len(entry.name.encode()) > _LONGEST_NAME or entry.name in names:
            raise UserError(f"tensor name {entry.name!r} is longer than {_LONGEST_NAME} bytes or occurs twice")
        names.add(entry.name)
        found.append(_string(entry.name) + struct.pack("<I", len(entry.shape)))
        found.append(struct.pack(f"<{len(entry.shape)}Q", *reversed(entry.shape)))
        found.append(struct.pack("<iQ", _TYPE_IDS[entry.type_name], offset))
        offset += entry.nbytes + -entry.nbytes % ALIGNMENT
    whole = b"".join(found)
    return whole + bytes(-len(whole) % ALIGNMENT)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, kind: str, value: Any) -> bytes:
    array = kind not in _KINDS
    number, code = _KINDS[kind.removesuffix("s") if array else kind]
    values = value if array else [value]
    try:
        raw = b"".join(map(_string, values)) if not code else struct.pack(f"<{len(values)}{code}", *values)
    except (struct.error, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"GGUF metadata key {key} is to hold {value!r:.60}, which is no {kind} ({error})") from error
    return struct.pack("<iiQ", _ARRAY, number, len(values)) + raw if array else struct.pack("<i", number) + raw


def _tensor(file: BinaryIO, entry: Entry, pieces: Iterable[Tensor]) -> None:
    written = 0
    dense = spec(entry.type_name) is None
    for piece in pieces:
        rows = piece.to("cpu", DENSE[entry.type_name]) if dense else piece.cpu()
        assert dense or rows.dtype is torch.uint8
        # No copy: the file takes the tensor's own memory.
        file.write(rows.contiguous().view(torch.uint8).reshape(-1).numpy().data)
        written += rows.nbytes
    if written != entry.nbytes:
        raise UserError(
            f"tensor {entry.name} ({entry.type_name} {list(entry.shape)}) takes {entry.nbytes} bytes and got {written}"
        )
    file.write(bytes(-written % ALIGNMENT))
