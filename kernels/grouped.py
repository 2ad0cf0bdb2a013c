# mypy: allow-untyped-defs
"""Mixture of experts: each token meets the weights of the few experts it was routed to, in one launch.

A pair is a token and one of its k experts; pair p = token * k + place. Pairs are sorted by expert (`route`), a program
takes BM neighbours of one expert and BN outputs, and finds which expert by the running count of blocks, so that
nothing is padded and the host never learns how many tokens an expert got: the launch can be captured in a CUDA graph.

  x       16-bit float | float32 [P / REPEAT, K]: pair p reads row p // REPEAT (k for the first product, 1 for the next)
  parts   tiles.Parts of all experts, [E, ...] each; an expert's part lies `strides` elements after the last one's
          (0: one for all)
  order   int64 [P]: pairs sorted by expert
  starts  int32 [E + 2]: expert e has order[starts[e]] ... order[starts[e + 1] - 1]; the last run, expert E, is of pairs
          whose expert is elsewhere (expert parallelism): their rows of y become 0
  weights float32 [P], or None: routing weight of each pair, multiplied in before rounding
  y       [P, N] in the order of the pairs, so that no permutation has to be undone

Rows expected per expert choose the body, as in cuda.plan: multiply-adds for one token on any GPU and for few rows on
old ones, a decoded tile and `tl.dot` above, and for many rows dequantize expert by expert, then the BLAS (that one
reads `starts` back to the host). Left out: split of K (experts times outputs fill the device at one token already).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import ops
from .cases import Case, Target, Weight
from .cuda import CudaMatmul, capability_of, dequantize, parse, triple
from .lang import EXACT, interpreted, jit, tl
from .matmul import accumulate
from .plans import Plan, power_of_two
from .tiles import Parts

# Pairs up to which experts hardly repeat: a row of multiply-adds each. Expected rows per expert up to which GPUs
# without a tensor-core dot use multiply-adds, and the others decode for each tile.
_FMA_PAIRS, _FMA_ROWS, _DOT_ROWS = 8, 8, 256
# Pairs up to which one launch sorts them; torch takes eight.
_ROUTE_PAIRS = 64


@jit
def grouped(
    x, parts, y, order, starts, weights, strides, N, K, E,
    SPEC: tl.constexpr, TRIPLE: tl.constexpr, REPEAT: tl.constexpr, EXPERTS: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """EXPERTS: a power of two above E. Grid (ceil(N / BN), at least the blocks of BM pairs there can be)."""
    each = tl.arange(0, EXPERTS)
    begin = tl.load(starts + each, mask=each <= E, other=0)
    end = tl.load(starts + each + 1, mask=each <= E, other=0)
    blocks = tl.cdiv(end - begin, BM)
    before = tl.cumsum(blocks, 0)
    block = tl.program_id(1)
    expert = tl.sum((before <= block).to(tl.int32), 0)
    if expert > E:
        return
    mine = each == expert
    row = tl.sum(tl.where(mine, begin + (block - before + blocks) * BM, 0), 0) + tl.arange(0, BM)
    inside = row < tl.sum(tl.where(mine, end, 0), 0)
    pair = tl.load(order + row, mask=inside, other=0)
    e = tl.minimum(expert, E - 1).to(tl.int64)
    shifted = Parts(
        codes=parts.codes + e * strides.codes,
        scales=parts.scales if parts.scales is None else parts.scales + e * strides.scales,
        zeros=parts.zeros if parts.zeros is None else parts.zeros + e * strides.zeros,
        table=parts.table if parts.table is None else parts.table + e * strides.table,
        super_scales=parts.super_scales
        if parts.super_scales is None
        else parts.super_scales + e * strides.super_scales,
        scale_table=parts.scale_table if parts.scale_table is None else parts.scale_table + e * strides.scale_table,
        scale_offset=parts.scale_offset
        if parts.scale_offset is None
        else parts.scale_offset + e * strides.scale_offset,
        mins=parts.mins if parts.mins is None else parts.mins + e * strides.mins,
        super_mins=parts.super_mins if parts.super_mins is None else parts.super_mins + e * strides.super_mins,
        global_scale=parts.global_scale
        if parts.global_scale is None
        else parts.global_scale + e * strides.global_scale,
    )
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    last = tl.where(expert < E, tl.cdiv(K, BK), 0)
    acc = accumulate(x, pair // REPEAT, inside, shifted, 0, last, rn, N, K, BK, SPEC, TRIPLE, DOT)
    if weights is not None:
        acc *= tl.load(weights + pair, mask=inside, other=0)[:, None]
    tl.store(y + pair[:, None] * N + rn[None, :], acc.to(y.dtype.element_ty), mask=inside[:, None] & (rn < N)[None, :])


@jit
def route_kernel(experts, order, starts, P, E, PAIRS: tl.constexpr, EXPERTS: tl.constexpr):
    """`sort` in one launch, for few pairs: a pair's place is the number of pairs that come before it. Grid (1,)."""
    p = tl.arange(0, PAIRS)
    e = tl.minimum(tl.load(experts + p, mask=p < P, other=0).to(tl.int32), E)
    # Beyond the last pair: after everything.
    e = tl.where(p < P, e, E + 1)
    before = (e[None, :] < e[:, None]) | ((e[None, :] == e[:, None]) & (p[None, :] < p[:, None]))
    place = tl.sum(before.to(tl.int32), 1)
    tl.store(order + place, p.to(tl.int64), mask=p < P)
    each = tl.arange(0, EXPERTS)
    tl.store(starts + each, tl.sum((e[None, :] < each[:, None]).to(tl.int32), 1), mask=each < E + 2)


