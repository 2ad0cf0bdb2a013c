"""Single products of llama.cpp on the CPU, for `bench kernels`: ggml's C functions, called through ctypes.

The weight is ours byte for byte (quant_formats/gguf_blocks.py writes the block as a file has it), activations are
float32 [M, K] as llama.cpp's are and are made outside the clock, the product is one `ggml_mul_mat` node [M, N] on as
many threads as torch has. ggml rounds activations to 8 bits for all of these types, as our integer products do.

Two configurations, as in `bench decode`: llama.cpp's default rearranges weights at load where it has a kernel for that
(the CPU backend's extra buffer types); plain ggml tensors keep the blocks of the file, which is what `--no-repack`
measures. Only libggml is loaded, out of the package's lib/; nothing of llama_cpp is imported.
"""

import ctypes
import itertools
import weakref
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from ..kernels.qtensor import QTensor
from ..quant_formats import gguf_blocks

_F32 = 0


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_P, _INT, _LONG, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
# name: (result, arguments), from ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (_P, [_InitParams]),
    "ggml_free": (None, [_P]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_graph_overhead": (_SIZE, []),
    "ggml_new_tensor_2d": (_P, [_P, _INT, _LONG, _LONG]),
    "ggml_mul_mat": (_P, [_P, _P, _P]),
    "ggml_new_graph": (_P, [_P]),
    "ggml_build_forward_expand": (None, [_P, _P]),
    "ggml_get_data": (_P, [_P]),
    "ggml_log_set": (None, [_P, _P]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, [_P, _P]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_cpu_buffer_type": (_P, []),
    "ggml_backend_cpu_init": (_P, []),
    "ggml_backend_cpu_reg": (_P, []),
    "ggml_backend_cpu_set_n_threads": (None, [_P, _INT]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_P, _P]),
    "ggml_backend_free": (None, [_P]),
    "ggml_backend_graph_compute": (_INT, [_P, _P]),
    "ggml_backend_reg_dev_get": (_P, [_P, _SIZE]),
    "ggml_backend_reg_get_proc_address": (_P, [_P, ctypes.c_char_p]),
    "ggml_backend_tensor_set": (None, [_P, _P, _SIZE, _SIZE]),
}


_SILENT = ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _P)(lambda *_: None)
# Of the two ternary types, which share a spec, the later one holds any code.
_TYPES = {block.spec: name for name, block in gguf_blocks.BLOCKS.items()}


@cache
def load() -> ctypes.CDLL:
    """libggml-cpu, through which libggml-base is found too. ImportError where this Python has none."""
    package = find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise ImportError("llama-cpp-python is not installed")
    folder = Path(package.origin).parent / "lib"
    found = [path for path in (folder / "libggml-cpu.so", folder / "libggml-cpu.dylib") if path.exists()]
    if not found:
        raise ImportError(f"no libggml-cpu in {folder}")
    library = ctypes.CDLL(str(found[0]))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    # It tells of every weight it rearranges.
    library.ggml_log_set(_SILENT, None)
    return library


@cache
def _repacking() -> tuple[int, ...]:
    """Buffer types that rearrange the weights put into them."""
    ggml = load()
    kinds = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)
    getter = ggml.ggml_backend_reg_get_proc_address(ggml.ggml_backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts")
    # A list that ends with a null pointer.
    found = kinds(getter)(_device())
    return tuple(itertools.takewhile(bool, (found[i] for i in itertools.count())))


def _device() -> int:
    ggml = load()
    return int(ggml.ggml_backend_reg_dev_get(ggml.ggml_backend_cpu_reg(), 0))


class _Tensors:
    """A ggml context with room for a few tensors and a graph, and their memory: freed with this object."""

    def __init__(self) -> None:
        self.ggml = load()
        room = 4 * self.ggml.ggml_tensor_overhead() + self.ggml.ggml_graph_overhead()
        self.context = self.ggml.ggml_init(_InitParams(room, None, True))
        weakref.finalize(self, self.ggml.ggml_free, self.context)

    def matrix(self, kind: int, rows: int, columns: int) -> int:
        return int(self.ggml.ggml_new_tensor_2d(self.context, kind, columns, rows))

    def allocate(self, buffer_type: int) -> None:
        """Memory of `buffer_type` for all tensors made so far. RuntimeError where there is not enough."""
        buffer = self.ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.context, buffer_type)
        if not buffer:
            raise RuntimeError("ggml could not allocate the tensors")
        weakref.finalize(self, self.ggml.ggml_backend_buffer_free, buffer)


