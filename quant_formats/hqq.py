"""HQQ checkpoints: 1, 2, 3, 4 or 8 bits, a floating zero point per group, and facts about every weight beside it.

    W_q    uint8 (int32 at 3 bits)   the weight as a matrix of groups; blocks of its rows share words, the first highest
    scale  f16, bf16 or f32          axis 1: [R, 1], axis 0: [1, R]; W = (code - zero) * scale
    zero   like scale
    nbits, group_size, shape, axis, packing, compute_dtype ...

The matrix is weight.reshape(-1, group) for axis 1 (groups straddle rows where group does not divide K) and
weight.reshape(group, -1) for axis 0. Words: 8bit_u8 one code, 4bit_u8 two, 2bit_u8 four, 1bit_u8 eight, 3bit_32 ten
(zero-padded to a multiple of ten rows); 5 and 6 bits are stored as 8bit_u8 and held here in 5 and 6.

Two forms on disk hold the same: safetensors as transformers 4.57 wrote them ("hqq"), every fact encoded as a tensor,
and the library's own pickle qmodel.pt ("hqq-native"), module -> {fact: value}. `native_to_tensors` and
`tensors_to_native` map one to the other, so `load` and `save` know only the first. Left out: scale and zero quantized
again (deprecated by the library), unpacked W_q.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import bits
from ..kernels.qtensor import QTensor, codes_of, matrix_shape
from ..kernels.spec import Spec
from .base import (
    Options,
    Reader,
    Recipe,
    bits_among,
    fixed,
    float_name,
    group_size,
    kept,
    known,
    not_converted,
    sized,
    straddles,
    unconverted,
)

NAMES = ("hqq", "hqq-native")
MARK = "W_q"
SIDECAR = ""
# Facts in the library's order, with the type that decodes them. `nbits` may be 1.58.
_FACTS: dict[str, type] = {
    "nbits": float, "group_size": int, "shape": torch.Size, "axis": int, "packing": str,
    "unpack_view_dtype": torch.dtype, "view_as_float": bool, "quant_scale": bool, "quant_zero": bool,
    "compute_dtype": torch.dtype, "offload_meta": bool, "encoded_state_dict": bool, "stores_quant_config": bool,
    "channel_wise": bool, "optimize": bool, "round_zero": bool,
}  # fmt: skip
SUFFIXES = ("W_q", "scale", "zero", *_FACTS)
# packing -> (bits of a field, fields in a word).
_PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}
_PACKING_OF = {
    8: "8bit_u8",
    6: "8bit_u8",
    5: "8bit_u8",
    4: "4bit_u8",
    3: "3bit_32",
    2: "2bit_u8",
    1.58: "2bit_u8",
    1: "1bit_u8",
}
_WRITTEN = (1, 2, 3, 4, 8)


def detect(config: Mapping[str, Any]) -> Recipe | None:
    if config.get("quant_method") != "hqq":
        return None
    content = config.get("quant_config") or {}
    # Either one set of parameters, or one per kind of module; the tensors of each module say which it has.
    first = content if "weight_quant_params" in content else next(iter(content.values()), {})
    for name in ("scale_quant_params", "zero_quant_params"):
        known(first.get(name), (None,), f"quant_config.{name}", "hqq")
    params = first.get("weight_quant_params") or {}
    width = known(params.get("nbits"), tuple(_PACKING_OF), "quant_config.weight_quant_params.nbits", "hqq")
    axis = known(params.get("axis", 0), (0, 1), "quant_config.weight_quant_params.axis", "hqq")
    group = params.get("group_size")
    spec = _spec(2 if width == 1.58 else int(width), -1 if group is None else group, axis)
    skips = config.get("skip_modules")
    native = bool(config.get("native"))
    return Recipe(
        NAMES[native], (*not_converted(skips), ("*", spec)), {"native": native, "modules_to_not_convert": skips}
    )


def _spec(width: int, group: int, axis: int, scale: str = "f16", zero: str = "zf16") -> Spec:
    return Spec("affine", width, group, scale=scale, zero=zero, view="" if axis else "axis0")


def recipe(options: Options) -> Recipe:
    width = bits_among(options, _WRITTEN, 4, "choose one of those (HQQ would store 5 and 6 bits in 8)")
    fixed(options, "its zero points are free floating numbers and its columns stay in order", sym=False, desc_act=False)
    spec = _spec(width, group_size(options, 64), 1)
    return Recipe(options.format, (("*", spec),), {"native": options.format == "hqq-native"})


def shaped(spec: Spec, shape: tuple[int, int]) -> Spec:
    return replace(spec, view="flat") if not spec.view and spec.group != -1 and shape[1] % spec.group else spec


def check(spec: Spec, shape: tuple[int, int]) -> str:
    if spec.bits not in _WRITTEN:
        return f"{spec.bits} bits: HQQ holds {', '.join(map(str, _WRITTEN))}. Fix: one of those"
    group = shape[1] if spec.group == -1 else spec.group
    if shape[0] * shape[1] % group:
        return (
            f"group_size {group} does not divide the {shape[0]} x {shape[1]} weight. "
            f"Fix: --group-size 64, 32, 16 or 8, or --skip this module"
        )
    packing = _PACKING_OF[spec.bits]
    rows = group if spec.view == "axis0" else shape[0] * shape[1] // group
    fields = _PACKINGS[packing][1]
    if packing != "3bit_32" and rows % fields:
        return (
            f"{rows} rows of groups are no multiple of {fields}, the codes HQQ packs at {spec.bits} bits. "
            f"Fix: a smaller --group-size, or --skip this module"
        )
    return straddles(spec, shape)


def load(read: Reader, name: str, shape: tuple[int, int], recipe: Recipe) -> QTensor:
    facts = {key: _fact(read, f"{name}.{key}", kind) for key, kind in _FACTS.items() if f"{name}.{key}" in read}
    width, group, axis = _geometry(facts, name, shape)
    rows, columns = (group, shape[0] * shape[1] // group) if axis == 0 else (shape[0] * shape[1] // group, group)
    codes = _read_codes(read, name, facts, (rows, columns))
    if int(codes.max()) >> width:
        raise UserError(
            f"tensor {name}.W_q holds codes above {(1 << width) - 1} with nbits {width}. Fix: fetch the file again"
        )
    per_group = (rows, 1) if axis else (1, columns)
    scale, zero = sized(read, f"{name}.scale", per_group), sized(read, f"{name}.zero", per_group)
    whole_row = axis == 1 and group == shape[1] and recipe.default.group == -1
    dtypes = float_name(scale, f"{name}.scale"), "z" + float_name(zero, f"{name}.zero")
    spec = shaped(_spec(width, -1 if whole_row else group, axis, *dtypes), shape)
    matrix = codes if axis else codes.T
    lines = matrix_shape(spec, shape)[0]
    parts = {
        "codes": bits.pack(matrix.reshape(lines, -1), width),
        "scales": scale.reshape(lines, -1),
        "zeros": zero.reshape(lines, -1),
    }
    q = QTensor(spec, shape, parts)
    return replace(q, extra=kept(read, name, _facts(q, recipe), tuple(_FACTS)))


def _fact(read: Reader, name: str, kind: type) -> Any:
    try:
        return _decode(read(name), kind)
    except (ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"tensor {name} is no encoded {kind.__name__} ({error}). Fix: fetch the file again") from error


def _geometry(facts: Mapping[str, Any], name: str, shape: tuple[int, int]) -> tuple[int, int, int]:
    """(bits, group, axis) from the facts; UserError where they are incomplete, contradictory or of a kind not read."""
    missing = [key for key in ("nbits", "shape", "axis", "packing") if key not in facts]
    if missing:
        raise UserError(
            f"{name}: {', '.join(missing)} missing beside {name}.W_q. Fix: write the checkpoint with hqq >= 0.2"
        )
    if tuple(facts["shape"]) != shape:
        raise UserError(
            f"tensor {name}.shape says {tuple(facts['shape'])}, the model wants {shape}. "
            f"Fix: fetch the matching config.json"
        )
    width, axis = facts["nbits"], facts["axis"]
    if facts["packing"] != _PACKING_OF.get(width) or axis not in (0, 1):
        raise UserError(
            f"{name}: packing {facts['packing']!r} with nbits {width:g} and axis {axis} is not read; accepted: "
            f"{', '.join(f'{p} with {b:g}' for b, p in _PACKING_OF.items())}, axis 0 or 1"
        )
    if facts.get("quant_scale") or facts.get("quant_zero") or not facts.get("channel_wise", True):
        raise UserError(
            f"{name}: quant_scale, quant_zero or one scale for the whole weight (channel_wise false) is not read. "
            f"Fix: quantize again with quant_scale=False, quant_zero=False, channel_wise=True"
        )
    group = facts.get("group_size") or shape[1 if axis else 0]
    if shape[0] * shape[1] % group:
        raise UserError(
            f"tensor {name}.group_size says {group}, which does not divide {shape}. Fix: fetch the file again"
        )
    return (2 if width == 1.58 else int(width)), group, axis


def _read_codes(read: Reader, name: str, facts: Mapping[str, Any], matrix: tuple[int, int]) -> Tensor:
    """uint8 codes [rows, columns] of the matrix HQQ packed."""
    field, fields = _PACKINGS[facts["packing"]]
    packed = read(f"{name}.W_q")
    if facts.get("view_as_float"):
        packed = packed.view(_word(field))
    words = (-(-matrix[0] // fields), matrix[1])
    if tuple(packed.shape) != words or packed.dtype != _word(field):
        raise UserError(
            f"tensor {name}.W_q is {packed.dtype} {tuple(packed.shape)}, expected {_word(field)} {words} "
            f"from the facts beside it. Fix: fetch the file again"
        )
    mask = (1 << field) - 1
    blocks = [(packed >> (field * (fields - 1 - i))) & mask for i in range(fields)]
    return torch.cat(blocks)[: matrix[0]].to(torch.uint8)


def _word(field: int) -> torch.dtype:
    return torch.int32 if field == 3 else torch.uint8


def _pack(codes: Tensor, packing: str) -> Tensor:
    """uint8 [rows, columns] -> words [ceil(rows / fields), columns]."""
    field, fields = _PACKINGS[packing]
    padded = torch.zeros(-(-codes.shape[0] // fields) * fields, codes.shape[1], dtype=_word(field))
    padded[: codes.shape[0]] = codes
    blocks = padded.view(fields, -1, codes.shape[1])
    packed = blocks[0].clone()
    for block in blocks[1:]:
        packed = packed << field | block
    return packed


def save(q: QTensor, recipe: Recipe) -> dict[str, Tensor]:
    facts = {**_facts(q, recipe), **q.extra}
    group = _group(q)
    if q.spec.view == "axis0":
        codes, per_group = codes_of(q).T, (1, -1)
    else:
        codes, per_group = codes_of(q).reshape(-1, group), (-1, 1)
    packed = _pack(codes, _PACKING_OF[q.spec.bits])
    if _decode(facts["view_as_float"], bool):
        packed = packed.view(_decode(facts["compute_dtype"], torch.dtype))
    return {
        "W_q": packed,
        "scale": q.parts["scales"].reshape(per_group),
        "zero": q.parts["zeros"].reshape(per_group),
        **facts,
    }


def _group(q: QTensor) -> int:
    return q.shape[1] if q.spec.group == -1 else q.spec.group


def _facts(q: QTensor, recipe: Recipe) -> dict[str, Tensor]:
    """The encoded facts of a weight that was quantized here."""
    packing = _PACKING_OF[q.spec.bits]
    found = {
        "nbits": q.spec.bits,
        "group_size": _group(q),
        "shape": torch.Size(q.shape),
        "axis": 0 if q.spec.view == "axis0" else 1,
        "packing": packing,
        "unpack_view_dtype": _word(_PACKINGS[packing][0]),
        "view_as_float": False,
        "quant_scale": False,
        "quant_zero": False,
        "compute_dtype": q.parts["scales"].dtype,
        "offload_meta": False,
        "encoded_state_dict": True,
        "stores_quant_config": True,
        "channel_wise": True,
        "optimize": True,
        "round_zero": q.spec.bits == 4,
    }
    if recipe.options["native"]:
        del found["encoded_state_dict"]
    return {key: _encode(value) for key, value in found.items()}


def _encode(value: Any) -> Tensor:
    """A fact as the tensor that stands for it: numbers and flags as scalars, text as its bytes; None as no number."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, torch.Size):
        return torch.tensor(value)
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32)
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float32)
    if value is None:
        return torch.empty(0, dtype=torch.int32)
    return torch.tensor(list(str(value).encode()), dtype=torch.uint8)


