"""A GGUF file as the goal of a quantization: which tensor gets which type, what is known of its inputs, and its rows in
the end.

Weights that are linears or experts go through the driver like any format's, module by module. The others (embeddings,
experts that a checkpoint keeps transposed) are rounded when the file is written, a piece at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..kernels.qtensor import QTensor
from ..models.checkpoint import AnyCheckpoint
from ..models.gguf_archs import Arch
from ..models.gguf_plan import Planned, permuted, piece_of, plan
from ..quant_formats import gguf as dialect
from ..quant_formats import gguf_blocks
from ..quant_formats.base import Recipe
from ..quant_formats.gguf_mixture import Overrides, check_imatrix, file_type, tensor_types
from ..quant_formats.gguf_rules import MIXTURES, Facts
from . import rtn
from .imatrix import Imatrix
from .method import Settings
from .stats import Squares

# Numbers rounded at a time: a vocabulary's embeddings are a gigabyte in float32.
_PIECE = 1 << 24


@dataclass(frozen=True)
class Layout:
    """What a GGUF file of a checkpoint will hold; made by `layout`."""

    # A key of gguf_rules.MIXTURES.
    file_type: str
    tensors: tuple[Planned, ...]
    # ggml type by tensor.
    types: Mapping[str, str]

    @property
    def number(self) -> int:
        """llama.cpp's number of the file type."""
        return MIXTURES[self.file_type].ftype

    def recipe(self) -> Recipe:
        """What the driver is to do: the spec of each module whose rows are rows of a tensor."""
        modules = {
            weight.removesuffix(".weight"): spec
            for each in self.tensors
            if each.link and each.link.quantizable and (spec := gguf_blocks.spec(self.types[each.name]))
            for weight in each.link.weights
        }
        base = MIXTURES[self.file_type].base
        options = {"ternary": base if base in dialect.TERNARY else dialect.TERNARY[-1]}
        return Recipe("gguf", (("*", "skip"),), options, modules=modules)


def layout(ckpt: AnyCheckpoint, name: str, overrides: Overrides, imatrix: Imatrix | None) -> Layout:
    """The types of a file `name` ("q4_k_m") of this checkpoint.

    UserError for an architecture that GGUF does not know, an unknown file type, shapes that do not fit, and types that
    need an importance matrix where there is none.
    """
    kind = file_type(name)
    arch, tensors = plan(ckpt)
    shapes = [(each.name, each.shape) for each in tensors]
    types = tensor_types(kind, facts(ckpt, arch, imatrix is not None), shapes, overrides).types
    check_imatrix(kind, types, () if imatrix is None else imatrix.entries)
    return Layout(kind, tuple(tensors), types)


def facts(ckpt: AnyCheckpoint, arch: Arch, has_imatrix: bool) -> Facts:
    """What mixtures depend on besides names and shapes."""
    config = ckpt.pretrained_config()
    experts = next((getattr(config, f.field) for f in arch.fields if f.key == "expert_count"), 0)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    name = arch.name.partition("+")[0]
    return Facts(name, config.num_hidden_layers, heads, kv_heads, experts, has_imatrix)


def importances(tensors: tuple[Planned, ...], imatrix: Imatrix) -> dict[str, Squares]:
    """What `imatrix` says of the inputs of each module, by its path, and of each tensor, by its name in GGUF.

    UserError where an entry is of another shape than its weight.
    """
    found = {}
    for each in tensors:
        rows = imatrix.importance(each.name, each.shape)
        if rows is None or each.link is None:
            continue
        for weight, row in zip(each.link.weights, rows.expand(len(each.link.weights), -1), strict=True):
            found[weight.removesuffix(".weight")] = known(row)
        found[each.name] = known(rows.mean(0))
    return found


def known(row: Tensor) -> Squares:
    """Inputs of which the mean squares [K] are known."""
    return Squares(row.shape[0], 1, row.double())


# Module -> rows of blocks that were made of it, None where there are none.
Packed = Callable[[str], Tensor | None]


def rows(
    each: Planned, kind: str, ckpt: AnyCheckpoint, packed: Packed, inputs: Mapping[str, Squares]
) -> Iterator[Tensor]:
    """uint8 [.., bytes of a row] of a tensor as type `kind`: of its modules, or rounded here."""
    assert each.link is not None
    for weight in each.link.weights:
        module = weight.removesuffix(".weight")
        made = packed(module)
        if made is not None:
            yield permuted(each.link, made)
            continue
        numbers = piece_of(each.link, weight, ckpt)
        numbers = numbers.reshape(-1, numbers.shape[-1])
        for piece in numbers.split(max(1, _PIECE // numbers.shape[1])):
            yield gguf_blocks.pack(kind, rounded(piece, kind, inputs.get(module) or inputs.get(each.name)))


def rounded(numbers: Tensor, kind: str, known: Squares | None) -> QTensor:
    """float32 [N, K] in the blocks of a ggml type."""
    spec = gguf_blocks.spec(kind)
    assert spec is not None
    return rtn.quantize(numbers, spec, known, Settings())
