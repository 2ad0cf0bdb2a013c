"""Importance matrix: for every weight, the sum over calibration tokens of the squares of its inputs, in both forms that
llama.cpp keeps on disk.

    .gguf   tensors `<weight>.in_sum2` float32 [M, K] and `<weight>.counts` float32 [M, 1], M being 1 or the experts,
            and general.type "imatrix", imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size
    .dat    the older one, which knows no counts: int32 entries; each int32 length, name, int32 calls, int32 values,
            float32 values (mean * calls); then int32 chunks, int32 length, name of the text

Weights are called as in the GGUF file of the model. Facts from llama.cpp (MIT), tools/imatrix/imatrix.cpp and
common/imatrix-loader.cpp as of llama-cpp-python 0.3.36.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..models.gguf_file import GGUF, TensorInfo, read_gguf
from .stats import Squares, Stats
from .store import commit

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_FIX = "Fix: make it again with `bitsmith imatrix` or llama-imatrix, or fetch it again"


@dataclass(frozen=True)
class Entry:
    """What the inputs of one weight were; set by `from_stats` and `read`."""

    # float32 [M, K]: sums of squares by input column; M is 1, or the experts of a stacked weight.
    sums: Tensor
    # float32 [M]: tokens that were summed.
    counts: Tensor


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix; set by `from_stats` and `read`."""

    # By name of the weight in GGUF, `blk.0.attn_q.weight`.
    entries: Mapping[str, Entry]
    # The texts it was made from; informative.
    datasets: tuple[str, ...]
    # Blocks of that many tokens; the size is 0 where the file (.dat) does not say.
    chunk_count: int
    chunk_size: int
    # What messages call it: the file it was read from.
    where: str = "importance matrix"

    def importance(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Mean square of each input, float32 [M, K], for the weight `name` of `shape` [N, K] or [M, N, K]; None where
        there is no entry.

        Experts that no token reached get the mean of the others. UserError where the entry is of another shape.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        stacked, columns = math.prod(shape[:-2]), shape[-1]
        if entry.sums.numel() != stacked * columns:
            raise UserError(
                f"{self.where}: {name} has {entry.sums.numel()} values, the weight has {stacked} x {columns} "
                f"inputs. Fix: the matrix of this very model"
            )
        filled = with_prior(entry)
        return (filled.sums / filled.counts[:, None]).view(stacked, columns)


def with_prior(entry: Entry) -> Entry:
    """The entry, rows without a token replaced by one token's worth of what the other rows saw on average (ones where
    none saw any): the least a quantizer needs to treat their columns sensibly.
    """
    unseen = entry.counts == 0
    if not unseen.any():
        return entry
    seen = entry.counts.sum()
    prior = entry.sums[~unseen].sum(0) / seen if seen else torch.ones(entry.sums.shape[1])
    return Entry(torch.where(unseen[:, None], prior, entry.sums), torch.where(unseen, 1.0, entry.counts))


def from_stats(
    stats: Mapping[str, Stats | Squares],
    keys: Mapping[str, Sequence[str]],
    dataset: str,
    chunk_count: int,
    chunk_size: int,
) -> tuple[Imatrix, list[str]]:
    """The matrix of a calibration, and a line for each weight that it did not, or not wholly, reach.

    `keys` says which stats each weight's inputs are in, GGUF name -> one key, or one an expert. A weight none of whose
    inputs was seen is left out; experts that were not get `with_prior`. UserError where sums are not finite.
    """
    entries: dict[str, Entry] = {}
    said: list[str] = []
    for name, group in keys.items():
        found = [stats.get(key) for key in group]
        seen = [s for s in found if s is not None and s.n]
        if not seen:
            said.append(f"{name}: no token reached it; left out of the importance matrix")
            continue
        if len(seen) < len(group):
            missed = [str(i) for i, s in enumerate(found) if s is None or not s.n]
            said.append(
                f"{name}: no token was routed to {len(missed)} of {len(group)} experts ({', '.join(missed[:8])}"
                f"{' ...' if len(missed) > 8 else ''}); they get the mean of the others"
            )
        nothing = torch.zeros(seen[0].width, dtype=torch.float64)
        sums = torch.stack([s.squares.cpu() if s is not None and s.n else nothing for s in found]).float()
        counts = torch.tensor([float(s.n) if s is not None else 0.0 for s in found])
        if not sums.isfinite().all():
            raise UserError(
                f"{name}: its inputs on {dataset} are not finite, so the model itself computes NaN or inf. Fix: "
                f"`bitsmith inspect --validate`, and a sound checkpoint"
            )
        entries[name] = with_prior(Entry(sums, counts))
    if not entries:
        raise UserError(f"{dataset}: it reached none of the {len(keys)} weights: no importance matrix")
    return Imatrix(entries, (dataset,), chunk_count, chunk_size), said


def write(imatrix: Imatrix, path: Path) -> None:
    """Write it whole or not at all; as .dat where the path ends so, else as GGUF."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        if path.suffix == ".dat":
            temporary.write_bytes(_dat(imatrix))
        else:
            _write_gguf(imatrix, temporary)
        commit(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}). Fix: another -o FILE") from error


def _write_gguf(imatrix: Imatrix, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array(_DATASETS, list(imatrix.datasets))
    writer.add_uint32(_CHUNKS, imatrix.chunk_count)
    writer.add_uint32(_CHUNK_SIZE, imatrix.chunk_size)
    for name, entry in sorted(imatrix.entries.items()):
        writer.add_tensor(name + _SUMS, entry.sums.numpy())
        writer.add_tensor(name + _COUNTS, entry.counts[:, None].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _dat(imatrix: Imatrix) -> bytes:
    out = [struct.pack("<i", len(imatrix.entries))]
    for name, entry in sorted(imatrix.entries.items()):
        calls = max(1, -(-int(entry.counts.max()) // max(1, imatrix.chunk_size)))
        values = entry.sums / entry.counts[:, None] * calls
        out += [_named(name), struct.pack("<ii", calls, values.numel()), values.numpy().tobytes()]
    out += [struct.pack("<i", imatrix.chunk_count), _named(imatrix.datasets[-1] if imatrix.datasets else "")]
    return b"".join(out)


def _named(name: str) -> bytes:
    raw = name.encode()
    return struct.pack("<i", len(raw)) + raw


def read(path: Path) -> Imatrix:
    """The importance matrix in a file of either form. UserError, naming file and field, for anything else."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Fix: --imatrix FILE (.gguf or .dat)") from error
    return _from_gguf(path, read_gguf(path)) if magic == b"GGUF" else _Dat(path).read()


