"""Writes gguf_search.json: what llama.cpp's quantizers make of seeded weights. Run where llama-cpp-python is installed:

python -m tests.golden.make_gguf_search
"""

import ctypes
import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import torch
from bitsmith.quant_formats import gguf_blocks

from tests.gguf_weights import COLUMNS, ROWS, error, importance, weights

KINDS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
)


def main() -> None:
    library = Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"
    quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    found: dict[str, dict[str, Any]] = {}
    for shape in ("gauss", "student"):
        w = weights(shape)
        for kind in KINDS:
            for weight in (None, importance()):
                if weight is None and kind in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"):
                    continue
                raw = torch.zeros(ROWS, gguf_blocks.row_bytes(kind, COLUMNS), dtype=torch.uint8)
                type_id = 40 if kind == "NVFP4" else gguf.GGMLQuantizationType[kind].value
                address = None if weight is None else weight.data_ptr()
                quantize(type_id, w.data_ptr(), raw.data_ptr(), 0, ROWS, COLUMNS, address)
                restored = gguf_blocks.unpack(kind, raw, (ROWS, COLUMNS)).dequantize()
                found[f"{kind} {shape} {'plain' if weight is None else 'imatrix'}"] = {
                    "error": error(w, restored, weight),
                    "sha256": hashlib.sha256(raw.numpy().tobytes()).hexdigest(),
                }
    Path(__file__).with_name("gguf_search.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
