"""The container of a GGUF file: metadata and a table of tensors, read without trusting the file.

A reader of our own rather than gguf.GGUFReader, for three reasons: that one loops over the counts a file claims (a
damaged header runs it out of time and memory), reports no field by name, and refuses whole files for one tensor type it
does not know (Q2_0, type 42, in gguf 0.19). Here every count is checked against the bytes that are left before anything
is read, so time and memory stay proportional to the file.

Layout: github.com/ggml-org/ggml, docs/gguf.md. Versions 2 and 3, little-endian.
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

# ggml type id -> (name, weights per block, bytes per block). Q8_1 and Q8_K are activations and never in files.
TYPES: dict[int, tuple[str, int, int]] = {
    **{int(t): (t.name, *sizes) for t, sizes in gguf.GGML_QUANT_SIZES.items() if t.name not in ("Q8_1", "Q8_K")},
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_STRINGS = 2**24
_MAX_DIMS = 4
_SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and how it is stored."""

    name: str
    type: int
    # As torch orders it: the last dimension is contiguous and, where the type is quantized, cut into blocks.
    shape: tuple[int, ...]
    file: Path
    data: mmap.mmap | bytearray
    offset: int
    nbytes: int

    @property
    def type_name(self) -> str:
        return TYPES[self.type][0]

    def raw(self) -> Tensor:
        """The bytes, uint8 [rows, bytes per row], as a private mapping: nothing is read before it is used."""
        found = torch.frombuffer(self.data, dtype=torch.uint8, count=self.nbytes, offset=self.offset)
        return found.view(math.prod(self.shape[:-1]), -1)


@dataclass(frozen=True)
class GGUF:
    """One model: the metadata of its first file and the tensors of all of them."""

    files: list[Path]
    # Scalars and strings as Python has them; arrays of numbers as numpy arrays, of strings as lists.
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_gguf(path: Path) -> GGUF:
    """The model whose only or first file is `path`.

    UserError, naming file and field, for whatever is no sound GGUF: truncated, wrong magic or version, big-endian,
    counts and lengths beyond the file, unknown types, duplicate names, tensors that overlap or lie outside.
    """
    metadata, tensors = _read_one(path)
    files = [path]
    count = metadata.get("split.count", 0)
    if isinstance(count, int) and count > 1:
        files = _split_files(path, count)
        for number, file in enumerate(files[1:], 1):
            other, more = _read_one(file)
            if other.get("split.no") != number:
                raise _damaged(file, f"split.no is {other.get('split.no')}, expected {number}")
            if twice := sorted(set(tensors) & set(more)):
                raise _damaged(file, f"tensor {twice[0]} is in an earlier part too")
            tensors |= more
        total = metadata.get("split.tensors.count", len(tensors))
        if total != len(tensors):
            raise _damaged(path, f"split.tensors.count is {total}, the {count} parts hold {len(tensors)} tensors")
    return GGUF(files, metadata, tensors)


