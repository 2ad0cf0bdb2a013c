"""KV-cache codecs: how one key or value vector is stored, and the cache that holds them.

A codec is a file of this folder; its name is the registry key. It sees `[T, heads, dim]` vectors one token at a time,
in any order, so scales are per token (and head, or group within a head). Keys arrive after RoPE, as transformers
hands them to the attention function: per-token codecs lose nothing by that, but codecs that need keys before RoPE
(KVQuant's per-channel key scales) cannot be written here.

A CPU's attention kernels read two layouts without a codec's `decode` (kernels.native_layer.reads): bfloat16 numbers,
and int8 codes with a bfloat16 scale for each vector, number = code * scale. A codec that means something else by parts
of these shapes and dtypes must shape them otherwise.

`KVCache` is the one place that allocates parts, stores through `encode` and hands gathered parts to `decode`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import paged
from ..kernels.attention import KVShape, Parts, store
from ..kernels.cases import Case, Target, Weight


@dataclass(frozen=True)
class KVCodec:
    """One way to store vectors. `dtype` is the model's: what encode receives and decode returns."""

    name: str
    dtype: torch.dtype
    # (heads, dim) -> bytes that one token takes in one layer, for K or for V alone
    bytes_per_token: Callable[[int, int], int]
    # (slots, heads, dim, device) -> parts, each [slots, heads, ...]; contents undefined
    alloc: Callable[[int, int, int, torch.device], Parts]
    # x [T, heads, dim] -> parts [T, heads, ...] in the order and dtypes of alloc
    encode: Callable[[Tensor], Parts]
    # parts [N, heads, ...] -> [N, heads, dim] in dtype
    decode: Callable[[Parts], Tensor]
    # Name of the module whose DEVICE (kernels.kv_device.KVDevice) does the same on a GPU, bit for bit; "" if there is
    # none, and attention runs in torch
    device: str = ""


def codec_names() -> list[str]:
    """Every codec there is: the files of this folder beside this one."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "base")


def load_codec(name: str, dtype: torch.dtype) -> KVCodec:
    """The codec `name` ("auto" is "none") for a model of `dtype`. UserError if there is no such file."""
    name = "none" if name == "auto" else name
    if name not in codec_names():
        raise UserError(f"kv_cache_dtype {name!r} is unknown; choose one of: auto, {', '.join(codec_names())}")
    codec: KVCodec = import_module(f".{name}", __package__).codec(dtype)
    return codec


class KVCache:
    """K and V of every layer in `num_blocks` blocks of `block_size` tokens; see models.batch.PagedCache."""

    def __init__(
        self, codec: KVCodec, shapes: dict[int, KVShape], num_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self.codec, self.num_blocks, self.block_size = codec, num_blocks, block_size
        self.kernels = codec.device if paged.use_kernels(device, codec.name, codec.device) else ""
        slots = num_blocks * block_size
        self._parts = {
            layer: (codec.alloc(slots, s.heads, s.key_dim, device), codec.alloc(slots, s.heads, s.value_dim, device))
            for layer, s in shapes.items()
        }

    def store(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write key `[T, heads, key_dim]` and value `[T, heads, value_dim]` to `slots[T]`."""
        parts_k, parts_v = self._parts[layer]
        if self.kernels:
            paged.kv_store(key, value, slots, parts_k, parts_v, self.kernels)
            return
        store(parts_k, key, slots, self.codec.encode)
        store(parts_v, value, slots, self.codec.encode)

    def parts(self, layer: int) -> tuple[Parts, Parts]:
        """The layer's K parts and V parts, each `[slots, heads, ...]`."""
        return self._parts[layer]

    def decode(self, parts: Parts) -> Tensor:
        """Gathered parts -> `[N, heads, dim]` in the model's dtype."""
        return self.codec.decode(parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for pair in self._parts.values() for parts in pair for part in parts)


def bytes_per_block(codec: KVCodec, shapes: dict[int, KVShape], block_size: int) -> int:
    """Bytes one block takes over all layers, K and V."""
    per_token = sum(
        codec.bytes_per_token(s.heads, s.key_dim) + codec.bytes_per_token(s.heads, s.value_dim) for s in shapes.values()
    )
    return per_token * block_size


def aot_cases(target: Target, weights: Sequence[Weight]) -> Iterator[Case]:
    """Attention and store of every codec with device functions; see kernels.cases."""
    del weights
    for name in codec_names():
        codec = load_codec(name, torch.bfloat16 if target.dtype == "bf16" else torch.float16)
        if codec.device:
            parts = codec.alloc(1, 1, 16, torch.device("cpu"))
            yield from paged.codec_cases(name, codec.device, [part.dtype for part in parts], target)
