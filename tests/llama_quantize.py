"""Run by tests in a child process, since llama.cpp aborts on some inputs: `python llama_quantize.py < jobs.json`.

jobs: a list of {"src", "ftype" (llama_ftype id)} and, as wanted, "dst" (else a dry run), "imatrix" (an .npz of name ->
float32 values), "threads", "pure", "output", "token_embedding" (ggml type ids), "tensors": [[regex, id], ...]. Prints a JSON list:
the ggml type names of the tensors by name, in capitals; or null where llama_model_quantize refused or, dry, would.
"""

import ctypes
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import llama_cpp as L
import numpy as np


class InitParams(ctypes.Structure):
    """struct gguf_init_params"""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def types_of(path: str) -> dict[str, str]:
    """Read by ggml itself: the gguf package refuses files with a type it does not know (Q2_0)."""
    lib = ctypes.CDLL(str(Path(L.__file__).parent / "lib" / "libggml-base.so"))
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, InitParams]
    lib.gguf_get_n_tensors.restype = ctypes.c_int64
    lib.gguf_get_tensor_name.restype = ctypes.c_char_p
    lib.ggml_type_name.restype = ctypes.c_char_p
    for name in ("gguf_get_n_tensors", "gguf_free"):
        getattr(lib, name).argtypes = [ctypes.c_void_p]
    for name in ("gguf_get_tensor_name", "gguf_get_tensor_type"):
        getattr(lib, name).argtypes = [ctypes.c_void_p, ctypes.c_int64]
    handle = lib.gguf_init_from_file(path.encode(), InitParams(True, None))
    names = (lib.gguf_get_tensor_name(handle, i).decode() for i in range(lib.gguf_get_n_tensors(handle)))
    kinds = (lib.gguf_get_tensor_type(handle, i) for i in range(lib.gguf_get_n_tensors(handle)))
    found = {name: lib.ggml_type_name(kind).decode().upper() for name, kind in zip(names, kinds, strict=True)}
    lib.gguf_free(handle)
    return found


def logged_types(log: str) -> dict[str, str]:
    """What a dry run says it would do."""
    lines = re.findall(r"\] (\S+) +- \[.*type = +(\w+), size = .*?(?:-> .*?\((\w+)\))?\n", log)
    return {name: (new or old).upper() for name, old, new in lines}


def quantize(job: dict[str, Any], log: list[str]) -> dict[str, str] | None:
    params = L.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = job.get("threads", 1), job["ftype"], job.get("pure", False)
    params.dry_run = "dst" not in job
    params.output_tensor_type = job.get("output", params.output_tensor_type)
    params.token_embedding_type = job.get("token_embedding", params.token_embedding_type)
    keep: list[Any] = []
    if "imatrix" in job:
        values = np.load(job["imatrix"])
        entries = (L.llama_model_imatrix_data * (len(values.files) + 1))()
        for entry, name in zip(entries, values.files, strict=False):
            data = np.ascontiguousarray(values[name], np.float32).ravel()
            keep.append(data)
            entry.name, entry.size = name.encode(), data.size
            entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(L.llama_model_imatrix_data))
    if "tensors" in job:
        overrides = (L.llama_model_tensor_override * (len(job["tensors"]) + 1))()
        for override, (pattern, kind) in zip(overrides, job["tensors"], strict=False):
            override.pattern, override.type = pattern.encode(), kind
        params.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(L.llama_model_tensor_override))
    log.clear()
    target = os.fsencode(job.get("dst", ""))
    refused = L.llama_model_quantize(os.fsencode(job["src"]), target, ctypes.byref(params))
    said = "".join(log)
    if refused or "will require an imatrix!" in said:
        return None
    return types_of(job["dst"]) if "dst" in job else logged_types(said)


if __name__ == "__main__":
    heard: list[str] = []
    callback = L.llama_log_callback(lambda level, text, data: heard.append(text.decode(errors="replace")))
    L.llama_log_set(callback, None)
    print(json.dumps([quantize(job, heard) for job in json.load(sys.stdin)]))
