"""FP8 checkpoints of DeepSeek and transformers (vLLM reads the tiled form): E4M3, one scale per tensor or tile.

    weight            f8_e4m3 [N, K]
    weight_scale_inv  f32 or bf16 []                                 per tensor
                      f32, bf16 or e8m0 [ceil(N/bm), ceil(K/bn)]     per tile, the last tiles partial
    activation_scale  f32 []                                         static; kept, not used: activations stay floats

W = weight * weight_scale_inv: despite its name the tensor multiplies. gptqmodel writes the reciprocal under the same
name and quant_method and says so in `weight_scale_semantics: "inverse"`; it is read as 1 / scale (6e-8 relative) and
written back as it came. What a module holds is told by the shape of its scale, not by the config. transformers loads
tiles only where they divide the weight. Left out: E5M2 weights, FP4 experts, vLLM's per-tensor spelling
`weight_scale`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import bits
from ..kernels.families import scale_shape
from ..kernels.qtensor import QTensor
from ..kernels.spec import Spec
from .base import Options, Reader, Recipe, bits_among, fixed, float_name, kept, known, not_converted, sized, unconverted

NAMES = ("fp8", "fp8-block")
SUFFIXES = ("weight", "weight_scale_inv", "activation_scale", "input_scale")
MARK = "weight_scale_inv"
SIDECAR = ""
# Keys of gptqmodel's config that its reader wants back.
_GPTQMODEL = (
    "bits", "group_size", "desc_act", "sym", "lm_head", "method", "format", "checkpoint_format", "pack_dtype", "meta",
    "weight_scale_method", "weight_scale_semantics",
)  # fmt: skip


def detect(config: Mapping[str, Any]) -> Recipe | None:
    if config.get("quant_method") != "fp8":
        return None
    known(config.get("fmt", "e4m3"), ("e4m3", "float8_e4m3fn"), "fmt", "fp8")
    known(config.get("checkpoint_format", "float8_e4m3fn"), ("float8_e4m3fn",), "checkpoint_format", "fp8")
    known(config.get("expert_dtype", "fp8"), ("fp8",), "expert_dtype", "fp8")
    known(config.get("weight_scale_semantics"), (None, "inverse"), "weight_scale_semantics", "fp8")
    skips = config.get("modules_to_not_convert", config.get("ignored_layers"))
    options = {k: config[k] for k in ("activation_scheme", "scale_fmt", "modules_to_convert") if k in config}
    if "weight_scale_semantics" in config:
        options |= {k: config[k] for k in _GPTQMODEL if k in config}
    tile = config.get("weight_block_size")
    known(len(tile or (0, 0)), (2,), "length of weight_block_size", "fp8")
    name = "fp8-block" if tile else "fp8"
    spec = tile_spec(*tile) if tile else tile_spec(-1, -1)
    return Recipe(name, (*not_converted(skips), ("*", spec)), {**options, "modules_to_not_convert": skips})


def tile_spec(rows: int, group: int, scale: str = "f32") -> Spec:
    return Spec("minifloat", 8, group, rows=rows, scale=scale, table="e4m3")


def recipe(options: Options) -> Recipe:
    bits_among(options, (8,), 8, "leave --bits out, or --format gptq or hqq for fewer bits")
    side = 128 if options.format == "fp8-block" else -1
    scope = "tiles of 128 x 128" if side == 128 else "the whole tensor"
    fixed(options, f"its numbers are signed and its scales cover {scope}", sym=True, desc_act=False, group_size=side)
    return Recipe(options.format, (("*", tile_spec(side, side)),), {"activation_scheme": "dynamic"})


def shaped(spec: Spec, shape: tuple[int, int]) -> Spec:
    return spec


def check(spec: Spec, shape: tuple[int, int]) -> str:
    if spec.bits != 8 or (spec.rows, spec.group) not in ((-1, -1), (128, 128)):
        return (
            f"{spec} is no FP8 spec: 8 bits, one scale per tensor or per 128 x 128 tile. "
            f"Fix: drop the rule, or --skip this module"
        )
    return ""


def load(read: Reader, name: str, shape: tuple[int, int], recipe: Recipe) -> QTensor:
    codes = read_weight(read, name, shape)
    stored = read(f"{name}.{MARK}")
    tile = _tile(stored, f"{name}.{MARK}", shape, recipe.default)
    inverse = recipe.options.get("weight_scale_semantics") == "inverse"
    if stored.dtype in (torch.uint8, torch.float8_e8m0fnu) and not inverse:
        spec, scales = tile_spec(*tile, scale="e8m0"), stored.view(torch.uint8)
    else:
        spec = tile_spec(*tile, scale=float_name(stored, f"{name}.{MARK}"))
        scales = 1 / stored if inverse else stored
    parts = {"codes": codes, "scales": scales.reshape(scale_shape(spec, shape))}
    made = save(QTensor(spec, shape, parts), recipe)
    return QTensor(spec, shape, parts, kept(read, name, made, SUFFIXES[1:]))


def _tile(scale: Tensor, name: str, shape: tuple[int, int], default: Spec) -> tuple[int, int]:
    """(rows, group) that the shape of a scale tensor means."""
    tiled = default.rows > 0 and default.group > 0
    found, rows = tuple(scale.shape), shape[0]
    if tiled and found == scale_shape(default, shape):
        return default.rows, default.group
    if scale.numel() == 1:
        return -1, -1
    if found in ((rows,), (rows, 1)):
        return 1, -1
    tiles = f"{scale_shape(default, shape)} (tiles of {default.rows} x {default.group}), " if tiled else ""
    raise UserError(
        f"tensor {name} has shape {found} for a weight of {shape}; accepted: {tiles}() (per tensor), "
        f"{rows, 1} (per row). Fix: weight_block_size in config.json must be the one the file was written with"
    )


def read_weight(read: Reader, name: str, shape: tuple[int, int]) -> Tensor:
    """`name`.weight as packed codes."""
    weight = sized(read, f"{name}.weight", shape)
    if weight.dtype != torch.float8_e4m3fn:
        raise UserError(
            f"tensor {name}.weight has dtype {weight.dtype}, expected float8_e4m3fn. Fix: fetch the file again"
        )
    return bits.pack(weight.contiguous().view(torch.uint8), 8)


def weight_of(q: QTensor) -> Tensor:
    """The inverse of `read_weight`."""
    return bits.unpack(q.parts["codes"], 8, q.shape[1]).contiguous().view(torch.float8_e4m3fn)


def save(q: QTensor, recipe: Recipe) -> dict[str, Tensor]:
    scales = q.parts["scales"]
    if q.spec.scale == "e8m0":
        scales = scales.view(torch.float8_e8m0fnu)
    elif recipe.options.get("weight_scale_semantics") == "inverse":
        scales = 1 / scales
    per_tensor = (q.spec.rows, q.spec.group) == (-1, -1)
    return {"weight": weight_of(q), MARK: scales.reshape(()) if per_tensor else scales, **q.extra}


def config(recipe: Recipe) -> dict[str, Any]:
    spec = recipe.default
    tile = [spec.rows, spec.group] if spec.rows > 0 and spec.group > 0 else None
    options = {k: v for k, v in recipe.options.items() if k != "modules_to_not_convert"}
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        **options,
        "weight_block_size": tile,
        "modules_to_not_convert": unconverted(recipe),
    }
