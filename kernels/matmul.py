# mypy: allow-untyped-defs
"""y [M, N] = x [M, K] @ W [K, N], W decoded tile by tile. One body, every family.

  x     float16 | bfloat16 | float32 [M, K], row-major, contiguous
  parts tuple of pointers (tiles.Parts), meaning known only to TRIPLE (tiles.Triple)
  y     [S, M, N] for S = the grid's split of K: the result where S = 1, else float32 partial sums for `split_sum`
  SPEC  bitsmith.kernels.spec.Spec with `view`, `pre` and `act` empty

M, N and K are masked, so any positive size runs; BK is a multiple of 32, and group may divide BK, be a multiple of
it, or neither. Decoding is float32 in the order the family's torch twin states. `gemm` rounds the tile once to x's
dtype for the dot, `gemv` keeps it in float32; both accumulate in float32, and the order of the sum depends only on
shapes and tile sizes: no atomics, so a run repeats bit for bit. `dequant` writes what the twin writes. M is not
specialized on, so a batch that grows by a row compiles nothing. Experts are in grouped.py, native low-precision dots
in scaled.py.
"""

from .lang import jit, tl


@jit
def decode(parts, k0, rn, N, K, BK: tl.constexpr, SPEC: tl.constexpr, TRIPLE: tl.constexpr):
    """float32 [BK, BN]: each word loaded once, each scale once per group."""
    codes = TRIPLE[0](parts, k0, rn, N, K, BK, SPEC)
    return TRIPLE[2](TRIPLE[1](codes, parts, SPEC), parts, k0, rn, N, K, BK, SPEC)


@jit
def share(K, BK: tl.constexpr, axis: tl.constexpr):
    """First and past-the-last tile of K for this program's share of the split along grid `axis`."""
    steps = tl.cdiv(K, BK)
    share = tl.cdiv(steps, tl.num_programs(axis))
    first = tl.program_id(axis) * share
    return first, tl.minimum(first + share, steps)


@jit
def accumulate(
    x, rows, inside, parts, first, last, rn, N, K, BK: tl.constexpr, SPEC: tl.constexpr, TRIPLE: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """float32 [BM, BN]: rows `rows` of x (where `inside`) @ W[:, rn], over the tiles first .. last - 1 of K.

    DOT: decode a tile, then `tl.dot`; float32 as float32, not TF32. Otherwise plain multiply-adds for few rows: no
    tensor core and no padding to 16 rows; products stay spread over the tile until the end, one reduction per program
    instead of one per step.
    """
    if DOT:
        acc = tl.zeros((rows.shape[0], rn.shape[0]), tl.float32)
    else:
        acc = tl.zeros((rows.shape[0], BK, rn.shape[0]), tl.float32)
    for step in range(first, last):
        rk = step * BK + tl.arange(0, BK)
        a = tl.load(x + rows[:, None] * K + rk[None, :], mask=inside[:, None] & (rk < K)[None, :], other=0)
        w = decode(parts, step * BK, rn, N, K, BK, SPEC, TRIPLE)
        if DOT:
            acc = tl.dot(a, w.to(a.dtype), acc, input_precision="ieee")
        else:
            wide = tl.broadcast_to(a.to(tl.float32)[:, :, None], acc.shape)
            acc = tl.fma(wide, tl.broadcast_to(w[None], acc.shape), acc)
    if DOT:
        return acc
    else:
        return tl.sum(acc, 1)


@jit(do_not_specialize=["M"])
def gemv(
    x, parts, y, M, N, K,
    SPEC: tl.constexpr, TRIPLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Few rows, M <= BM. Grid (ceil(N / BN), S)."""
    rm = tl.arange(0, BM)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    first, last = share(K, BK, 1)
    acc = accumulate(x, rm, rm < M, parts, first, last, rn, N, K, BK, SPEC, TRIPLE, False)
    out = y + (tl.program_id(1) * M + rm)[:, None] * N + rn[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(rm < M)[:, None] & (rn < N)[None, :])


@jit(do_not_specialize=["M"])
def gemm(
    x, parts, y, M, N, K,
    SPEC: tl.constexpr, TRIPLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(N / BN), S, ceil(M / BM))."""
    rm = tl.program_id(2) * BM + tl.arange(0, BM)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    first, last = share(K, BK, 1)
    acc = accumulate(x, rm, rm < M, parts, first, last, rn, N, K, BK, SPEC, TRIPLE, True)
    out = y + (tl.program_id(1) * M + rm)[:, None] * N + rn[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(rm < M)[:, None] & (rn < N)[None, :])


@jit(do_not_specialize=["S"])
def split_sum(partial, y, S, SIZE, BLOCK: tl.constexpr):
    """y [SIZE] = sum over S of partial float32 [S, SIZE], in the order of the split. Grid (ceil(SIZE / BLOCK),)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(S):
        total += tl.load(partial + s * SIZE + at, mask=at < SIZE, other=0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < SIZE)


@jit
def dequant(
    parts, y, N, K, SPEC: tl.constexpr, TRIPLE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """y [N, K] (as in nn.Linear) = W transposed, rounded once to y's dtype. Grid (ceil(N / BN), ceil(K / BK))."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rk = tl.program_id(1) * BK + tl.arange(0, BK)
    w = decode(parts, tl.program_id(1) * BK, rn, N, K, BK, SPEC, TRIPLE)
    # int64: an embedding of 256k x 8192 has 2**31 elements.
    out = y + rn[:, None].to(tl.int64) * K + rk[None, :]
    tl.store(out, tl.trans(w).to(y.dtype.element_ty), mask=(rn < N)[:, None] & (rk < K)[None, :])
