"""AWQ checkpoints (AutoAWQ, gptqmodel; read by transformers, vLLM): 4 bits, integer zero points, three layouts.

    gemm       qweight int32 [K, N/8]   codes packed along N in the order 0 2 4 6 1 3 5 7, low nibble first
               qzeros  int32 [G, N/8]   zero points packed likewise, stored as they are
               scales  f16   [G, N]
    gemv       qweight int32 [N, K/8]   plain order along K
               qzeros  int32 [N, Z]     scales f16 [N, 8Z]; the groups are padded with zeros to 8Z
    gemv_fast  qweight int16 [N/4, K]   four rows interleaved
               qzeros  f16   [8Z, N]    -(scale * zero), rounded; scales f16 [8Z, N]

W[n, k] = (code - zero[g]) * scale[g]; in gemv_fast W = code * scale + qzeros, whose zero point is therefore a float.
New checkpoints are gemm; the others are read and written back as they came: converting would round the zero points of
gemv_fast.
Left out: the marlin and llm-awq versions (kernel layouts, no checkpoints that other loaders read).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import bits
from ..kernels.qtensor import QTensor
from ..kernels.spec import Spec
from .base import (
    Options,
    Reader,
    Recipe,
    Rule,
    bits_among,
    divides,
    fixed,
    float_name,
    group_size,
    kept,
    known,
    not_converted,
    regex_of,
    sized,
    unconverted,
)

NAMES = ("awq",)
SUFFIXES = ("qweight", "qzeros", "scales")
MARK = "qweight"
SIDECAR = ""
_VERSIONS = ("gemm", "gemv", "gemv_fast")
# gemm: nibble i of a word is column ORDER[i] of its eight.
_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
# gemv_fast: place j of 32 inputs holds input FAST[j]: pairs dealt to four lanes, evens before odds in each eight.
_FAST = torch.arange(32).view(4, 4, 2).transpose(0, 1).reshape(4, 4, 2).transpose(1, 2).reshape(32)


def detect(config: Mapping[str, Any]) -> Recipe | None:
    if config.get("quant_method", config.get("method")) != "awq":
        return None
    found = config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
    version = known(str(found).lower(), _VERSIONS, "version", "awq")
    known(config.get("bits", config.get("w_bit")), (4,), "bits", "awq")
    known(config.get("pack_dtype", "int32"), ("int32",), "pack_dtype", "awq")
    group = config.get("group_size", config.get("q_group_size", 128))
    skips = config.get("modules_to_not_convert")
    dynamic = tuple(_dynamic(pattern, override, group) for pattern, override in (config.get("dynamic") or {}).items())
    rules = (*not_converted(skips), *dynamic, ("*", _spec(group)))
    return Recipe("awq", rules, {"version": version, "modules_to_not_convert": skips})


def _dynamic(pattern: str, override: Any, group: int) -> Rule:
    """gptqmodel's per-module overrides: "-:regex" skips, "+:regex" or a bare regex changes group_size."""
    if pattern.startswith("-:"):
        return f"re:{pattern[2:]}", "skip"
    change = override if isinstance(override, Mapping) else {}
    known(change.get("bits", 4), (4,), f"dynamic[{pattern}].bits", "awq")
    return f"re:{pattern.removeprefix('+:')}", _spec(change.get("group_size", group))


def _spec(group: int, scale: str = "f16", zero: str = "asym") -> Spec:
    return Spec("affine", 4, group, scale=scale, zero=zero)


def recipe(options: Options) -> Recipe:
    bits_among(options, (4,), 4, "--bits 4, or --format gptq (2, 3, 4, 8 bits) or hqq (1, 2, 3, 4, 8 bits)")
    fixed(options, "AWQ kernels subtract a stored zero point and know no column order", sym=False, desc_act=False)
    return Recipe("awq", (("*", _spec(group_size(options, 128))),), {"version": "gemm"})


def shaped(spec: Spec, shape: tuple[int, int]) -> Spec:
    return spec


def check(spec: Spec, shape: tuple[int, int]) -> str:
    if spec.bits != 4:
        return f"{spec.bits} bits: AWQ holds 4 bits only. Fix: 4 bits, or --format gptq or hqq"
    if shape[0] % 8:
        return (
            f"out_features {shape[0]} is not a multiple of 8, the codes AWQ packs into a word. "
            f"Fix: --skip this module, or --format hqq or nf4, which pack any shape"
        )
    return divides(spec, shape)


def load(read: Reader, name: str, shape: tuple[int, int], recipe: Recipe) -> QTensor:
    spec = recipe.spec(name)
    assert spec is not None
    problem = check(spec, shape)
    if not problem and recipe.options["version"] == "gemv_fast" and shape[1] % 64:
        problem = f"in_features {shape[1]} is not a multiple of 64, which gemv_fast interleaves"
    if problem:
        raise UserError(f"{name}: {problem}. The quantization_config does not belong to this model")
    groups = 1 if spec.group == -1 else shape[1] // spec.group
    reader = {"gemm": _load_gemm, "gemv": _load_gemv, "gemv_fast": _load_fast}[recipe.options["version"]]
    parts = reader(read, name, shape, groups)
    zero = "asym" if parts["zeros"].dtype == torch.uint8 else "zf32"
    q = QTensor(_spec(spec.group, float_name(parts["scales"], f"{name}.scales"), zero), shape, parts)
    return QTensor(q.spec, shape, parts, kept(read, name, save(q, recipe), ("scales", "qzeros")))


