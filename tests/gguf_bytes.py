"""Blocks of every GGUF type with random valid bytes, from the layout tables alone (no code of ours), and llama.cpp's C."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

# type: (weights of a block, bytes of a block, offsets of its float16)
LAYOUTS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "Q1_0": (128, 18, (0,)), "Q2_0": (64, 18, (0,)), "Q4_0": (32, 18, (0,)), "Q4_1": (32, 20, (0, 2)),
    "Q5_0": (32, 22, (0,)), "Q5_1": (32, 24, (0, 2)), "Q8_0": (32, 34, (0,)), "Q2_K": (256, 84, (80, 82)),
    "Q3_K": (256, 110, (108,)), "Q4_K": (256, 144, (0, 2)), "Q5_K": (256, 176, (0, 2)), "Q6_K": (256, 210, (208,)),
    "IQ4_NL": (32, 18, (0,)), "IQ4_XS": (256, 136, (0,)), "TQ1_0": (256, 54, (52,)), "TQ2_0": (256, 66, (64,)),
    "IQ2_XXS": (256, 66, (0,)), "IQ2_XS": (256, 74, (0,)), "IQ2_S": (256, 82, (0,)), "IQ3_XXS": (256, 98, (0,)),
    "IQ3_S": (256, 110, (0,)), "IQ1_S": (256, 50, (0,)), "IQ1_M": (256, 56, ()),
    "MXFP4": (32, 17, ()), "NVFP4": (64, 36, ()),
}  # fmt: skip
IDS = {"Q1_0": 41, "Q2_0": 42}
# gguf-py cannot decode these.
NOT_IN_GGUF_PY = ("Q1_0", "Q2_0")


def random_rows(name: str, n: int, k: int, calm: bool = False) -> Tensor:
    """uint8 [n, row bytes]. Any finite float16 (calm: some thousandths), any exponent but NaN's, any other byte."""
    width, size, halves = LAYOUTS[name]
    raw = torch.randint(0, 256, (n * k // width, size), dtype=torch.uint8)
    for at in halves:
        pattern = torch.randint(0, 1 << 16, (raw.shape[0], 1)).to(torch.int32)
        finite = torch.where((pattern & 0x7C00) == 0x7C00, pattern & ~0x400, pattern).to(torch.int16)
        small = ((torch.rand(raw.shape[0], 1) - 0.5) / 100).half()
        raw[:, at : at + 2] = small.view(torch.uint8) if calm else finite.view(torch.uint8)
    if name == "MXFP4":
        raw[:, :1] = torch.randint(115, 125, (raw.shape[0], 1)) if calm else torch.randint(0, 255, (raw.shape[0], 1))
    if name == "NVFP4":
        raw[:, :4] = torch.randint(0, 127, (raw.shape[0], 4))
    if name == "IQ1_M":
        # The top four bits of the scale, whose others are anywhere: below 2 with its sign, or calm.
        raw[:, 55] = raw[:, 55] & 0x0F | (0x10 if calm else raw[:, 55] & 0xB0)
    if name == "TQ1_0":
        trits = torch.randint(-1, 2, (raw.shape[0], 256)).float().numpy()
        raw[:, :52] = torch.from_numpy(quants.quantize(trits, GGMLQuantizationType.TQ1_0))[:, :52]
    return raw.view(n, -1)


def number(name: str) -> int:
    return IDS[name] if name in IDS else int(GGMLQuantizationType[name])


class _Traits(ctypes.Structure):
    """ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def _ggml() -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    found = sorted((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base*"))
    if not found:
        pytest.skip("this llama-cpp-python has no libggml-base")
    lib = ctypes.CDLL(str(found[0]))
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    return lib


def c_dequantize(name: str, raw: Tensor, k: int) -> Tensor:
    """llama.cpp's own numbers: float32 [n, k]. Skips the test where it is not installed."""
    found = _ggml().ggml_get_type_traits(number(name))
    data, out = raw.contiguous().numpy(), numpy.empty((raw.shape[0], k), numpy.float32)
    found.contents.to_float(data.ctypes.data, out.ctypes.data, out.size)
    return torch.from_numpy(out)


def c_quantize(name: str, weight: Tensor) -> Tensor:
    """What llama.cpp writes for float32 [n, k], every column of equal importance. Skips where it is not installed."""
    lib, data = _ggml(), weight.contiguous().numpy()
    n, k = data.shape
    width, size, _ = LAYOUTS[name]
    out, importance = numpy.zeros((n, k // width * size), numpy.uint8), numpy.ones(k, numpy.float32)
    lib.ggml_quantize_init(number(name))
    lib.ggml_quantize_chunk(number(name), data.ctypes.data, out.ctypes.data, 0, n, k, importance.ctypes.data)
    return torch.from_numpy(out)
