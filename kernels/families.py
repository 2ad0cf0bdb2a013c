"""Family: the grammar a dialect is read into, and the registry of the four.

A weight is decoded in three steps that mean the same in every family and on every device:

    unpack  words -> codes          value  code -> number          scale  number -> weight (group metadata)

The functions here are the torch twins: the oracle of every fast path. The rounding contract is float32 throughout, in
the order written in each family file, so that a device kernel that follows it agrees bit for bit. `grid` is the
offline half (kernels/grid.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from . import bits, grids
from .grid import Grid
from .spec import GRIDS, Spec

_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def stream(spec: Spec, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Codes [R, ceil(C / vec)] of a dense bit stream a row: uint8 up to 8 bits, else int32."""
    return bits.unpack(parts["codes"], spec.width, -(-shape[1] // spec.vec))


@dataclass(frozen=True)
class Family:
    """Runtime half of a family. All tensors on the device of the parts."""

    name: str
    # (spec, codes as `unpack` gives them, parts) -> float32 [R, C], or up to whole vectors more
    value: Callable[[Spec, Tensor, Mapping[str, Tensor]], Tensor]
    # (spec, values float32 [R, C], scale [R, C], zero [R, C] or None) -> float32 [R, C]
    scale: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    # (spec) -> zero point that is not stored, or None
    fixed_zero: Callable[[Spec], float | None]
    grid: Grid
    # Inputs a device tile must be a multiple of.
    tile: int
    # CUDA capability below which the device templates do not run (10 * major + minor).
    min_capability: int
    # (spec, parts, [R, C]) -> codes
    unpack: Callable[[Spec, Mapping[str, Tensor], tuple[int, int]], Tensor] = stream
    # (rows, inputs) of one slice codes[i, j] where the family keeps codes in tiles [R / rows, C / inputs, words], which
    # devices read as they are; None: a bit stream a row.
    code_tile: tuple[int, int] | None = None

    def decode(self, spec: Spec, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """parts -> float32 [R, C], `shape` being that of the grouped matrix."""
        values = self.value(spec, self.unpack(spec, parts, shape), parts)[:, : shape[1]]
        if "scales" not in parts:
            return values
        scale = spread(scales(spec, parts), spec, shape)
        zero = spread(parts["zeros"].float(), spec, shape) if "zeros" in parts else None
        scaled = self.scale(values, scale, zero if zero is not None else self._fixed(spec, scale))
        return scaled + spread(mins(spec, parts), spec, shape) if "mins" in parts else scaled

    def _fixed(self, spec: Spec, like: Tensor) -> Tensor | None:
        zero = self.fixed_zero(spec)
        return None if zero is None else torch.tensor(zero, device=like.device)


@cache
def family_by_name(name: str) -> Family:
    found: Family = import_module(f".{name}", __package__).FAMILY
    return found


def family(spec: Spec) -> Family:
    """The family of a spec; modules are imported on first use. A family's file name is its registry key."""
    return family_by_name(spec.family)


def scale_dtype(name: str) -> torch.dtype:
    """torch dtype of a one-level scale storage name (e8m0 and ue4m3 are held as bytes)."""
    return _DTYPES.get(name, torch.uint8)


def scales(spec: Spec, parts: Mapping[str, Tensor]) -> Tensor:
    """Effective scales, float32 [R', G].

    One level: the stored value (e8m0: 2**(byte-127)), times `global_scale` if there is one. Two levels: what the code
    stands for (itself, less an offset, an entry of `scale_table`, or as a named grid says) times the super scale of its
    block of consecutive scales in row-major order, plus `scale_offset` if there is one.
    """
    stored = parts["scales"]
    if spec.two_level is None:
        one = one_level(spec, stored)
        return one * parts["global_scale"].float() if "global_scale" in parts else one
    codes = level_codes(spec, stored, parts["super_scales"])
    if "scale_table" in parts:
        number = parts["scale_table"][codes.long()]
    elif spec.table in GRIDS:
        number = grids.scale_numbers(spec, codes)
    else:
        number = codes.float() - spec.scale_code[1]
    effective = _times_supers(spec, number, parts["super_scales"])
    return effective + parts["scale_offset"] if "scale_offset" in parts else effective


def mins(spec: Spec, parts: Mapping[str, Tensor]) -> Tensor:
    """Effective mins, float32 [R', G], of a spec whose zero is `min`: stored like its scales, codes unsigned."""
    if spec.two_level is None:
        return one_level(spec, parts["mins"])
    codes = level_codes(spec, parts["mins"], parts["super_mins"])
    return _times_supers(spec, codes.float(), parts["super_mins"])


def level_codes(spec: Spec, stored: Tensor, supers: Tensor) -> Tensor:
    """The codes of a two-level scale or min, uint8 [R', G]: bytes as they are, narrower ones from their bit stream.

    Those have whole super blocks a row, so the number of super scales says how many groups there are.
    """
    level = spec.two_level
    assert level is not None
    width = spec.scale_code[0]
    if width == 8:
        return stored
    return bits.unpack(stored, width, supers.numel() * level[1] // stored.shape[0])


def one_level(spec: Spec, stored: Tensor) -> Tensor:
    """Scales (or mins) of one level as stored -> float32: the inverse of `one_level_parts`."""
    if spec.scale == "e8m0":
        return torch.exp2(stored.float() - 127)
    if spec.scale == "ue4m3":
        return stored.view(torch.float8_e4m3fn).float()
    return stored.float()


def one_level_parts(spec: Spec, values: Tensor) -> Tensor:
    """Scales (or mins) that the storage of `spec` holds exactly, float32 -> as they are stored."""
    if spec.scale == "e8m0":
        return (torch.log2(values).round() + 127).to(torch.uint8)
    if spec.scale == "ue4m3":
        return values.to(torch.float8_e4m3fn).view(torch.uint8)
    return values.to(scale_dtype(spec.scale))


def _times_supers(spec: Spec, number: Tensor, supers: Tensor) -> Tensor:
    level = spec.two_level
    assert level is not None
    return number * supers.float().repeat_interleave(level[1])[: number.numel()].view_as(number)


def scale_shape(spec: Spec, shape: tuple[int, int]) -> tuple[int, int]:
    """[R', G] of the scales of a grouped matrix of `shape`."""
    rows = shape[0] if spec.rows == -1 else spec.rows
    group = shape[1] if spec.group == -1 else spec.group
    return -(-shape[0] // rows), -(-shape[1] // group)


def spread(per_group: Tensor, spec: Spec, shape: tuple[int, int]) -> Tensor:
    """[R', G] -> [R, C] (or a broadcastable [R, 1] / [1, 1] where a whole row or tensor shares the value)."""
    if spec.rows > 1:
        per_group = per_group.repeat_interleave(spec.rows, 0)[: shape[0]]
    if spec.group in (-1, shape[1]):
        return per_group
    return per_group.repeat_interleave(spec.group, 1)[:, : shape[1]]
