"""The oracle: bit streams, QTensor and grids against definitions written out element by element."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from bitsmith.kernels import bits, codebook
from bitsmith.kernels.families import family, scale_dtype, scale_shape, scales, spread
from bitsmith.kernels.grid import Params
from bitsmith.kernels.qtensor import (
    QTensor,
    build,
    can_concat,
    codes_of,
    concat,
    from_matrix,
    matrix_shape,
    to_matrix,
)
from bitsmith.kernels.spec import Spec
from safetensors.torch import load_file
from torch import Tensor


@pytest.mark.parametrize("unpack", [bits.unpack, bits.unpack_twin])
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 172, 300])
@pytest.mark.parametrize("width", [*range(1, 17), 24, 31, 32])
def test_bit_stream(width: int, columns: int, unpack: Callable[[Tensor, int, int], Tensor]) -> None:
    """Code c of a row is bits [c * width, (c + 1) * width) of the row read as one little-endian integer; the rest is
    0."""
    codes = torch.randint(0, 1 << width, (3, columns))
    codes[0] = (1 << width) - 1
    stored = codes.to(torch.uint8 if width <= 8 else torch.int32)
    packed = bits.pack(stored, width)
    assert packed.dtype is torch.int32 and packed.shape == (3, bits.words(columns, width))
    for row, expected in zip(packed, codes, strict=True):
        assert stream(row) == sum(int(c) << (i * width) for i, c in enumerate(expected))
    found = unpack(packed, width, columns)
    assert found.dtype is stored.dtype and torch.equal(found, stored)


def stream(words: Tensor) -> int:
    return int.from_bytes(words.contiguous().numpy().tobytes(), "little")


@pytest.mark.parametrize("unpack", [bits.unpack, bits.unpack_twin])
def test_unpack_of_many_rows_and_strided_words(
    unpack: Callable[[Tensor, int, int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bits, "_ROWS", 4)
    for width in (3, 4):
        codes = torch.randint(0, 1 << width, (11, 50), dtype=torch.uint8)
        words = bits.pack(codes, width)
        spaced = torch.zeros(11, 2 * words.shape[1], dtype=torch.int32)
        spaced[:, ::2] = words
        assert torch.equal(unpack(spaced[:, ::2], width, 50), codes)
        assert torch.equal(unpack(words[:, :1].T.contiguous().T, width, 3), codes[:, :3])


SPECS = [
    *(f"affine{b}.g32.{z}" for b in (1, 2, 3, 4, 5, 6, 7, 8) for z in ("sym", "asym", "zf16")),
    "affine4.channel.sym",
    "affine4.g24.none.bf16",
    "affine3.g16.asym.perm",
    "affine4.g16.zf32.f32.flat",
    "affine4.g16.zbf16.axis0",
    "affine5.tensor.asym",
    "minifloat8.e4m3.g16x32.f32",
    "minifloat8.e5m2.channel.bf16",
    "minifloat8.e4m3.tensor.f32",
    "minifloat8.e4m3.g32.e8m0",
    "codebook4.nf4.g64.f32.flat",
    "codebook4.fp4.g32",
    "codebook4.nf4.g16.u8:f32:8.flat",
    "affine4.g32.min",
    "affine5.g24.min.bf16",
    "affine2.g32.one",
    "minifloat4.e2m1.g32.e8m0",
    "minifloat4.e2m1.g16.ue4m3",
    "codebook4.iq4nl.g32",
    "codebook1.sign.g16",
]


def quantize(weight: Tensor, text: str, importance: Tensor | None = None) -> tuple[QTensor, Tensor]:
    """Fit and round a weight -> (QTensor, the values `nearest` promised, [R, C])."""
    spec = Spec.parse(text)
    matrix = to_matrix(weight, spec)
    grid = family(spec).grid
    params = grid.fit(matrix, spec, importance)
    codes, values = grid.nearest(matrix, spec, wide(params, spec, matrix))
    perm = torch.randperm(weight.shape[1]) if "perm" in spec.pre else None
    return build(codes, params, spec, (weight.shape[0], weight.shape[1]), perm), values


def wide(params: Params, spec: Spec, matrix: Tensor) -> Params:
    shape = (matrix.shape[0], matrix.shape[1])
    zero = None if params.zero is None else spread(params.zero, spec, shape)
    return Params(spread(params.scale, spec, shape), zero, params.parts)


def float8(code: int, exponent_bits: int) -> float:
    """IEEE-like: sign, exponent, mantissa; exponent 0 is subnormal."""
    mantissa_bits = 7 - exponent_bits
    bias = (1 << (exponent_bits - 1)) - 1
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits)
    size = 2.0 ** (1 - bias) * fraction if exponent == 0 else 2.0 ** (exponent - bias) * (1 + fraction)
    return -size if code & 0x80 else size


def element(q: QTensor, row: int, column: int) -> numpy.float32:
    """Weight [row, column] of the grouped matrix, from the parts, in float32."""
    spec, f32 = q.spec, numpy.float32
    code = (stream(q.parts["codes"][row]) >> (column * spec.bits)) & ((1 << spec.bits) - 1)
    place = (0 if spec.rows == -1 else row // spec.rows, 0 if spec.group == -1 else column // spec.group)
    stored = q.parts["scales"][place]
    if spec.two_level:
        block = (place[0] * q.parts["scales"].shape[1] + place[1]) // spec.two_level[1]
        level = f32(q.parts["scale_table"][int(stored)]) * f32(q.parts["super_scales"][block])
        scale = level + f32(q.parts["scale_offset"])
    else:
        scale = {"e8m0": lambda: f32(2.0 ** (int(stored) - 127)), "ue4m3": lambda: f32(float8(int(stored), 4))}.get(
            spec.scale, lambda: f32(stored.float())
        )()
    if spec.table == "e2m1":
        # Two bits of exponent, biased by 1, one of mantissa.
        size = (code & 1) / 2 if code & 6 == 0 else 2.0 ** ((code >> 1 & 3) - 1) * (1 + (code & 1) / 2)
        return f32(-size if code & 8 else size) * scale
    if spec.family == "minifloat":
        return f32(float8(code, 4 if spec.table == "e4m3" else 5)) * scale
    if spec.family == "codebook":
        return f32(q.parts.get("table", torch.tensor(codebook.VALUES.get(spec.table)))[code]) * scale
    if spec.zero == "min":
        return f32(code) * scale + f32(q.parts["mins"][place].float())
    zero = {"none": f32(0), "one": f32(1), "sym": f32(2 ** (spec.bits - 1))}.get(spec.zero)
    return (f32(code) - (f32(q.parts["zeros"][place].float()) if zero is None else zero)) * scale


def place_of(spec: Spec, shape: tuple[int, int], n: int, k: int) -> tuple[int, int]:
    """Where weight [n, k] sits in the grouped matrix, by the definition of each view."""
    index = n * shape[1] + k
    if spec.view == "flat":
        return divmod(index, spec.group)
    if spec.view == "axis0":
        column, row = divmod(index, shape[0] * shape[1] // spec.group)
        return row, column
    return n, k


@pytest.mark.parametrize("text", SPECS)
def test_dequantize_element_by_element(text: str) -> None:
    """Bit for bit. 20 x 52: partial groups, partial tiles, partial words, groups that straddle rows."""
    shape = (20, 52)
    q, _ = quantize(torch.randn(shape) * 0.1, text)
    got = q.dequantize()
    assert got.shape == shape and got.dtype is torch.float32
    order = q.parts["perm"].tolist() if "perm" in q.spec.pre else range(shape[1])
    for n in range(shape[0]):
        for packed_column, k in enumerate(order):
            assert got[n, k].item() == element(q, *place_of(q.spec, shape, n, packed_column)), (text, n, k)
    assert torch.equal(q.dequantize(torch.bfloat16), got.to(torch.bfloat16))


def test_sizes() -> None:
    q, _ = quantize(torch.randn(16, 64), "affine4.g32.asym")
    # 32 bytes of codes, 2 scales of 2 bytes, 2 zero points of 1 byte a row.
    assert q.nbytes == 16 * (32 + 4 + 2) and q.bpw == 8 * 38 / 64
    assert q.to("meta").parts["codes"].device.type == "meta"


@pytest.mark.parametrize("text", SPECS)
def test_matrix_form_is_invertible(text: str) -> None:
    spec = Spec.parse(text)
    weight = torch.randn(20, 52)
    matrix = to_matrix(weight, spec)
    assert matrix.shape == matrix_shape(spec, (20, 52)) and torch.equal(from_matrix(matrix, spec, (20, 52)), weight)


@pytest.mark.parametrize(
    "text",
    [
        "affine3.g32.asym",
        "affine4.channel.sym",
        "affine4.g32.sym.perm",
        "minifloat8.e4m3.g8x32.f32",
        "affine8.tensor.sym",
    ],
)
def test_rows_and_shards(text: str) -> None:
    q, _ = quantize(torch.randn(32, 64), text)
    whole = q.dequantize()
    assert torch.equal(q.rows(8, 24).dequantize(), whole[8:24])
    for rank in range(4):
        assert torch.equal(q.shard(0, rank, 4).dequantize(), whole[8 * rank : 8 * rank + 8])


def test_last_tile_may_be_partial() -> None:
    q, _ = quantize(torch.randn(20, 64), "minifloat8.e4m3.g8x32.f32")
    assert torch.equal(q.rows(16, 20).dequantize(), q.dequantize()[16:])


@pytest.mark.parametrize(
    "text", ["affine3.g32.asym", "affine8.g8.zf16", "codebook4.nf4.g16.f32", "affine2.channel.sym"]
)
def test_shards_of_inputs(text: str) -> None:
    q, _ = quantize(torch.randn(6, 128), text)
    halves = [q.shard(1, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([h.dequantize() for h in halves], 1), q.dequantize())


REFUSED = {
    "does not divide by 3 ranks": lambda: _make("affine4.g32.sym").shard(0, 0, 3),
    "cannot be cut into 4 whole groups and words": lambda: _make("affine4.g32.sym").shard(1, 0, 4),
    "cannot be cut into 16 whole groups and words": lambda: _make("affine4.channel.sym").shard(1, 0, 16),
    "affine4.g32.sym.perm: 64 inputs cannot be cut": lambda: _make("affine4.g32.sym.perm").shard(1, 0, 2),
    "rows are not independent, so it cannot be cut or stacked": lambda: _make("minifloat8.e4m3.g8x8.f32").shard(
        1, 0, 2
    ),
    "rows are not independent, so it cannot be cut by rows": lambda: _make("affine4.g32.sym.flat").rows(0, 4),
    "rows 4..8 of 16 cut a tile of 8 rows": lambda: _make("minifloat8.e4m3.g8x32.f32").rows(4, 8),
    "cannot stack affine4.g32.sym (16, 64), affine4.g16.sym (16, 64)": lambda: concat(
        [_make("affine4.g32.sym"), _make("affine4.g16.sym")]
    ),
}


def _make(text: str) -> QTensor:
    return quantize(torch.randn(16, 64), text)[0]


@pytest.mark.parametrize("message", REFUSED)
def test_refused_cuts_say_why(message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        REFUSED[message]()


def test_concat() -> None:
    for text in ("affine3.g32.asym", "codebook4.nf4.g32.f32", "affine4.channel.sym"):
        a, b = quantize(torch.randn(5, 64), text)[0], quantize(torch.randn(3, 64), text)[0]
        both = concat([a, b])
        assert both.shape == (8, 64) and torch.equal(both.dequantize(), torch.cat([a.dequantize(), b.dequantize()]))
        assert torch.equal(both.rows(5, 8).parts["codes"], b.parts["codes"])
    ordered = [_make("affine4.g32.sym.perm") for _ in range(2)]
    assert not can_concat(ordered)
    ordered[1].parts["perm"].copy_(ordered[0].parts["perm"])
    assert can_concat(ordered)
    for text in ("affine4.g32.sym.flat", "minifloat8.e4m3.g8x8.f32", "codebook4.nf4.g32.u8:f32:8"):
        assert not can_concat([_make(text), _make(text)])


@pytest.mark.parametrize("text", SPECS)
def test_file_holds_what_nearest_promised(text: str) -> None:
    """Scales and zero points are rounded to their storage before codes are chosen: decoding gives the same bits."""
    q, values = quantize(torch.randn(20, 52) * 0.1, text)
    matrix = family(q.spec).decode(q.spec, q.parts, matrix_shape(q.spec, q.shape))
    assert torch.equal(matrix, values)
    counts = scale_shape(q.spec, matrix_shape(q.spec, q.shape))
    assert q.parts["scales"].shape == counts and q.parts.get("zeros", q.parts["scales"]).shape == counts
    if not q.spec.two_level:
        assert q.parts["scales"].dtype is scale_dtype(q.spec.scale)


@pytest.mark.parametrize("text", SPECS)
def test_nearest_is_nearest(text: str) -> None:
    """Against every code there is, for weights inside, outside and exactly halfway."""
    spec = Spec.parse(text)
    kind = family(spec)
    weight = torch.randn(20, 52) * 0.1
    matrix = to_matrix(weight, spec)
    params = wide(kind.grid.fit(matrix, spec), spec, matrix)
    matrix = torch.cat([matrix[:10], 3 * matrix[10:]])
    codes, values = kind.grid.nearest(matrix, spec, params)
    zero = params.zero if params.zero is not None else kind.fixed_zero(spec)
    zero = zero if zero is None or isinstance(zero, Tensor) else torch.tensor(zero)
    best = torch.full_like(matrix, torch.inf)
    for code in range(1 << spec.bits):
        number = kind.value(spec, torch.full_like(codes, code), params.parts)
        candidate = kind.scale(number, params.scale, None if spec.zero == "min" else zero)
        if spec.zero == "min" and params.zero is not None:
            candidate = candidate + params.zero
        assert torch.equal(candidate.expand_as(values)[codes == code], values[codes == code])
        if number.isfinite().all():
            best = torch.minimum(best, (candidate - matrix).abs())
    # The quotient w / scale is rounded once before it is compared with the midpoints.
    assert ((values - matrix).abs() <= best + 1e-6 * matrix.abs()).all()


@pytest.mark.parametrize("text", SPECS)
def test_fit_covers_the_range(text: str) -> None:
    """No weight is further from its value than half the widest gap between neighbours (asymmetric ends: one step)."""
    spec = Spec.parse(text)
    if spec.table in ("e2m1", "sign") and spec.scale in ("e8m0", "f16"):
        pytest.skip("its rule cuts the largest numbers off (microscaling), or has no range to cover (signs)")
    weight = torch.randn(20, 52) * 0.1
    if spec.zero == "none" and spec.family == "affine":
        weight = weight.abs()
    q, values = quantize(weight, text)
    matrix = to_matrix(weight, spec)
    scale = spread(scales(spec, q.parts), spec, (matrix.shape[0], matrix.shape[1]))
    numbers = family(spec).value(spec, torch.arange(1 << spec.bits, dtype=torch.uint8)[None], q.parts)[0]
    finite = numbers[numbers.isfinite()].sort().values
    step = 1.0 if spec.family == "affine" else (finite[1:] - finite[:-1]).max() / 2
    slack = 1.02 if spec.two_level is None else 1.2
    assert ((values - matrix).abs() <= slack * step * scale.abs() + 1e-6).all()


@pytest.mark.parametrize("text", [text for text in SPECS if not Spec.parse(text).two_level])
def test_weighted_fit_is_never_worse(text: str) -> None:
    """One-level scales only: a second level is chosen after the search, which cannot see its rounding."""
    spec = Spec.parse(text)
    weight = torch.randn(20, 52) * 0.1
    weight[3, 7], weight[11, 40] = 1.5, -2.0
    matrix = to_matrix(weight, spec)
    importance = torch.rand_like(matrix) ** 4 + 1e-3
    errors = [(importance * (quantize(weight, text, w)[1] - matrix) ** 2).sum().item() for w in (None, importance)]
    assert errors[1] <= errors[0] * (1 + 1e-6)
    # e8m0 scales are powers of two: a small shrink proposes the same one, a large one may not pay.
    assert errors[1] < errors[0] or spec.family == "minifloat"


def test_groups_of_zeros_and_single_weights() -> None:
    for text in (
        "affine4.g32.sym",
        "affine4.g32.asym",
        "affine3.g32.zf16",
        "minifloat8.e4m3.g32.e8m0",
        "codebook4.nf4.g32.f32",
    ):
        q, _ = quantize(torch.zeros(3, 64), text)
        assert not q.dequantize().any()
        lonely = torch.zeros(3, 64)
        lonely[1, 40] = 0.7
        q, _ = quantize(lonely, text)
        assert q.dequantize().isfinite().all() and abs(q.dequantize()[1, 40].item() - 0.7) < 0.06


def test_nf4_table_is_that_of_bitsandbytes(shared: Callable[[str], Path]) -> None:
    tensors = load_file(shared("interop/bnb-nf4") / "model.safetensors")
    tables = [t for name, t in tensors.items() if name.endswith(".quant_map")]
    assert tables and all(torch.equal(t, codebook.table(Spec.parse("codebook4.nf4.g64"))) for t in tables)


def test_dynamic_map() -> None:
    """Values bitsandbytes prints for its signed 8-bit map, from both ends and around zero."""
    found = codebook.dynamic_map()
    assert found.shape == (256,) and (found.diff() > 0).all()
    ends = torch.tensor([-0.99296875, -0.97890625, -0.96484375, 0.96484375, 0.97890625, 0.99296875, 1.0])
    torch.testing.assert_close(torch.cat([found[:3], found[-4:]]), ends)
    middle = torch.tensor([-3.25e-6, -5.5e-7, 0.0, 5.5e-7, 3.25e-6, 7.75e-6])
    torch.testing.assert_close(found[125:131], middle, rtol=1e-6, atol=0)


def test_two_level_scales() -> None:
    """Block scales, less their mean, in the 8-bit map times an absmax per super block."""
    weight = torch.randn(16, 128) * torch.rand(16, 1)
    q, _ = quantize(weight, "codebook4.nf4.g16.u8:f32:32")
    wanted = weight.view(16, 8, 16).abs().amax(-1)
    found = scales(q.spec, q.parts)
    assert q.parts["scales"].dtype is torch.uint8 and q.parts["super_scales"].shape == (4,)
    torch.testing.assert_close(q.parts["scale_offset"], wanted.mean())
    coarsest = (codebook.dynamic_map().diff().max() / 2 * q.parts["super_scales"].max()).item()
    assert (found - wanted).abs().max().item() <= coarsest * 1.001
    one_level, _ = quantize(weight, "codebook4.nf4.g16.f32")
    errors = [(t.dequantize() - weight).norm() / weight.norm() for t in (q, one_level)]
    assert errors[0] < 1.1 * errors[1] and codes_of(q).max() == 15