@dataclass(frozen=True)
class Routing:
    """Which pairs go to which expert. Made by `route`, on the device of the indices."""

    order: Tensor
    starts: Tensor


def route(experts: Tensor, count: int) -> Routing:
    """experts int [T, k], 0 .. count - 1, or count and above for an expert that is elsewhere. No read back to the
    host."""
    return Routing(*sort(experts, count))


def sort_twin(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """order int64 [P], starts int32 [count + 2]."""
    ordered, order = experts.reshape(-1).clamp(max=count).sort(stable=True)
    bounds = torch.arange(count + 2, dtype=ordered.dtype, device=ordered.device)
    return order, torch.searchsorted(ordered, bounds, out_int32=True)


def _sort(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    flat = experts.reshape(-1)
    if not (flat.is_cuda or interpreted()) or not 0 < flat.shape[0] <= _ROUTE_PAIRS:
        return sort_twin(flat, count)
    order = torch.empty(flat.shape[0], dtype=torch.int64, device=flat.device)
    starts = torch.empty(count + 2, dtype=torch.int32, device=flat.device)
    sizes = max(16, power_of_two(flat.shape[0])), power_of_two(count + 2)
    route_kernel[(1,)](flat, order, starts, flat.shape[0], count, *sizes, num_warps=4, **EXACT)
    return order, starts


def _sort_fake(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return experts.new_empty(experts.numel(), dtype=torch.int64), experts.new_empty(count + 2, dtype=torch.int32)


sort = ops.define("route(Tensor experts, int count) -> (Tensor, Tensor)", _sort, _sort_fake)


def plan(pairs: int, experts: int, capability: int) -> Plan:
    """The body and tile for `pairs` rows spread over `experts`."""
    expected = -(-pairs // experts)
    dot = capability >= 80
    if pairs <= _FMA_PAIRS or (not dot and expected <= _FMA_ROWS):
        bm = 1 if pairs <= _FMA_PAIRS else power_of_two(expected)
        return Plan("gemv", {"BM": bm, "BN": 32, "BK": 128 if bm == 1 else 64 if bm <= 4 else 32}, 4, 2)
    if dot and expected <= _DOT_ROWS:
        return Plan("gemm", {"BM": min(64, max(16, power_of_two(expected))), "BN": 64, "BK": 64}, 4, 3)
    return Plan("dequant", {}, 4, 1)


class GroupedMatmul:
    """The products of all experts of one layer, which share a spec and a shape. Made by `stack`."""

    name = "triton-grouped"

    def __init__(self, experts: Sequence[CudaMatmul]) -> None:
        first = experts[0]
        self.spec, self.shape, self.dtype = str(first.packed.spec), first.packed.shape, first.dtype
        self.parts: list[Tensor | None] = [_stack(ts) for ts in zip(*(m.packed.parts for m in experts), strict=True)]
        for index, matmul in enumerate(experts):
            # The experts keep working, on views: nothing is held twice.
            matmul.rebase(Parts(*(None if t is None else t[index] for t in self.parts)))

    def __call__(self, x: Tensor, routing: Routing, repeat: int, weights: Tensor | None = None) -> Tensor:
        """x [P / repeat, K], any float dtype -> [P, N] in x's dtype, row p for pair p; weights [P] scale the rows."""
        rows = x.to(self.dtype).contiguous()
        scale = None if weights is None else weights.reshape(-1).float()
        y: Tensor = multiply(rows, self.parts, routing.order, routing.starts, scale, self.spec, self.shape[0], repeat)
        return y.to(x.dtype)


def stack(experts: Sequence[Any]) -> GroupedMatmul | None:
    """One product of the experts' Matmuls, which become views of it; None where they do not fit one launch: other
    paths than Triton, different specs or shapes, an input step of each expert's own (act-order)."""
    if not all(isinstance(m, CudaMatmul) and m.plain for m in experts):
        return None
    first = experts[0].packed
    for m in experts[1:]:
        same = all(
            (a is None) == (b is None) and (a is None or (a.shape == b.shape and a.dtype == b.dtype))
            for a, b in zip(first.parts, m.packed.parts, strict=True)
        )
        if not same or m.packed.spec != first.spec or m.packed.shape != first.shape:
            return None
    return GroupedMatmul(experts)


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """[E, ...]; one tensor, or small ones that are equal (a table), stays one, seen E times."""
    first = tensors[0]
    if first is None:
        return None
    held = [t for t in tensors if t is not None]
    if all(t is first or (first.numel() <= 256 and torch.equal(t, first)) for t in held[1:]):
        return first.expand(len(held), *first.shape)
    return torch.stack(held)


def _multiply(
    x: Tensor, parts: list[Tensor | None], order: Tensor, starts: Tensor, weights: Tensor | None, spec: str, n: int,
    repeat: int,
) -> Tensor:  # fmt: skip
    pairs, k, experts = order.shape[0], x.shape[1], starts.shape[0] - 2
    y = torch.empty(pairs, n, dtype=x.dtype, device=x.device)
    if not pairs:
        return y
    how = plan(pairs, experts, capability_of(x.device))
    if how.kernel == "dequant":
        return _by_expert(x, parts, order, starts, weights, spec, y, repeat)
    bm = how.tile["BM"]
    grid = (-(-n // how.tile["BN"]), min(pairs, pairs // bm + min(pairs, experts + 1)))
    found = parse(spec)
    strides = Parts(*(None if t is None else t.stride(0) for t in parts))
    grouped[grid](
        x, Parts(*parts), y, order, starts, weights, strides, n, k, experts, found, triple(found.family), repeat,
        power_of_two(experts + 1), how.kernel == "gemm", **how.tile, **how.options,
    )  # fmt: skip
    return y


def _by_expert(
    x: Tensor, parts: list[Tensor | None], order: Tensor, starts: Tensor, weights: Tensor | None, spec: str, y: Tensor,
    repeat: int,
) -> Tensor:  # fmt: skip
    """Many rows per expert: dequantize each that has any, then the BLAS."""
    bounds = starts.tolist()
    for expert, (start, stop) in enumerate(pairwise(bounds[:-1])):
        if start == stop:
            continue
        pairs = order[start:stop]
        own = [None if t is None else t[expert] for t in parts]
        weight = dequantize(own, spec, y.shape[1], x.shape[1], x.dtype)
        rows = torch.nn.functional.linear(x[pairs // repeat], weight)
        y[pairs] = rows if weights is None else (rows.float() * weights[pairs, None]).to(y.dtype)
    y[order[bounds[-2] :]] = 0
    return y


def _multiply_fake(
    x: Tensor, parts: list[Tensor | None], order: Tensor, starts: Tensor, weights: Tensor | None, spec: str, n: int,
    repeat: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(order.shape[0], n)


multiply = ops.define(
    "grouped(Tensor x, Tensor?[] parts, Tensor order, Tensor starts, Tensor? weights, str spec, int n, int repeat)"
    " -> Tensor",
    _multiply,
    _multiply_fake,
)

# (pairs, experts, pairs that share a row of x, whether rows are weighted): two experts of 64 for each of 64 tokens, and
# 8 of 128 for one. The second products of a layer, and more rows an expert, for one weight.
_AOT = ((128, 64, 2, False), (8, 128, 8, False))
_AOT_SECOND = ((128, 64, 1, True), (8, 128, 1, True), (4096, 64, 1, True))
_AOT_SPECS = (
    "affine4.g128.asym",
    "affine4.g32.min.u6:f16:8",
    "minifloat8.e4m3.channel.f32",
    "minifloat4.e2m1.g32.e8m0",
    "codebook4.nf4.g64.u8:f32:256",
    "codebook8.v8.x2.channel",
    "codebook26.iq3s.v8.g32.u4:f16:8",
)


@cache
def _types(pointers: Parts) -> Parts:
    return Parts(*(None if p is None else "i32" for p in pointers))


def aot_cases(target: Target, weights: Sequence[Weight]) -> Iterator[Case]:
    """Both bodies, for one weight of each kind of metadata and decode, and the sort. Not the trellis: those that files
    hold have steps around them."""
    types = {"experts": "*i64", "order": "*i64", "starts": "*i32", "P": "i32", "E": "i32"}
    sizes = {"PAIRS": _ROUTE_PAIRS, "EXPERTS": 256}
    yield Case("route", 8, "", "grouped", route_kernel, types, sizes, {"num_warps": 4, **EXACT}, target.dtype)
    for weight in weights:
        if str(weight.spec) in _AOT_SPECS:
            first = str(weight.spec) == _AOT_SPECS[0]
            for shape in (*_AOT, *(_AOT_SECOND if first else ())):
                yield from _grouped_case(target, weight, *shape)


def _grouped_case(
    target: Target, weight: Weight, pairs: int, experts: int, repeat: int, weighted: bool
) -> Iterator[Case]:
    spec, how = weight.spec, plan(pairs, experts, target.capability)
    if how.kernel == "dequant":
        return
    arguments = {
        "x": f"*{target.dtype}", "parts": weight.pointers, "y": f"*{target.dtype}", "order": "*i64", "starts": "*i32",
        "weights": "*fp32" if weighted else None, "strides": _types(weight.pointers), **dict.fromkeys("NKE", "i32"),
    }  # fmt: skip
    constants = {
        "SPEC": spec, "TRIPLE": triple(spec.family), "REPEAT": repeat, "EXPERTS": power_of_two(experts + 1),
        "DOT": how.kernel == "gemm", **how.tile,
    }  # fmt: skip
    name = f"{spec}.weighted" if weighted else str(spec)
    yield Case(
        f"grouped_{how.kernel}", pairs, name, spec.family, grouped, arguments, constants, how.options, target.dtype
    )
