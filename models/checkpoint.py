"""Checkpoint: one model directory (or hub id), quantized or not, read tensor by tensor.

Everything above sees *weights*: `X.weight` is listed once whether the file holds X.weight, X.qweight + X.scales or
X.W_q, and is given as a QTensor or dequantized. Files are memory-mapped safetensors; HQQ's own qmodel.pt is opened
with the restricted unpickler (weights_only), any other pickle is refused.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from ..errors import UserError
from ..kernels.qtensor import QTensor
from ..quant_formats import base

_NATIVE_HQQ = "qmodel.pt"
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
# Bytes that one hint asks for, and those of a file's header or most of it.
_AHEAD, _HEADER = 1 << 20, 1 << 16


def resolve(path: str | Path) -> Path:
    """A local model directory or .gguf file for PATH: itself, or the snapshot of a hub id (the GGUF file of a directory
    that has no other weights). UserError where there is neither.
    """
    local = Path(path)
    if local.is_dir():
        return _only_gguf(local) or local
    if local.suffix == ".gguf" and local.is_file():
        return local
    if local.is_file():
        raise UserError(
            f"{path} is a file; bitsmith reads a model directory (config.json and *.safetensors), a .gguf file or a "
            f"hub id. Fix: give the directory that holds it"
        )
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise UserError(
            f"{path} does not exist. Fix: check the path; it must be a model directory or a hub id such as org/name"
        )
    return _download(str(path))


def _only_gguf(directory: Path) -> Path | None:
    """The GGUF file of a directory whose weights are in GGUF, else None. UserError where it has several."""
    if any(directory.glob("*.safetensors")) or (directory / _NATIVE_HQQ).exists():
        return None
    models = [p for p in sorted(directory.glob("*.gguf")) if "mmproj" not in p.name and not _LATER_PART.search(p.name)]
    if len(models) > 1:
        raise UserError(
            f"{directory} holds {len(models)} GGUF models ({', '.join(p.name for p in models[:3])} ...). "
            f"Fix: give the path of one of them"
        )
    return models[0] if models else None


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{hub_id} is no local directory and could not be fetched from the hub ({type(error).__name__}). "
            f"Fix: check the name and the network, or download it and give the directory"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError naming the file where it is missing, unreadable or something else."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Fix: give a complete model directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Fix: fetch the file again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, expected a JSON object. Fix: fetch the file again")
    return found


class AnyCheckpoint(Protocol):
    """What the loader, the quantization driver and inspection read a model from."""

    path: Path
    # What messages about the configuration name.
    config_file: Path
    # config.json, or what a file without one says the same with.
    config: dict[str, Any]
    # Which spec a module has; None where nothing is quantized.
    recipe: base.Recipe | None

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        ...

    @property
    def weights(self) -> dict[str, bool]:
        """Name of every weight (`X.weight` for a quantized module) -> whether it is quantized."""
        ...

    @property
    def quantized_modules(self) -> frozenset[str]:
        """Paths of the modules whose weight is quantized."""
        ...

    def __call__(self, name: str) -> Tensor:
        """An unquantized weight, as stored. UserError naming it where it is missing."""
        ...

    def qtensor(self, weight: str, shape: tuple[int, int]) -> QTensor:
        """The quantized weight named `X.weight`, of `shape` (out_features, in_features)."""
        ...

    def dense(self, weight: str, shape: tuple[int, int] | None = None) -> Tensor:
        """A weight as plain numbers; dequantized in float32 where it is quantized (then `shape` is needed)."""
        ...

    def pretrained_config(self) -> PretrainedConfig:
        """What transformers builds the model from, without a quantization_config. UserError where it cannot."""
        ...

    def generation_config(self) -> GenerationConfig | None:
        """Sampling defaults and the tokens that end a completion; None where the checkpoint says nothing."""
        ...


def open_checkpoint(path: str | Path) -> AnyCheckpoint:
    """The checkpoint at a directory, .gguf file or hub id. UserError where there is none that can be read."""
    found = resolve(path)
    if found.suffix == ".gguf" and found.is_file():
        from .gguf_checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(found)
    return Checkpoint(found)


class Checkpoint:
    """Tensors of one model directory.

    `name in ckpt` and `ckpt(name)` serve the files' own tensors (the `Reader` a dialect's `load` takes); `weights()`,
    `quantized()`, `qtensor()` and `dense()` serve weights.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = resolve(path)
        self.config_file = self.path / "config.json"
        self.config = read_json(self.config_file)
        self._native: dict[str, Tensor] | None = None
        if (self.path / _NATIVE_HQQ).exists():
            self._open_native()
        found = base.detect(self.config, str(self.config_file))
        self.format: base.Format | None = found[0] if found else None
        self.recipe: base.Recipe | None = found[1] if found else None

    def _open_native(self) -> None:
        from ..quant_formats import hqq

        file = self.path / _NATIVE_HQQ
        try:
            modules = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}). Fix: fetch the file again") from error
        quantization, self._native = hqq.native_to_tensors(modules)
        self.config = {**self.config, "quantization_config": quantization}

    @cached_property
    def _where(self) -> dict[str, Path]:
        """Tensor name -> file."""
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            return {name: self.path / file for name, file in read_json(index).get("weight_map", {}).items()}
        whole = self.path / "model.safetensors"
        files = [whole] if whole.exists() else sorted(self.path.glob("*.safetensors"))
        if not files:
            raise UserError(self._no_weights())
        # One after the other, each with what the system reads around it, 23 headers took 0.2 s; together 4 ms.
        _advise(files, _HEADER)
        return {name: file for file in files for name in self._open(file).keys()}  # noqa: SIM118 (safe_open is no mapping)

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted(set(self._where.values())) if self._native is None else [self.path / _NATIVE_HQQ]

    def _no_weights(self) -> str:
        pickles = sorted(p.name for p in self.path.glob("*.bin"))
        if pickles:
            return (
                f"{self.path} holds {pickles[0]}, a pickle, which can run code when opened and is not read. "
                f"Fix: convert it to safetensors (transformers: model.save_pretrained)"
            )
        return f"{self.path} holds no *.safetensors file. Fix: give a directory with the model's weights"

    def _open(self, file: Path) -> Any:
        handles: dict[Path, Any] = self.__dict__.setdefault("_handles", {})
        if file not in handles:
            try:
                handles[file] = safe_open(file, "pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file} cannot be read as safetensors ({error}): missing, truncated or damaged. Fix: fetch "
                    "the file again"
                ) from error
        return handles[file]

    def __contains__(self, name: str) -> bool:
        return name in (self._where if self._native is None else self._native)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where if self._native is None else self._native)

    def __call__(self, name: str) -> Tensor:
        """A tensor of the files, as stored. UserError naming it where it is missing."""
        if name not in self:
            raise UserError(f"tensor {name} is missing from {self.path}. Fix: fetch the checkpoint again")
        if self._native is not None:
            return self._native[name]
        file = self._where[name]
        try:
            tensor: Tensor = self._open(file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"tensor {name} cannot be read from {file} ({error}). Fix: fetch the file again") from error
        return tensor

    @cached_property
    def quantized_modules(self) -> frozenset[str]:
        """Paths of the modules whose weight is quantized: those that carry the dialect's mark and the recipe does not
        skip.
        """
        if self.format is None or self.recipe is None:
            return frozenset()
        mark = "." + self.format.MARK
        marked = (name.removesuffix(mark) for name in self if name.endswith(mark))
        return frozenset(m for m in marked if self.recipe.spec(m) is not None)

    @cached_property
    def weights(self) -> dict[str, bool]:
        """Name of every weight (`X.weight` for a quantized module) -> whether it is quantized."""
        found: dict[str, bool] = {}
        for name in self:
            module = self._owner(name)
            found[f"{module}.weight" if module else name] = module is not None
        return found

    def _owner(self, name: str) -> str | None:
        """The quantized module a tensor belongs to, or None."""
        if self.format is None:
            return None
        for suffix in self.format.SUFFIXES:
            module = name.removesuffix("." + suffix)
            if module != name and module in self.quantized_modules:
                return module
        return None

    def qtensor(self, weight: str, shape: tuple[int, int]) -> QTensor:
        """The quantized weight named `X.weight`, of `shape` (out_features, in_features)."""
        assert self.format is not None and self.recipe is not None
        return self.format.load(self, weight.removesuffix(".weight"), shape, self.recipe)

    def dense(self, weight: str, shape: tuple[int, int] | None = None) -> Tensor:
        """A weight as plain numbers; dequantized in float32 where it is quantized (then `shape` is needed)."""
        if not self.weights.get(weight, False):
            return self(weight)
        assert shape is not None
        return self.qtensor(weight, shape).dequantize()

    def pretrained_config(self) -> PretrainedConfig:
        try:
            config = AutoConfig.from_pretrained(self.path)
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.config_file}: transformers cannot build this model ({error})") from error
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        return config

    def generation_config(self) -> GenerationConfig | None:
        exists = (self.path / "generation_config.json").exists()
        return GenerationConfig.from_pretrained(self.path) if exists else None


def read_ahead(files: Iterable[Path]) -> None:
    """Have the system read `files` while the model is built and the first weights are packed.

    A hint: nothing waits for it, and a file that is missing is the reader's to report.
    """
    Thread(target=_advise, args=([*files],), daemon=True).start()


def _advise(files: Iterable[Path], most: int | None = None) -> None:
    """Have the system read the first `most` bytes of each, all by default, where it takes that advice."""
    for file in files if hasattr(os, "posix_fadvise") else ():
        if not file.is_file() or not os.access(file, os.R_OK):
            continue
        descriptor = os.open(file, os.O_RDONLY)
        try:
            # A call reads no more than the device's read-ahead, some MB at most.
            for start in range(0, most or os.fstat(descriptor).st_size, _AHEAD):
                os.posix_fadvise(descriptor, start, min(_AHEAD, most or _AHEAD), os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
