"""GGUF tensors read where they lie in the file: `gguf_blocks.unpack`, put off until somebody asks for a part. Products
of the native library never do: kernels/blocks.py packs for them straight from the file.
"""

from functools import cache

import torch
from torch import Tensor

from ..kernels import blocks, native
from ..kernels.qtensor import QTensor
from .gguf_blocks import BLOCKS, packed_type, unpack
from .gguf_fields import Field, Half, Plane, ScaleMinNibbles, ScaleMinSixes


def in_place(type_name: str, raw: Tensor, shape: tuple[int, int], order: Tensor | None = None) -> QTensor:
    """What `unpack` gives of rows `order` int64 [N] of raw (as they are, if None), in blocks still where the native
    library can read them: `raw` must then stay as it is until a part is asked for or a product has packed it.

    UserError as `unpack` raises it.
    """
    spec, layout = packed_type(type_name, raw, shape).spec, _layout(type_name)
    which = torch.arange(shape[0]) if order is None else order

    def parts(rows: Tensor) -> blocks.Parts:
        return unpack(type_name, rows, (rows.shape[0], shape[1])).parts

    if layout is None or native.library() is None:
        return QTensor(spec, shape, parts(raw if order is None else raw[order]))
    return QTensor(spec, shape, blocks.Blocks(layout, [(raw, which)], parts))


@cache
def _layout(type_name: str) -> blocks.Layout | None:
    """Blocks of the type as the native library reads them; None where it does not know one of their fields."""
    block, at, found = BLOCKS[type_name], 0, []
    for field in block.fields:
        one = _field(field)
        if one is None:
            return None
        one.at, one.size = at, field.size
        at += field.size
        found.append(one)
    return blocks.Layout(block.spec, block.width, at, tuple(found))


def _field(field: Field) -> blocks.Field | None:
    match field:
        case Half():
            return blocks.Field(blocks.HALF, blocks.PARTS.index(field.part), flip=0x8000 if field.negative else 0)
        case Plane(wide=False):
            where = {"bits": field.bits, "run": field.run, "place": field.place, "flip": field.flip}
            return blocks.Field(blocks.PLANE, blocks.PARTS.index(field.part), **where)
        case ScaleMinNibbles():
            return blocks.Field(blocks.NIBBLES, blocks.PARTS.index("scales"))
        case ScaleMinSixes():
            return blocks.Field(blocks.SIXES, blocks.PARTS.index("scales"))
    return None