def _decode(tensor: Tensor, kind: type) -> Any:
    """The inverse of `_encode` for a fact of that kind."""
    if tensor.numel() == 0:
        return None
    if kind is torch.Size:
        return torch.Size(tensor.tolist())
    if kind is str or kind is torch.dtype:
        text = bytes(tensor.tolist()).decode()
        return text if kind is str else getattr(torch, text.removeprefix("torch."))
    number = tensor.item()
    if kind is float:
        # 1.58 does not survive float32.
        return round(number, 2) if tensor.is_floating_point() else number
    return kind(number)


def config(recipe: Recipe) -> dict[str, Any]:
    """The quantization_config of the safetensors form; beside qmodel.pt config.json has none."""
    if recipe.options["native"]:
        return {}
    spec = recipe.default
    weight_params = {
        "nbits": spec.bits,
        "channel_wise": True,
        "group_size": None if spec.group == -1 else spec.group,
        "optimize": True,
        "round_zero": spec.bits == 4,
        "axis": 0 if spec.view == "axis0" else 1,
        "view_as_float": False,
    }
    quant = {
        "weight_quant_params": weight_params,
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    }
    return {"quant_method": "hqq", "quant_config": quant, "skip_modules": unconverted(recipe)}


def pickled(recipe: Recipe) -> tuple[str, Callable[[Mapping[str, Tensor]], Any]] | None:
    return ("qmodel.pt", tensors_to_native) if recipe.options["native"] else None


