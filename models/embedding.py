"""Embeddings whose table stays quantized: rows are looked up packed, and only those are decoded (kernels/rows.py)."""

import torch
from torch import Tensor, nn

from ..kernels.blocks import in_place
from ..kernels.dispatch import Reference, prepare
from ..kernels.qtensor import QTensor, independent_rows
from ..kernels.rows import Source, look_up, source, spec_of
from .linear import QuantLinear


class QuantEmbedding(nn.Embedding):
    """ids int64 [...] -> rows [..., K] in `dtype`. Made by `quantize_embedding` out of an nn.Embedding."""

    held: Source
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized table, built anew at each call: for the model code that reads `.weight` of an embedding."""
        return self.held.qtensor().dequantize(self.dtype)

    def qtensor(self) -> QTensor:
        return self.held.qtensor()

    def forward(self, ids: Tensor) -> Tensor:
        rows = look_up(self.held, ids, self.dtype)
        scale = getattr(self, "embed_scale", None)
        if scale is None:
            return rows
        return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


def can_quantize(module: nn.Module, q: QTensor) -> bool:
    """Whether `quantize_embedding` works: a plain embedding or one of transformers' scaled ones, of whole rows."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    scaled = type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")
    return (scaled or type(module).forward is nn.Embedding.forward) and independent_rows(q)


def quantize_embedding(module: nn.Embedding, q: QTensor, dtype: torch.dtype) -> None:
    """Put `q` in the place of the table, in place: buffers (a scale) and the module's identity stay."""
    held = source(Reference(q))
    assert held is not None
    del module._parameters["weight"]
    module.__class__ = QuantEmbedding
    assert isinstance(module, QuantEmbedding)
    module.held, module.dtype = held, dtype


def read_table(model: nn.Module) -> None:
    """Take the model's quantized table out of the blocks of a file, if it is still there: through a product and back,
    which is the library's fast way."""
    table = model.get_input_embeddings()  # type: ignore[operator]
    if isinstance(table, QuantEmbedding) and isinstance(table.held, Reference) and in_place([table.held.q.parts]):
        table.held = Reference(prepare(table.held.q, torch.bfloat16).qtensor())


def share_tied(model: nn.Module) -> None:
    """Let embeddings read their rows from the output head they are tied to, where its product gives rows.

    To be called on a model whose config ties them, when its products are final. Where they cannot, both are held.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(table, QuantEmbedding) or not isinstance(head, QuantLinear):
        return
    held = source(head.matmul)
    if held is not None and spec_of(held) == spec_of(table.held):
        table.held = held
