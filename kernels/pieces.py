"""Cutting a QTensor by output rows, so that decoding it needs a bounded amount of memory.

Most tensors are cut as they are. Two rewrites, both exact and made of views or of data 1/group the size, make more of
them so: a `flat` view whose groups do not straddle rows is the plain layout, and a two-level scale whose super scales
straddle rows is expanded to float32. What is left (HQQ axis 0, flat groups that straddle rows, as 64-wide groups do in
a 172-wide weight) comes as one piece.
"""

from collections.abc import Iterator
from dataclasses import replace

from .families import mins, scales
from .qtensor import QTensor, own_supers, row_tile, whole_words


def straighten(q: QTensor) -> QTensor:
    """The same weight with `view` "" where a flat view holds whole groups and whole words per row; else `q` itself."""
    spec = q.spec
    if spec.view != "flat" or q.shape[1] % spec.group or not whole_words(spec, spec.group):
        return q
    parts = dict(q.parts)
    for name in ("codes", "scales", "zeros", "mins"):
        if name in parts:
            parts[name] = parts[name].reshape(q.shape[0], -1)
    return QTensor(replace(spec, view=""), q.shape, parts)


def flat_scales(q: QTensor) -> QTensor:
    """The same weight with its two-level scale (and min) expanded to one float32 level; a one-level tensor is returned
    as it is."""
    if q.spec.two_level is None:
        return q
    levels = ("super_scales", "super_mins", "scale_table", "scale_offset")
    parts = {k: t for k, t in q.parts.items() if k not in levels}
    parts["scales"] = scales(q.spec, q.parts)
    if "mins" in parts:
        parts["mins"] = mins(q.spec, q.parts)
    return QTensor(replace(q.spec, scale="f32"), q.shape, parts)


def pieces(q: QTensor, elements: int) -> Iterator[tuple[int, int, QTensor]]:
    """(start, stop, rows start..stop of q) covering all output rows, about `elements` weights at a time."""
    q = straighten(q)
    q = q if own_supers(q.spec, q.shape) else flat_scales(q)
    n, k = q.shape
    tile = row_tile(q.spec)
    step = n if q.spec.view else max(tile, elements // k // tile * tile)
    for start in range(0, n, step):
        stop = min(start + step, n)
        yield start, stop, q if step >= n else q.rows(start, stop)
