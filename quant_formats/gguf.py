"""GGUF file types as something to quantize to: which spec their usual tensor has, and packed rows while a run is going.

    ggml    uint8 [N, bytes of a row]    the rows as the GGUF file will hold them, before llama.cpp's permutations

Which tensor gets which type is gguf_mixture.py's business, bytes are gguf_blocks.py's, and the file itself that of
models/gguf_write.py; here they meet the driver, which knows modules and specs. No config.json speaks of GGUF:
models/gguf_checkpoint.py finds it by the file.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..kernels.qtensor import QTensor
from ..kernels.spec import Spec
from . import base, gguf_blocks
from .gguf_rules import MIXTURES

_PLAIN = ("F32", "F16", "BF16")
NAMES = tuple(f"gguf:{name}" for name, mix in MIXTURES.items() if mix.base not in _PLAIN)
SUFFIXES: tuple[str, ...] = ("ggml",)
MARK = "ggml"
SIDECAR = ""
# Two types of one spec; the file type says which.
TERNARY = ("TQ1_0", "TQ2_0")


def detect(config: Mapping[str, Any]) -> base.Recipe | None:
    return None


def recipe(options: base.Options) -> base.Recipe:
    """The spec of the file type's base for everything; the driver puts each module's own in `modules`."""
    kind = MIXTURES[options.format.removeprefix("gguf:")].base
    spec = gguf_blocks.spec(kind)
    assert spec is not None
    why = f"{kind} has bits, groups and zero points of its own"
    base.fixed(options, why, bits=spec.bits, group_size=None, sym=None, desc_act=False)
    return base.Recipe("gguf", (("*", spec),), {"ternary": kind if kind in TERNARY else "TQ2_0"})


def shaped(spec: Spec, shape: tuple[int, int]) -> Spec:
    return spec


def check(spec: Spec, shape: tuple[int, int]) -> str:
    """Blocks do not straddle rows, and the mixture has seen to that already."""
    width = gguf_blocks.BLOCKS[type_name(spec)].width
    return "" if shape[1] % width == 0 else f"rows of {shape[1]} weights are no multiple of its blocks of {width}"


def type_name(spec: Spec, ternary: str = "TQ2_0") -> str:
    """The ggml type that stores `spec`. UserError where none does."""
    for name, block in gguf_blocks.BLOCKS.items():
        if block.spec == spec and (name == ternary or name not in TERNARY):
            return name
    raise UserError(f"{spec} is no type of GGUF. Fix: --format gguf:TYPE without --bits or --recipe")


def load(read: base.Reader, name: str, shape: tuple[int, int], recipe: base.Recipe) -> QTensor:
    spec = recipe.spec(name)
    assert spec is not None
    return gguf_blocks.unpack(type_name(spec, recipe.options["ternary"]), read(f"{name}.ggml"), shape)


def save(q: QTensor, recipe: base.Recipe) -> dict[str, Tensor]:
    return {"ggml": gguf_blocks.pack(type_name(q.spec, recipe.options["ternary"]), q)}


def config(recipe: base.Recipe) -> dict[str, Any]:
    return {}