def _split_files(path: Path, count: int) -> list[Path]:
    found = _SPLIT.match(path.name)
    if found is None or int(found[3]) != count:
        raise UserError(
            f"{path} is one of {count} parts (split.count) but is not named *-00001-of-{count:05}.gguf, so the others "
            f"cannot be found. Fix: keep the names the parts were downloaded with"
        )
    names = [path.with_name(f"{found[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if int(found[2]) != 1:
        raise UserError(f"{path} is part {int(found[2])} of {count}. Fix: give the first part, {names[0].name}")
    missing = [name.name for name in names if not name.is_file()]
    if missing:
        raise UserError(f"{path}: {len(missing)} of {count} parts are missing, the first {missing[0]}. Fix: fetch them")
    return names


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}. Fix: fetch the file again, or convert the model again")


def _read_one(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Fix: fetch the file again") from error
    cursor = _Cursor(path, data)
    tensor_count, pair_count = _counts(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise _damaged(path, f"metadata key {key!r} occurs twice")
        metadata[key] = cursor.value(key, cursor.number("i", f"the type of {key!r}"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise _damaged(path, f"general.alignment is {alignment!r}, accepted: a power of two, at least 8")
    entries = [_tensor_entry(cursor) for _ in range(tensor_count)]
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, kind, shape, offset in entries:
        if name in tensors:
            raise _damaged(path, f"tensor {name!r} occurs twice")
        _, block, size = TYPES[kind]
        nbytes = math.prod(shape) // block * size
        if offset % alignment or start + offset + nbytes > len(data):
            raise _damaged(
                path,
                f"tensor {name!r} is said to lie at {offset} of the data ({nbytes} bytes), which is outside the file's "
                f"{max(len(data) - start, 0)} bytes of data or not aligned to {alignment}: truncated or damaged",
            )
        tensors[name] = TensorInfo(name, kind, shape, path, data, start + offset, nbytes)
    _refuse_overlap(path, list(tensors.values()))
    return metadata, tensors


def _counts(cursor: "_Cursor") -> tuple[int, int]:
    """Number of tensors and of metadata pairs, after magic and version."""
    magic = bytes(cursor.data[:4])
    if magic != b"GGUF":
        raise UserError(f"{cursor.path} begins with {magic!r}, not b'GGUF': it is no GGUF file. Fix: check the path")
    cursor.at = 4
    version = cursor.number("I", "the version")
    if version and version & 0xFFFF == 0:
        raise UserError(
            f"{cursor.path} is big-endian GGUF; accepted: little-endian. Fix: use the usual file, or turn it with "
            "gguf-convert-endian of the gguf package"
        )
    if version not in (2, 3):
        raise UserError(f"{cursor.path} is GGUF version {version}; accepted: 2, 3. Fix: convert the model again")
    tensors, pairs = cursor.number("Q", "the tensor count"), cursor.number("Q", "the metadata count")
    # The least a tensor takes in the table: name length, dimension count, type, offset; a pair: length, type, value.
    for count, least, what in ((tensors, 24, "tensors"), (pairs, 13, "metadata pairs")):
        if count * least > cursor.left:
            raise _damaged(cursor.path, f"{count} {what} are claimed, more than {cursor.left} bytes can hold")
    return tensors, pairs


def _tensor_entry(cursor: "_Cursor") -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.string("a tensor name")
    dims = cursor.number("I", f"the dimension count of {name!r}")
    if not 1 <= dims <= _MAX_DIMS:
        raise _damaged(cursor.path, f"tensor {name!r} has {dims} dimensions, accepted: 1 to {_MAX_DIMS}")
    shape = tuple(reversed([cursor.number("Q", f"a dimension of {name!r}") for _ in range(dims)]))
    kind = cursor.number("i", f"the type of {name!r}")
    offset = cursor.number("Q", f"the offset of {name!r}")
    if kind not in TYPES:
        raise UserError(
            f"{cursor.path}: tensor {name!r} has ggml type {kind}, which is unknown or was withdrawn from llama.cpp; "
            f"accepted: {', '.join(f'{t} {n}' for t, (n, _, _) in sorted(TYPES.items()))}. Fix: convert the model again"
        )
    type_name, block, _ = TYPES[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise _damaged(
            cursor.path,
            f"tensor {name!r} has shape {list(shape)}: every dimension must be positive, the last a multiple of the "
            f"{block} weights of a {type_name} block",
        )
    return name, kind, shape, offset


def _refuse_overlap(path: Path, tensors: list[TensorInfo]) -> None:
    tensors.sort(key=lambda t: t.offset)
    for one, two in pairwise(tensors):
        if one.offset + one.nbytes > two.offset:
            raise _damaged(path, f"tensors {one.name!r} and {two.name!r} overlap")


class _Cursor:
    """A position in the header; reads advance it and never go beyond the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def number(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        if size > self.left:
            raise _damaged(self.path, f"the file ends in {what}: truncated")
        (found,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return found

    def string(self, what: str) -> str:
        length = self.number("Q", what)
        if length > self.left:
            raise _damaged(self.path, f"{what} claims {length} bytes, {self.left} are left: truncated or damaged")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise _damaged(self.path, f"{what} is not valid UTF-8 ({raw[:40]!r})") from error

    def strings(self, key: str, count: int) -> list[str]:
        """A vocabulary has 10**5 entries: what `string` does, without its message for each."""
        raw, at, size = [], self.at, len(self.data)
        length_at = struct.Struct("<Q").unpack_from
        for index in range(count):
            end = at + 8 + (length_at(self.data, at)[0] if at + 8 <= size else size)
            if end > size:
                raise _damaged(self.path, f"element {index} of {key!r} goes beyond the end: truncated or damaged")
            raw.append(self.data[at + 8 : end])
            at = end
        self.at = at
        try:
            return [each.decode() for each in raw]
        except UnicodeDecodeError as error:
            raise _damaged(self.path, f"an element of {key!r} is not valid UTF-8 ({error.object[:40]!r})") from error

    def value(self, key: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], f"the value of {key!r}")
        if kind == _STRING:
            return self.string(f"the value of {key!r}")
        if kind != _ARRAY:
            raise _damaged(self.path, f"metadata key {key!r} has value type {kind}, accepted: 0 to 12")
        item = self.number("i", f"the element type of {key!r}")
        count = self.number("Q", f"the length of {key!r}")
        if item not in _SCALARS and item != _STRING:
            raise _damaged(self.path, f"metadata key {key!r} is an array of type {item}, accepted: numbers and strings")
        size = 8 if item == _STRING else struct.calcsize("<" + _SCALARS[item])
        if count * size > self.left or (item == _STRING and count > _MAX_STRINGS):
            raise _damaged(self.path, f"{key!r} is said to have {count} elements, more than {self.left} bytes can hold")
        if item == _STRING:
            return self.strings(key, count)
        found = np.frombuffer(self.data, "<" + _SCALARS[item], count, self.at)
        self.at += count * size
        return found