def save(q: QTensor, recipe: Recipe) -> dict[str, Tensor]:
    writer = {"gemm": _save_gemm, "gemv": _save_gemv, "gemv_fast": _save_fast}[recipe.options["version"]]
    return {**writer(q), **q.extra}


def _load_gemm(read: Reader, name: str, shape: tuple[int, int], groups: int) -> dict[str, Tensor]:
    n, k = shape
    codes = _unpack_columns(sized(read, f"{name}.qweight", (k, n // 8)), n)
    zeros = _unpack_columns(sized(read, f"{name}.qzeros", (groups, n // 8)), n)
    scales = sized(read, f"{name}.scales", (groups, n))
    return {"codes": bits.pack(codes.T, 4), "scales": scales.T.contiguous(), "zeros": zeros.T.contiguous()}


def _save_gemm(q: QTensor) -> dict[str, Tensor]:
    codes = bits.unpack(q.parts["codes"], 4, q.shape[1])
    return {
        "qweight": _pack_columns(codes.T),
        "qzeros": _pack_columns(q.parts["zeros"].T),
        "scales": q.parts["scales"].T.contiguous(),
    }


def _unpack_columns(packed: Tensor, n: int) -> Tensor:
    """int32 [R, N/8] in AWQ's order -> uint8 [R, N]."""
    nibbles = bits.unpack(packed, 4, n).view(-1, n // 8, 8)
    return nibbles[..., torch.argsort(_ORDER)].flatten(1)


def _pack_columns(codes: Tensor) -> Tensor:
    return bits.pack(codes.reshape(codes.shape[0], -1, 8)[..., _ORDER].flatten(1), 4)


def _width(k: int, groups: int) -> int:
    """Words of zero points per row in gemv: 8 groups a word, whole units of 2 or 4 words for groups of 64 or 32."""
    unit = {64: 2, 32: 4}.get(k // groups, 1)
    return -(-groups // (8 * unit)) * unit


def _load_gemv(read: Reader, name: str, shape: tuple[int, int], groups: int) -> dict[str, Tensor]:
    n, k = shape
    width = _width(k, groups)
    zeros = bits.unpack(sized(read, f"{name}.qzeros", (n, width)), 4, groups)
    scales = sized(read, f"{name}.scales", (n, 8 * width))[:, :groups]
    codes = sized(read, f"{name}.qweight", (n, k // 8))
    return {"codes": codes, "scales": scales.contiguous(), "zeros": zeros.contiguous()}


def _save_gemv(q: QTensor) -> dict[str, Tensor]:
    zeros = _padded(q.parts["zeros"], q.shape[1])
    return {
        "qweight": q.parts["codes"],
        "qzeros": bits.pack(zeros, 4),
        "scales": _padded(q.parts["scales"], q.shape[1]),
    }


def _padded(per_group: Tensor, k: int) -> Tensor:
    """[N, G] -> [N, 8Z], zeros after the last group."""
    n, groups = per_group.shape
    out = torch.zeros(n, 8 * _width(k, groups), dtype=per_group.dtype)
    out[:, :groups] = per_group
    return out


def _load_fast(read: Reader, name: str, shape: tuple[int, int], groups: int) -> dict[str, Tensor]:
    n, k = shape
    width = 8 * _width(k, groups)
    packed = sized(read, f"{name}.qweight", (n // 4, k)).to(torch.int32)
    nibbles = torch.stack([packed >> s & 15 for s in (0, 4, 8, 12)], -1).to(torch.uint8)
    runs = nibbles.view(n // 4, k // 64, 4, 64).transpose(1, 2).reshape(n, k // 32, 32)
    codes = runs[..., torch.argsort(_FAST)].flatten(1)
    scales = sized(read, f"{name}.scales", (width, n))[:groups].T.contiguous()
    shift = sized(read, f"{name}.qzeros", (width, n))[:groups].T.contiguous()
    return {"codes": bits.pack(codes, 4), "scales": scales, "zeros": _zero_points(scales, shift)}


def _zero_points(scales: Tensor, shift: Tensor) -> Tensor:
    """The zero points behind shift = -(scale * zero): uint8 where integers give it without rounding, else float32."""
    wide = scales.float()
    zeros = torch.where(wide == 0, -shift.float(), -shift.float() / wide)
    whole = zeros.round().clamp(0, 15)
    return whole.to(torch.uint8) if torch.equal(-(whole * wide), shift.float()) else zeros


def _save_fast(q: QTensor) -> dict[str, Tensor]:
    n, k = q.shape
    runs = bits.unpack(q.parts["codes"], 4, k).view(n, k // 32, 32)[..., _FAST]
    nibbles = runs.reshape(n // 4, 4, k // 64, 64).transpose(1, 2).reshape(n // 4, k, 4).to(torch.int32)
    packed = nibbles[..., 0] | nibbles[..., 1] << 4 | nibbles[..., 2] << 8 | nibbles[..., 3] << 12
    scales = q.parts["scales"]
    shift = -(scales.float() * q.parts["zeros"].float())
    return {
        "qweight": packed.to(torch.int16),
        "qzeros": _padded(shift.to(scales.dtype), k).T.contiguous(),
        "scales": _padded(scales, k).T.contiguous(),
    }


def config(recipe: Recipe) -> dict[str, Any]:
    found = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": recipe.default.group,
        "zero_point": True,
        "version": recipe.options["version"],
        "modules_to_not_convert": unconverted(recipe),
    }
    dynamic = {f"+:{regex_of(p)}": {"group_size": s.group} for p, s in recipe.rules[:-1] if s != "skip"}
    return {**found, "dynamic": dynamic} if dynamic else found
