"""FBGEMM FP8 checkpoints (Llama 3.1 405B; read by transformers and vLLM): E4M3 weights, one scale per output row.

    weight        f8_e4m3 [N, K]
    weight_scale  f32     [N, 1]      W = weight * weight_scale

`activation_scale_ub` caps the per-token scale of the activations, which their kernels quantize to FP8; here activations
stay floats.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..kernels.qtensor import QTensor
from ..kernels.spec import Spec
from .base import Options, Reader, Recipe, bits_among, fixed, float_name, kept, not_converted, sized, unconverted
from .fp8 import read_weight, tile_spec, weight_of

NAMES = ("fp8-channel",)
SUFFIXES = ("weight", "weight_scale", "input_scale_ub")
MARK = "weight_scale"
SIDECAR = ""


def detect(config: Mapping[str, Any]) -> Recipe | None:
    if config.get("quant_method") != "fbgemm_fp8":
        return None
    skips = config.get("modules_to_not_convert")
    options = {"activation_scale_ub": config.get("activation_scale_ub", 1200.0), "modules_to_not_convert": skips}
    return Recipe(NAMES[0], (*not_converted(skips), ("*", tile_spec(1, -1))), options)


def recipe(options: Options) -> Recipe:
    bits_among(options, (8,), 8, "leave --bits out, or --format gptq or hqq for fewer bits")
    fixed(options, "the numbers of FP8 are signed, its scales cover a row", sym=True, desc_act=False, group_size=-1)
    return Recipe(NAMES[0], (("*", tile_spec(1, -1)),), {"activation_scale_ub": 1200.0})


def shaped(spec: Spec, shape: tuple[int, int]) -> Spec:
    return spec


def check(spec: Spec, shape: tuple[int, int]) -> str:
    if spec.bits != 8 or (spec.rows, spec.group) != (1, -1):
        return f"{spec} is no FBGEMM FP8 spec: 8 bits, one scale per row. Fix: drop the rule, or --skip this module"
    return ""


def load(read: Reader, name: str, shape: tuple[int, int], recipe: Recipe) -> QTensor:
    scales = sized(read, f"{name}.{MARK}", (shape[0], 1))
    parts = {"codes": read_weight(read, name, shape), "scales": scales}
    spec = tile_spec(1, -1, float_name(scales, f"{name}.{MARK}"))
    return QTensor(spec, shape, parts, kept(read, name, {MARK: scales}, SUFFIXES[1:]))


def save(q: QTensor, recipe: Recipe) -> dict[str, Tensor]:
    return {"weight": weight_of(q), MARK: q.parts["scales"], **q.extra}


def config(recipe: Recipe) -> dict[str, Any]:
    return {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": recipe.options["activation_scale_ub"],
        "modules_to_not_convert": unconverted(recipe),
    }
