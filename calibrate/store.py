"""The output of a quantization while it is being made, so that a run killed at any point resumes.

Everything is written to OUT.partial: `plan.json` (what is being done, to refuse mixing two runs), then one
`part-NNNNN.safetensors` per block, each under a temporary name, fsynced, renamed. A part that exists is complete. When
all are there they are merged into model.safetensors (or shards), config and tokenizer follow, and the directory is
renamed to OUT: OUT never holds half a model.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..models.checkpoint import read_json

# Bytes of one file of the finished model; merging holds one of them in memory.
_SHARD_BYTES = 2 << 30
# What a model directory holds beside weights and config: copied as it is.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "generation_config.json",
)

# Tensors by full name -> what torch.save writes.
Pickled = Callable[[Mapping[str, Tensor]], Any]


class Store:
    """Parts of one output directory."""

    def __init__(self, out: Path, plan: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.out, self.work = out, out.with_name(out.name + ".partial")
        if out.exists() and not overwrite:
            raise UserError(f"{out} exists. Fix: --overwrite to replace it, or another OUT")
        if self.work.exists() and (not resume or self._other_plan(plan)):
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(self.work / "plan.json", plan)

    def _other_plan(self, plan: dict[str, Any]) -> bool:
        path = self.work / "plan.json"
        # Without a plan nothing had been finished. JSON turns tuples into lists, so compare what would be read back.
        return not path.exists() or read_json(path) != json.loads(json.dumps(plan))

    def _part(self, index: int) -> Path:
        return self.work / f"part-{index:05d}.safetensors"

    def has(self, index: int) -> bool:
        return self._part(index).exists()

    def put(self, index: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write part `index` atomically, `facts` (JSON) along with it."""
        _save(self._part(index), {k: t.contiguous().cpu() for k, t in tensors.items()}, facts)

    def get(self, index: int) -> "Part":
        return Part(self._part(index))

    def finish(
        self,
        count: int,
        config: dict[str, Any],
        sidecars: dict[str, Any],
        source: Path,
        pickled: tuple[str, Pickled] | None = None,
    ) -> None:
        """Merge `count` parts, write config.json and the sidecar files, copy the tokenizer, move to OUT. With `pickled`
        (file name, function) all tensors go through the function into one pickle, not into safetensors.
        """
        if pickled:
            self._pickle(count, *pickled)
        else:
            self._merge(count)
        for name, content in {"config.json": config, **sidecars}.items():
            write_json(self.work / name, content)
        for pattern in _COMPANIONS:
            for file in source.glob(pattern):
                shutil.copyfile(file, self.work / file.name)
        (self.work / "plan.json").unlink()
        if self.out.exists():
            old = self.out.with_name(self.out.name + ".replaced")
            os.rename(self.out, old)
            os.rename(self.work, self.out)
            shutil.rmtree(old)
        else:
            os.rename(self.work, self.out)
        _sync_directory(self.out.parent)

    def discard(self) -> None:
        """Drop the parts, for a result that was written elsewhere."""
        shutil.rmtree(self.work)

    def _merge(self, count: int) -> None:
        shards = list(self._shards(count))
        if len(shards) == 1:
            self._write_shard("model.safetensors", shards[0])
        else:
            where: dict[str, str] = {}
            total = 0
            for number, names in enumerate(shards, 1):
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                total += self._write_shard(file, names)
                where |= {name: file for _, name in names}
            write_json(
                self.work / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where}
            )
        self._unlink_parts(count)

    def _pickle(self, count: int, file: str, content: Pickled) -> None:
        tensors = {name: part(name) for part in map(self.get, range(count)) for name in part}
        temporary = self.work / f"{file}.tmp"
        torch.save(content(tensors), temporary)
        commit(temporary, self.work / file)
        self._unlink_parts(count)

    def _unlink_parts(self, count: int) -> None:
        for index in range(count):
            self._part(index).unlink()

    def _shards(self, count: int) -> Iterator[list[tuple[int, str]]]:
        """(part, tensor name) lists, each at most a shard's bytes."""
        names: list[tuple[int, str]] = []
        size = 0
        for index in range(count):
            part = self.get(index)
            for name in part:
                tensor_bytes = part(name).nbytes
                if names and size + tensor_bytes > _SHARD_BYTES:
                    yield names
                    names, size = [], 0
                names.append((index, name))
                size += tensor_bytes
        yield names

    def _write_shard(self, file: str, names: list[tuple[int, str]]) -> int:
        tensors = {name: self.get(index)(name) for index, name in names}
        _save(self.work / file, tensors, {})
        return sum(t.nbytes for t in tensors.values())


class Part:
    """A finished part, read lazily; a `Reader` for a dialect's `load`."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, "pt")
        self._names = set(self._file.keys())

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __call__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    @property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self._file.metadata() or {}).get("facts", "{}"))
        return found


def _save(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    metadata = {"format": "pt", **({"facts": json.dumps(facts, sort_keys=True)} if facts else {})}
    save_file(tensors, temporary, metadata=metadata)
    # safetensors creates files for the owner alone; a model directory is read by whoever may read config.json.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    commit(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    commit(temporary, path)


def commit(temporary: Path, path: Path) -> None:
    """Make a finished file durable and give it its name."""
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
