"""bitsandbytes 4-bit checkpoints: NF4 and FP4 tables, blocks of 64 weights, their scales quantized again or not.

    weight                                       uint8 [ceil(N*K/2), 1]   row-major codes, the first in the HIGH half
    weight.absmax                                f32 [blocks], or uint8 with double quantization
    weight.quant_map                             f32 [16]                 the table
    weight.nested_absmax, .nested_quant_map      f32 [blocks/256], f32 [256]
    weight.quant_state.bitsandbytes__nf4         uint8                    JSON: blocksize, shape, nested_offset ...

W = table[code] * absmax, where absmax = nested_quant_map[byte] * nested_absmax + nested_offset with double
quantization ("-dq"). Blocks run over the flat weight, so they straddle rows where the block size does not divide K,
and the last one may be partial.

bitsandbytes 0.50 repacks weights in place at the first forward on an AVX512-BF16 CPU; a checkpoint saved after that
holds bfloat16, transposed absmax and garbled codes, and is refused. Left out: LLM.int8() (load_in_8bit).
"""

import json
from collections.abc import Mapping
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
    group_size,
    kept,
    known,
    not_converted,
    sized,
    straddles,
    unconverted,
)

NAMES = ("nf4", "nf4-dq", "bnb-fp4", "bnb-fp4-dq")
_STATES = {"nf4": "weight.quant_state.bitsandbytes__nf4", "fp4": "weight.quant_state.bitsandbytes__fp4"}
SUFFIXES = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    *_STATES.values(),
)
MARK = "weight.absmax"
SIDECAR = ""
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED = 256
_STORAGES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
# Keys of the config that are no business of ours, with transformers' defaults.
_DEFAULTS = {
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_threshold": 6.0,
}


def detect(config: Mapping[str, Any]) -> Recipe | None:
    if config.get("quant_method") != "bitsandbytes" and "load_in_4bit" not in config:
        return None
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        raise UserError(
            "quantization_config of 'bitsandbytes': load_in_8bit (LLM.int8) is not read; bitsmith reads load_in_4bit. "
            "Nothing was loaded. Fix: use the unquantized checkpoint"
        )
    table = known(config.get("bnb_4bit_quant_type", "fp4"), ("nf4", "fp4"), "bnb_4bit_quant_type", "bitsandbytes")
    double = bool(config.get("bnb_4bit_use_double_quant", False))
    options = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    known(options["bnb_4bit_quant_storage"], _STORAGES, "bnb_4bit_quant_storage", "bitsandbytes")
    skips = config.get("llm_int8_skip_modules")
    rules = (*not_converted(skips), ("*", _spec(table, 64, double)))
    return Recipe(_name(table, double), rules, {**options, "modules_to_not_convert": skips})


def _name(table: str, double: bool) -> str:
    return ("nf4" if table == "nf4" else "bnb-fp4") + ("-dq" if double else "")


def _spec(table: str, block: int, double: bool, nested: int = _NESTED) -> Spec:
    return Spec("codebook", 4, block, scale=f"u8:f32:{nested}" if double else "f32", table=table)


def recipe(options: Options) -> Recipe:
    bits_among(options, (4,), 4, "leave --bits out, or --format gptq or hqq for other widths")
    fixed(options, "its tables are fixed and its columns stay in order", sym=True, desc_act=False)
    block = known_block(group_size(options, 64))
    table, double = ("nf4" if "nf4" in options.format else "fp4"), options.format.endswith("-dq")
    return Recipe(options.format, (("*", _spec(table, block, double)),), dict(_DEFAULTS))


def known_block(block: int) -> int:
    if block not in BLOCKS:
        raise UserError(
            f"--group-size {block}: bitsandbytes blocks are {', '.join(map(str, BLOCKS))} weights. Fix: one of those"
        )
    return block


def shaped(spec: Spec, shape: tuple[int, int]) -> Spec:
    return replace(spec, view="flat") if not spec.view and shape[1] % spec.group else spec


def check(spec: Spec, shape: tuple[int, int]) -> str:
    if spec.bits != 4:
        return f"{spec.bits} bits: bitsandbytes tables have 4. Fix: drop the rule, or --skip this module"
    if spec.group not in BLOCKS:
        return (
            f"group_size {spec.group}: bitsandbytes blocks are {', '.join(map(str, BLOCKS))} weights. Fix: one of those"
        )
    return straddles(spec, shape)