class GgmlWeight(_Tensors):
    """A weight [N, K] as llama.cpp holds it: `bind` x, then call it with what that gave."""

    def __init__(self, raw: Tensor, kind: str, shape: tuple[int, int], buffer_type: int) -> None:
        """raw: uint8 [N, row bytes] of GGML type `kind`. RuntimeError where its memory cannot be had."""
        super().__init__()
        self.shape = shape
        self.tensor = self.matrix(GGMLQuantizationType[kind], *shape)
        self.allocate(buffer_type)
        self.nbytes = raw.nbytes
        self.ggml.ggml_backend_tensor_set(self.tensor, raw.data_ptr(), 0, raw.nbytes)
        self.backend = self.ggml.ggml_backend_cpu_init()
        weakref.finalize(self, self.ggml.ggml_backend_free, self.backend)
        self.ggml.ggml_backend_cpu_set_n_threads(self.backend, torch.get_num_threads())

    def bind(self, x: Tensor) -> "_Graph":
        """x [M, K] of any float dtype, copied. What it gives owns the memory of the product."""
        return _Graph(self.tensor, self.shape[0], x)

    def __call__(self, graph: "_Graph") -> Tensor:
        """float32 [M, N], valid while `graph` lives. RuntimeError where ggml gives up."""
        if status := self.ggml.ggml_backend_graph_compute(self.backend, graph.graph):
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return graph.y


class _Graph(_Tensors):
    """One product with its input and output."""

    def __init__(self, weight: int, n: int, x: Tensor) -> None:
        super().__init__()
        m, k = x.shape
        given = self.matrix(_F32, m, k)
        product = self.ggml.ggml_mul_mat(self.context, weight, given)
        self.allocate(self.ggml.ggml_backend_cpu_buffer_type())
        self.graph = self.ggml.ggml_new_graph(self.context)
        self.ggml.ggml_build_forward_expand(self.graph, product)
        self._view(given, m, k).copy_(x)
        self.y = self._view(product, m, n)

    def _view(self, tensor: int, rows: int, columns: int) -> Tensor:
        memory = (ctypes.c_float * (rows * columns)).from_address(self.ggml.ggml_get_data(tensor))
        return torch.frombuffer(memory, dtype=torch.float32).view(rows, columns)


def weights(q: QTensor) -> dict[str, GgmlWeight]:
    """q as llama.cpp holds it: "repacked" where it rearranges such weights here, and "blocks"; {} where it has no type
    of this spec, or q is not on the CPU. ImportError where there is no ggml, RuntimeError where it runs out of memory.
    """
    kind = _TYPES.get(q.spec, "")
    # gguf numbers the types: the newest are not in every version of it.
    if kind not in GGMLQuantizationType.__members__ or q.shape[1] % gguf_blocks.BLOCKS[kind].width:
        return {}
    if q.parts["codes"].device.type != "cpu":
        return {}
    raw, found = gguf_blocks.pack(kind, q), {}
    if repacking := [each for each in _repacking() if _takes(each, kind, q.shape)]:
        found["repacked"] = GgmlWeight(raw, kind, q.shape, repacking[0])
    found["blocks"] = GgmlWeight(raw, kind, q.shape, load().ggml_backend_cpu_buffer_type())
    return found


def _takes(buffer_type: int, kind: str, shape: tuple[int, int]) -> bool:
    """Whether ggml multiplies with such a weight in this buffer type."""
    tensors = _Tensors()
    held = tensors.matrix(GGMLQuantizationType[kind], *shape)
    # It asks where the weight lies, so that has to be somewhere.
    tensors.allocate(buffer_type)
    product = tensors.ggml.ggml_mul_mat(tensors.context, held, tensors.matrix(_F32, 1, shape[1]))
    return bool(tensors.ggml.ggml_backend_dev_supports_op(_device(), product))
