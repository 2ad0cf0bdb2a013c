"""A GGUF file as the goal of a quantization: which tensor gets which type, what is known of its inputs, and its rows in
the end.

Weights that are linears or experts go through the driver like any format's, module by module. The others (embeddings,
stacks that a checkpoint keeps transposed) are rounded when the file is written, tensor by tensor.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UserError
from ..models.checkpoint import AnyCheckpoint
from ..models.gguf_archs import Arch, arch_of_model
from ..models.gguf_names import Link, file_shape, in_file, interleaved, links
from ..quant_formats import gguf as dialect
from ..quant_formats import gguf_blocks
from ..quant_formats.base import Recipe
from ..quant_formats.gguf_mixture import Overrides, check_imatrix, file_type, tensor_types
from ..quant_formats.gguf_rules import MIXTURES, Facts
from . import rtn
from .imatrix import Imatrix
from .method import Settings
from .stats import Squares

PREFIX = "gguf:"
_DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Layout:
    """What a GGUF file of a model will hold; made by `plan`."""

    arch: Arch
    # A key of gguf_rules.MIXTURES.
    file_type: str
    links: tuple[Link, ...]
    # By tensor.
    types: Mapping[str, str]
    recipe: Recipe


def plan(
    model: PreTrainedModel, ckpt: AnyCheckpoint, name: str, overrides: Overrides, imatrix: Imatrix | None
) -> Layout:
    """The types of a file `name` ("q4_k_m") of this model, and the recipe they mean for the driver.

    UserError for an architecture that GGUF does not know, an unknown file type, shapes that do not fit, and types that
    need an importance matrix where there is none.
    """
    kind = file_type(name)
    arch = arch_of_model(model.config.model_type, str(ckpt.config_file))
    found = tuple(links(model, arch))
    shapes = {link.tensor: file_shape(link) for link in found}
    facts = _facts(arch, model, imatrix is not None)
    types = tensor_types(kind, facts, list(shapes.items()), overrides).types
    check_imatrix(kind, types, () if imatrix is None else imatrix.entries)
    modules = {
        weight.removesuffix(".weight"): spec
        for link in found
        if link.quantizable and (spec := gguf_blocks.spec(types[link.tensor]))
        for weight in link.weights
    }
    ternary = MIXTURES[kind].base
    options = {"ternary": ternary if ternary in dialect.TERNARY else dialect.TERNARY[-1]}
    return Layout(arch, kind, found, types, Recipe("gguf", (("*", "skip"),), options, modules=modules))


def _facts(arch: Arch, model: PreTrainedModel, has_imatrix: bool) -> Facts:
    config = model.config
    experts = next((getattr(config, f.field) for f in arch.fields if f.key == "expert_count"), 0)
    heads = config.num_attention_heads
    return Facts(
        arch.name.partition("+")[0],
        config.num_hidden_layers,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        experts,
        has_imatrix,
    )


def importances(layout: Layout, imatrix: Imatrix) -> dict[str, Squares]:
    """What `imatrix` says of the inputs of each module, and of the tensors that are no module's (by tensor).

    UserError where an entry is of another shape than its weight.
    """
    found = {}
    for link in layout.links:
        rows = imatrix.importance(link.tensor, file_shape(link))
        if rows is None:
            continue
        for weight, row in zip(link.weights, rows.expand(len(link.weights), -1), strict=True):
            found[weight.removesuffix(".weight")] = _known(row)
        found[link.tensor] = _known(rows.mean(0))
    return found


def _known(row: Tensor) -> Squares:
    return Squares(row.shape[0], 1, row.double())


def file_rows(
    layout: Layout, packed: Callable[[str], Tensor | None], dense: Callable[[str], Tensor], known: Mapping[str, Squares]
) -> Iterator[tuple[str, str, Sequence[int], Tensor]]:
    """(tensor, type, shape, content) of each tensor in the file's order; content uint8 [rows, bytes] of packed types,
    else numbers of the type's dtype.

    `packed` gives the rows the driver made of a module, None where it made none; `dense` any weight as numbers.
    """
    for link in layout.links:
        kind, shape = layout.types[link.tensor], file_shape(link)
        made = [packed(weight.removesuffix(".weight")) for weight in link.weights]
        if all(rows is not None for rows in made):
            rows = [_permuted(rows, link) for rows in made if rows is not None]
            yield link.tensor, kind, shape, torch.cat(rows) if len(rows) > 1 else rows[0]
            continue
        numbers = in_file(link, dense)
        if kind in _DENSE:
            yield link.tensor, kind, shape, numbers.to(_DENSE[kind])
            continue
        yield link.tensor, kind, shape, _rounded(numbers.flatten(0, -2).float(), kind, known.get(link.tensor))


def _permuted(rows: Tensor, link: Link) -> Tensor:
    return rows[interleaved(rows.shape[0], link.heads)] if link.heads else rows


# Numbers rounded at a time: a vocabulary's embeddings are a gigabyte in float32.
_PIECE = 1 << 24


def _rounded(numbers: Tensor, kind: str, known: Squares | None) -> Tensor:
    spec = gguf_blocks.spec(kind)
    assert spec is not None
    step = max(1, _PIECE // numbers.shape[1])
    pieces = (rtn.quantize(piece, spec, known, Settings()) for piece in numbers.split(step))
    return torch.cat([gguf_blocks.pack(kind, piece) for piece in pieces])