def load(read: Reader, name: str, shape: tuple[int, int], recipe: Recipe) -> QTensor:
    table, state = _state(read, name, shape)
    block, double = state["blocksize"], "nested_offset" in state
    spec = shaped(_spec(table, block, double, state.get("nested_blocksize", _NESTED)), shape)
    blocks = -(-shape[0] * shape[1] // block)
    absmax = _absmax(read, name, blocks, double)
    rows, columns = matrix_shape(spec, shape)
    entries = sized(read, f"{name}.weight.quant_map", (16,))
    codes = _codes(read, name, shape, blocks * block, int(entries.abs().argmin()), recipe)
    parts = {"codes": bits.pack(codes.view(rows, columns), 4), "scales": absmax.view(rows, -1), "table": entries}
    if double:
        level = spec.two_level
        assert level is not None
        parts["super_scales"] = sized(read, f"{name}.weight.nested_absmax", (-(-blocks // level[1]),))
        parts["scale_table"] = sized(read, f"{name}.weight.nested_quant_map", (256,))
        parts["scale_offset"] = torch.tensor(state["nested_offset"], dtype=torch.float32)
    q = QTensor(spec, shape, parts)
    return replace(q, extra=kept(read, name, {_STATES[table]: _state_bytes(q)}, (_STATES[table],)))


def _state(read: Reader, name: str, shape: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """(table name, content of the quant_state)."""
    table = "fp4" if f"{name}.{_STATES['fp4']}" in read else "nf4"
    place = f"{name}.{_STATES[table]}"
    try:
        state = dict(json.loads(bytes(read(place).tolist())))
    except (ValueError, TypeError) as error:
        raise UserError(f"tensor {place} is no JSON ({error}). Fix: fetch the file again") from error
    wanted = {"quant_type": table, "shape": list(shape), "nested_dtype": state.get("nested_dtype") and "float32"}
    for key, value in wanted.items():
        if state.get(key) != value:
            raise UserError(
                f"tensor {place}: {key} is {state.get(key)!r}, expected {value!r}. Fix: fetch the matching config.json"
            )
    if state.get("blocksize") not in BLOCKS:
        raise UserError(
            f"tensor {place}: blocksize is {state.get('blocksize')!r}; accepted: {', '.join(map(str, BLOCKS))}. "
            f"Fix: fetch the file again"
        )
    return table, state


def _absmax(read: Reader, name: str, blocks: int, double: bool) -> Tensor:
    absmax = read(f"{name}.{MARK}")
    dtype = torch.uint8 if double else torch.float32
    if absmax.dtype != dtype or tuple(absmax.shape) != (blocks,):
        raise UserError(
            f"tensor {name}.{MARK} is {absmax.dtype} {tuple(absmax.shape)}, expected {dtype} ({blocks},). "
            f"bfloat16 [K/64, N] means that bitsandbytes saved the model after a forward on the CPU, which repacks "
            f"weights in place. Fix: save it again before any forward"
        )
    return absmax


def _codes(read: Reader, name: str, shape: tuple[int, int], count: int, pad: int, recipe: Recipe) -> Tensor:
    """uint8 [count]: the codes, then those of 0.0 up to whole blocks."""
    storage: torch.dtype = getattr(torch, recipe.options["bnb_4bit_quant_storage"])
    size = -(-shape[0] * shape[1] // 2)
    packed = sized(read, f"{name}.weight", (size // storage.itemsize, 1))
    if packed.dtype != storage:
        raise UserError(
            f"tensor {name}.weight has dtype {packed.dtype}, bnb_4bit_quant_storage says "
            f"{recipe.options['bnb_4bit_quant_storage']}. Fix: fetch the matching config.json"
        )
    stored = packed.contiguous().view(torch.uint8).reshape(-1)
    codes = torch.full((max(count, 2 * size),), pad, dtype=torch.uint8)
    codes[: 2 * size] = torch.stack([stored >> 4, stored & 15], -1).reshape(-1)
    return codes[:count]


def save(q: QTensor, recipe: Recipe) -> dict[str, Tensor]:
    size = -(-q.shape[0] * q.shape[1] // 2)
    codes = codes_of(q).reshape(-1)[: 2 * size]
    storage: torch.dtype = getattr(torch, recipe.options["bnb_4bit_quant_storage"])
    tensors = {
        "weight": (codes[::2] << 4 | codes[1::2]).view(storage).view(-1, 1),
        MARK: q.parts["scales"].reshape(-1),
        "weight.quant_map": q.parts["table"],
        _STATES[q.spec.table]: _state_bytes(q),
    }
    if q.spec.two_level:
        tensors["weight.nested_absmax"] = q.parts["super_scales"]
        tensors["weight.nested_quant_map"] = q.parts["scale_table"]
    return {**tensors, **q.extra}


def _state_bytes(q: QTensor) -> Tensor:
    """The quant_state of a weight that was quantized here: its `dtype` is that of bitsandbytes' dequantized copy."""
    state = {"quant_type": q.spec.table, "blocksize": q.spec.group, "dtype": "float16", "shape": list(q.shape)}
    if q.spec.two_level:
        offset = q.parts["scale_offset"].item()
        state |= {"nested_blocksize": q.spec.two_level[1], "nested_dtype": "float32", "nested_offset": offset}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def config(recipe: Recipe) -> dict[str, Any]:
    spec = recipe.default
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": spec.table,
        "bnb_4bit_use_double_quant": spec.two_level is not None,
        **{key: recipe.options[key] for key in _DEFAULTS},
        "llm_int8_skip_modules": unconverted(recipe),
    }