def _from_gguf(path: Path, file: GGUF) -> Imatrix:
    kind = file.metadata.get("general.type")
    if kind not in (None, "imatrix") or (kind is None and "general.architecture" in file.metadata):
        raise UserError(f"{path}: general.type is {kind!r}, accepted: 'imatrix'. Fix: --imatrix takes no model")
    datasets = file.metadata.get(_DATASETS)
    if not isinstance(datasets, list):
        raise UserError(f"{path}: {_DATASETS} is {datasets!r:.80}, expected a list of texts. {_FIX}")
    count, size = (_count(path, file.metadata, key) for key in (_CHUNKS, _CHUNK_SIZE))
    names = {info.removesuffix(suffix) for info in file.tensors for suffix in (_SUMS, _COUNTS) if info.endswith(suffix)}
    entries = {}
    for name in sorted(names):
        sums, counts = (_numbers(path, file.tensors.get(name + suffix), name + suffix) for suffix in (_SUMS, _COUNTS))
        if sums.numel() % counts.numel():
            raise UserError(
                f"{path}: {name}{_SUMS} has {sums.numel()} values, no multiple of the {counts.numel()} of "
                f"{name}{_COUNTS}. {_FIX}"
            )
        entries[name] = Entry(sums.view(counts.numel(), -1), counts)
    return Imatrix(_some(path, entries), tuple(datasets), count, size, str(path))


def _count(path: Path, metadata: Mapping[str, Any], key: str) -> int:
    found = metadata.get(key)
    if not isinstance(found, int):
        raise UserError(f"{path}: {key} is {found!r:.80}, expected a number. {_FIX}")
    return found


def _numbers(path: Path, info: TensorInfo | None, name: str) -> Tensor:
    """float32, flat."""
    if info is None:
        raise UserError(f"{path}: tensor {name} is missing, its partner is there. {_FIX}")
    if info.type_name != "F32":
        raise UserError(f"{path}: tensor {name} has type {info.type_name}, accepted: F32. {_FIX}")
    return _sound(path, name, info.raw().view(torch.float32).flatten().clone())


def _sound(path: Path, name: str, found: Tensor) -> Tensor:
    if not (found.isfinite() & (found >= 0)).all():
        raise UserError(f"{path}: {name} has values that are negative, inf or NaN: no sums of squares. {_FIX}")
    return found


def _some(path: Path, entries: dict[str, Entry]) -> dict[str, Entry]:
    if not entries:
        raise UserError(f"{path} has no entries. {_FIX}")
    return entries


class _Dat:
    """A .dat file: no length in it is believed before it is compared with what is left."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, path.read_bytes(), 0

    def read(self) -> Imatrix:
        count = self._int("the number of entries", least=1, each=13)
        entries: dict[str, Entry] = {}
        for index in range(count):
            name = self._text(f"the name of entry {index}", least=1)
            if name in entries:
                raise UserError(f"{self.path}: entry {index}, {name!r}, is a second one of that name. {_FIX}")
            calls = self._int(f"the calls of {name!r}", least=0)
            length = self._int(f"the number of values of {name!r}", least=1, each=4)
            values = np.frombuffer(self.data, "<f4", length, self.at).astype(np.float32)
            self.at += 4 * length
            sums = _sound(self.path, name, torch.from_numpy(values))
            # llama.cpp divides by no zero calls either.
            entries[name] = Entry(sums[None], torch.tensor([float(max(calls, 1))]))
        if self.at == len(self.data):
            return Imatrix(entries, (), 0, 0, str(self.path))
        chunks = self._int("the number of chunks", least=0)
        dataset = self._text("the name of the text", least=0)
        if self.at != len(self.data):
            raise UserError(f"{self.path}: {len(self.data) - self.at} bytes follow the end. {_FIX}")
        return Imatrix(entries, (dataset,) if dataset else (), chunks, 0, str(self.path))

    def _int(self, what: str, least: int, each: int = 0) -> int:
        if self.at + 4 > len(self.data):
            raise UserError(f"{self.path} ends in {what}: truncated, or no importance matrix. {_FIX}")
        (found,) = struct.unpack_from("<i", self.data, self.at)
        self.at += 4
        left = len(self.data) - self.at
        if found < least or found * each > left:
            raise UserError(
                f"{self.path}: {what} is {found}, {left} bytes are left: damaged, or no importance matrix. {_FIX}"
            )
        return int(found)

    def _text(self, what: str, least: int) -> str:
        length = self._int(f"the length of {what}", least, each=1)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: {what} is not valid UTF-8 ({raw[:40]!r}). {_FIX}") from error
