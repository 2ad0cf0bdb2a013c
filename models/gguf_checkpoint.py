"""A GGUF file as a checkpoint: the same weights under the same names as the model's safetensors checkpoint.

Packed tensors stay packed. Rows of blocks are independent, so what llama.cpp does to a weight's rows (q and k
interleaved, experts stacked) is undone on the packed rows. Embeddings are dequantized where they are looked up in; a
tied output is its own packed weight, since every token multiplies with it.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from ..errors import UserError
from ..kernels.qtensor import QTensor
from ..quant_formats.base import Recipe
from ..quant_formats.gguf_blocks import spec, unpack
from ..quant_formats.gguf_in_place import in_place
from .gguf_config import Metadata, read_config
from .gguf_file import TensorInfo, read_gguf
from .gguf_names import NO_WEIGHTS, Link, halved, links, meta_model
from .gguf_tokenizer import end_ids

_DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Whole numbers and float64 hold no weights in any architecture read here.
_NO_NUMBERS = ("F64", "I8", "I16", "I32", "I64")
_HEAD, _EMBEDDING = "lm_head.weight", "token_embd.weight"


class GGUFCheckpoint:
    """See `AnyCheckpoint` for what its members mean."""

    def __init__(self, path: Path) -> None:
        self.path = self.config_file = path
        self._file = read_gguf(path)
        self.config, self._arch = read_config(self._file)
        self._where = self._places()
        self.recipe = self._recipe()

    def _places(self) -> dict[str, list[tuple[Link, int]]]:
        """Checkpoint name -> the tensors it is made of, each with the weight's index in a stack."""
        try:
            model = meta_model(self.pretrained_config())
        except (ValueError, KeyError, TypeError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(
                f"{self.path}: transformers cannot build a {self.config['model_type']} model from this metadata "
                f"({error}). Fix: fetch the file again"
            ) from error
        places: dict[str, list[tuple[Link, int]]] = {}
        expected = links(model, self._arch)
        for link in expected:
            info = self._file.tensors.get(link.tensor)
            if info is None:
                # Optional ones there are none of; the loader names the others by the place that stays empty.
                continue
            self._check(info, link)
            for index, name in enumerate(link.weights):
                places.setdefault(name, []).append((link, index))
        known = {link.tensor for link in expected}
        unknown = [name for name in self._file.tensors if name not in known and not NO_WEIGHTS.match(name)]
        if unknown:
            raise UserError(
                f"{self.path}: {len(unknown)} tensors have no place in a {self.config['model_type']} model, the first "
                f"being {', '.join(unknown[:3])}. Nothing was loaded. Fix: use the model's safetensors checkpoint"
            )
        if self.config["tie_word_embeddings"] and self._is_packed(self._file.tensors[_EMBEDDING]):
            (link, index), *_ = next(place for place in places.values() if place[0][0].tensor == _EMBEDDING)
            places[_HEAD] = [(link, index)]
        return places

    def _check(self, info: TensorInfo, link: Link) -> None:
        shape = link.shape
        if link.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        if link.part:
            cut = -2 if link.transposed else -1
            shape = tuple(n // 2 if axis == len(shape) + cut else n for axis, n in enumerate(shape))
        stacked = (len(link.weights), *shape) if len(link.weights) > 1 else shape
        # A single output row is stored as a vector (qwen2moe's shared expert gate).
        accepted = (stacked, tuple(n for n in stacked if n != 1), (1, *shape))
        if info.shape not in accepted:
            raise UserError(
                f"{self.path}: tensor {info.name} has shape {list(info.shape)}, the metadata asks for {list(stacked)}. "
                "Fix: fetch the file again, or convert the model again"
            )
        if info.type_name in _NO_NUMBERS:
            raise UserError(
                f"{self.path}: tensor {info.name} has type {info.type_name}; accepted: F32, F16, BF16 and the "
                "quantized types. Fix: convert the model again"
            )

    @staticmethod
    def _is_packed(info: TensorInfo) -> bool:
        return info.type_name not in _DENSE

    def _recipe(self) -> Recipe | None:
        packed = {
            n.removesuffix(".weight"): self._file.tensors[p[0][0].tensor]
            for n, p in self._where.items()
            if self.weights[n]
        }
        if not packed:
            return None
        counts: Counter[str] = Counter()
        for info in packed.values():
            counts[info.type_name] += info.nbytes
        usual = spec(counts.most_common(1)[0][0])
        assert usual is not None
        modules = {name: found for name, info in packed.items() if (found := spec(info.type_name))}
        return Recipe("gguf", (("*", usual),), method="gguf", modules=modules)

    @property
    def files(self) -> list[Path]:
        return self._file.files

    @cached_property
    def weights(self) -> dict[str, bool]:
        return {
            name: all(link.quantizable and self._is_packed(self._file.tensors[link.tensor]) for link, _ in place)
            for name, place in self._where.items()
        }

    @cached_property
    def quantized_modules(self) -> frozenset[str]:
        return frozenset(name.removesuffix(".weight") for name, packed in self.weights.items() if packed)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def qtensor(self, weight: str, shape: tuple[int, int]) -> QTensor:
        ((link, index),) = self._where[weight]
        info = self._file.tensors[link.tensor]
        raw = info.raw()
        rows = raw.shape[0] // len(link.weights)
        if rows != shape[0]:
            raise UserError(
                f"{self.path}: weight {weight} has {rows} outputs, the model needs {shape[0]}. Fix: fetch it again"
            )
        raw = raw[index * rows : (index + 1) * rows]
        return in_place(info.type_name, raw, shape, halved(rows, link.heads) if link.heads else None)

    def __call__(self, name: str) -> Tensor:
        """A weight as numbers; a packed one dequantized in float32. UserError where it is missing."""
        if name not in self._where:
            raise UserError(f"tensor {name} is missing from {self.path}. Fix: fetch the file again")
        place = self._where[name]
        if len(place) == 1:
            return self._read(*place[0])
        link = place[0][0]
        whole = torch.empty(link.shape)
        for each, index in place:
            whole[..., int(each.part == "odd") :: 2] = self._read(each, index)
        return whole

    def dense(self, weight: str, shape: tuple[int, int] | None = None) -> Tensor:
        return self(weight)

    def _read(self, link: Link, index: int) -> Tensor:
        """What one tensor holds of a weight, as the checkpoint has it."""
        info = self._file.tensors[link.tensor]
        raw = info.raw()
        if self._is_packed(info):
            rows = raw.shape[0] // len(link.weights)
            part = raw[index * rows : (index + 1) * rows]
            found = unpack(info.type_name, part, (rows, info.shape[-1])).dequantize()
        else:
            found = raw.view(_DENSE[info.type_name]).reshape(len(link.weights), -1)[index]
        found = found.reshape(info.shape if link.part or link.transposed else link.shape)
        if link.heads:
            found = found[halved(found.shape[0], link.heads)]
        if link.offset:
            found = found.float() - link.offset
        return found.transpose(-1, -2) if link.transposed else found

    def pretrained_config(self) -> PretrainedConfig:
        return AutoConfig.for_model(**self.config)

    def generation_config(self) -> GenerationConfig | None:
        return GenerationConfig(
            bos_token_id=self.config["bos_token_id"],
            eos_token_id=end_ids(Metadata(self._file)),
            pad_token_id=self.config["pad_token_id"],
        )