def native_to_tensors(modules: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A loaded qmodel.pt -> (quantization_config, tensors by full name); UserError where its structure is another."""
    tensors: dict[str, Tensor] = {}
    params: dict[str, Any] | None = None
    for module, state in modules.items():
        if not isinstance(state, Mapping):
            raise UserError(
                f"qmodel.pt: {module} holds a {type(state).__name__}, expected a dict of tensors. "
                f"Fix: fetch the file again"
            )
        for key, value in state.items():
            if not isinstance(value, Tensor) and ("W_q" not in state or key not in _FACTS):
                raise UserError(
                    f"qmodel.pt: {module}.{key} is not read (scales quantized again, or a file of hqq < 0.2). "
                    f"Fix: quantize again with hqq >= 0.2, quant_scale=False and quant_zero=False"
                )
            tensors[f"{module}.{key}"] = _encode(value)
        if params is None and "W_q" in state:
            params = {key: state[key] for key in ("nbits", "group_size", "axis") if key in state}
    if params is None:
        raise UserError("qmodel.pt holds no quantized module (none has W_q). Fix: fetch the file again")
    return {
        "quant_method": "hqq",
        "native": True,
        "quant_config": {"weight_quant_params": params},
        "skip_modules": [],
    }, tensors


def tensors_to_native(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The inverse: tensors of the native form by full name -> what torch.save writes as qmodel.pt."""
    modules: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        module, _, key = name.rpartition(".")
        modules.setdefault(module, {})[key] = tensor
    return {name: _native_state(state) if "W_q" in state else state for name, state in modules.items()}


def _native_state(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """One quantized module in the library's order of keys and types."""
    found: dict[str, Any] = {"W_q": torch.nn.Parameter(state["W_q"], requires_grad=False)}
    for key, kind in _FACTS.items():
        if key in state:
            found[key] = _decode(state[key], kind)
        if key == "shape":
            found |= {"scale": state["scale"], "zero": state["zero"]}
        if key == "compute_dtype" and "bias" in state:
            found["bias"] = state["bias"]
    return found
