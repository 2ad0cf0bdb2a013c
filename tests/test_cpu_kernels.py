"""Products on the CPU: every path against exact arithmetic, what it holds and gives back, and what it does when
probes fail."""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.kernels import bits, codebook, cpu, int4pack, lut, native, probe
from bitsmith.kernels.dispatch import Matmul, prepare
from bitsmith.kernels.families import scale_dtype, scale_shape
from bitsmith.kernels.pieces import pieces, straighten
from bitsmith.kernels.qtensor import QTensor, matrix_shape
from bitsmith.kernels.spec import Spec
from torch import Tensor

ROWS = (1, 3, 64, 65, 130)
# RMS error of the fast paths relative to ||y||, inputs of mean 0; rounding y to bfloat16 alone is 1.7e-3.
BOUND = 5e-3


@pytest.fixture(autouse=True)
def _no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves where the package was built without a compiler; the library has tests of its own (test_native.py)."""
    monkeypatch.setattr(native, "library", lambda: None)


def random_qtensor(text: str, shape: tuple[int, int]) -> QTensor:
    """Every code, scale and zero point at random, in the dtypes the spec names."""
    spec = Spec.parse(text)
    r, c = matrix_shape(spec, shape)
    count = scale_shape(spec, (r, c))
    codes = torch.randint(0, 1 << spec.bits, (r, c), dtype=torch.uint8)
    if spec.family == "minifloat":
        # No NaN or infinity; both signs.
        codes = (codes & 0x80) | (codes & 0x7F).clamp(max=0x7B if spec.table == "e5m2" else 0x7E)
    parts = {"codes": bits.pack(codes, spec.bits)}
    if spec.scale == "e8m0":
        parts["scales"] = torch.randint(118, 124, count, dtype=torch.uint8)
    elif spec.two_level:
        parts["scales"] = torch.randint(0, 256, count, dtype=torch.uint8)
        parts["super_scales"] = torch.rand(-(-parts["scales"].numel() // spec.two_level[1])) * 0.01
        parts |= {"scale_table": codebook.dynamic_map(), "scale_offset": torch.tensor(0.02)}
    else:
        parts["scales"] = (torch.rand(count) * 0.02 + 0.005).to(scale_dtype(spec.scale))
    middle = 1 << (spec.bits - 1)
    if spec.zero == "asym":
        parts["zeros"] = torch.randint(middle * 5 // 8, middle * 11 // 8 + 1, count, dtype=torch.uint8)
    elif spec.zero.startswith("z"):
        parts["zeros"] = ((0.75 * torch.rand(count) + 0.625) * (middle - 0.5)).to(scale_dtype(spec.zero[1:]))
    if spec.table in codebook.VALUES:
        parts["table"] = codebook.table(spec)
    if "perm" in spec.pre:
        parts["perm"] = torch.randperm(c).int()
    return QTensor(spec, shape, parts, {"input_scale": torch.tensor(0.5)})


def identical(a: QTensor, b: QTensor) -> bool:
    """Same spec, parts, order of parts, dtypes and bytes."""

    def raw(t: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
        return t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    def all_raw(q: QTensor) -> list[tuple[str, tuple[torch.dtype, torch.Size, bytes]]]:
        return [(name, raw(t)) for name, t in (*q.parts.items(), *q.extra.items())]

    return a.spec == b.spec and a.shape == b.shape and all_raw(a) == all_raw(b)


def check(product: Matmul, q: QTensor, bound: float = BOUND) -> None:
    weight = q.dequantize()
    for m in ROWS:
        x = torch.randn(m, q.shape[1]).to(torch.bfloat16)
        y = product(x)
        assert y.dtype is torch.bfloat16 and y.shape == (m, q.shape[0])
        assert probe.relative_error(y, x.float() @ weight.T) < bound, (product.name, str(q.spec), q.shape, m)
    assert identical(product.qtensor(), q)


@pytest.fixture
def unprobed() -> Iterator[None]:
    """Probes run anew inside the test and are forgotten after it."""

    def forget() -> None:
        for found in (probe.int4pack, probe.int8_linear, probe.dense_linear):
            found.cache_clear()

    forget()
    yield
    forget()


ALIGNED = (144, 512)
PACKED = [
    *(f"affine{b}.{g}.{z}" for b in (4, 8) for g in ("g32", "g128", "channel") for z in ("sym", "asym")),
    "affine4.g64.zf16",
    "affine4.g64.zf16.flat",
    "affine4.g64.none.bf16",
    "affine4.g96.sym.f32",
    "affine4.g512.asym.bf16",
    "affine4.g128.asym.perm",
    "affine8.g64.zf32.f32",
    "affine4.g32.sym.u8:f32:256",
]


@pytest.mark.parametrize("text", PACKED)
def test_int4pack(text: str) -> None:
    if probe.int4pack() is None:
        pytest.skip("this torch build has no usable 4-bit operator")
    for shape in ((48, 384), (144, 1536)) if "g96" in text else (ALIGNED, (16, 512), (80, 1536)):
        q = random_qtensor(text, shape)
        product = prepare(q, torch.bfloat16)
        assert product.name == "int4pack"
        check(product, q)


LOOKED_UP = [
    *(f"affine{b}.g64.{z}" for b in (1, 2, 3, 5, 6, 7) for z in ("sym", "asym", "zf16")),
    "affine4.g16.asym",
    "affine4.g48.zf16",
    "affine3.g128.sym.perm",
    "affine4.g64.zf16.axis0",
    "affine3.g64.zf16.flat",
    "minifloat8.e4m3.tensor.f32",
    "minifloat8.e4m3.channel.bf16",
    "minifloat8.e5m2.g32.e8m0",
    "minifloat8.e4m3.g128x128.f32",
    "codebook4.nf4.g64.f32.flat",
    "codebook4.fp4.g64.f32.flat",
    "codebook4.nf4.g64.u8:f32:256.flat",
]


@pytest.mark.parametrize("text", [*LOOKED_UP, "affine4.g128.sym", "affine8.g128.asym", "affine8.channel.sym"])
def test_lookup_on_awkward_shapes(text: str) -> None:
    """172 inputs: partial groups and words, flat groups that straddle rows; 33 outputs: no multiple of anything."""
    q = random_qtensor(text, (32, 172) if "axis0" in text else (33, 172))
    product = prepare(q, torch.bfloat16)
    assert product.name == "lookup"
    check(product, q)


@pytest.mark.parametrize("text", LOOKED_UP)
def test_lookup_on_even_shapes(text: str) -> None:
    q = random_qtensor(text, (144, 256))
    product = prepare(q, torch.bfloat16)
    assert product.name == "lookup"
    check(product, q)


@pytest.mark.parametrize("text", [*LOOKED_UP, *(f"affine{b}.g32.asym" for b in range(1, 9))])
def test_lookup_decodes_in_pieces(text: str) -> None:
    """Small pieces and one piece give the same weights, a bfloat16 rounding or two from the exact ones."""
    shape = (32, 192)
    q = random_qtensor(text.replace(".perm", ""), shape)
    whole = lut.decode(q)
    cut = list(pieces(q, 5 * shape[1]))
    assert torch.equal(torch.cat([lut.decode(piece) for _, _, piece in cut]), whole)
    assert [start for start, _, _ in cut] == [0, *(stop for _, stop, _ in cut[:-1])] and cut[-1][1] == shape[0]
    assert probe.relative_error(whole, q.dequantize()) < BOUND


@pytest.mark.parametrize("width", range(1, 9))
def test_lookup_of_strided_codes(width: int) -> None:
    """Slices and one-word transposes, as readers of other layouts hand them over."""
    for columns in (4, 50):
        q = random_qtensor(f"affine{width}.channel.sym", (6, columns))
        words = q.parts["codes"]
        spaced = torch.stack([words, words], -1)[..., 0]
        for codes in (spaced, words.T.contiguous().T):
            other = QTensor(q.spec, q.shape, {**q.parts, "codes": codes})
            assert torch.equal(lut.decode(other), lut.decode(q)) and torch.equal(other.dequantize(), q.dequantize())


def test_float8_look_up_is_exact() -> None:
    """All 256 codes, NaN and infinities included, under a scale of 1."""
    codes = torch.arange(256, dtype=torch.uint8)[None]
    for table, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        q = QTensor(
            Spec.parse(f"minifloat8.{table}.tensor"),
            (1, 256),
            {"codes": bits.pack(codes, 8), "scales": torch.ones(1, 1, dtype=torch.float16)},
        )
        torch.testing.assert_close(lut.decode(q).float(), codes.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "text", ["affine4.g64.asym.perm", "affine3.g64.sym", "affine8.channel.sym.a8", "affine2.g64.zf16.a8"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_input_shapes_strides_and_dtypes(text: str, dtype: torch.dtype) -> None:
    q = random_qtensor(text, (48, 128))
    product = prepare(q, torch.bfloat16)
    x = torch.randn(2, 3, 128).to(torch.bfloat16).to(dtype)
    flat = product(x.reshape(6, 128))
    assert torch.equal(product(x), flat.view(2, 3, 48)) and flat.dtype is dtype
    strided = torch.randn(6, 256, dtype=dtype)
    strided[:, ::2] = x.reshape(6, 128)
    assert torch.equal(product(strided[:, ::2]), flat)
    transposed = x.reshape(6, 128).T.contiguous().T
    assert torch.equal(product(transposed), flat)
    assert product(x[0, 0]).shape == (48,)
    assert product(x[:, :0]).shape == (2, 0, 48)


def test_reference_is_exact_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsmith.kernels.dispatch._PIECE", 1000)
    for text in ("affine3.g64.asym.perm", "minifloat8.e4m3.g16x64.f32", "codebook4.nf4.g64.u8:f32:256.flat"):
        q = random_qtensor(text, (40, 192))
        x = torch.randn(5, 192)
        for product in (prepare(q, torch.float32), prepare(q, torch.bfloat16, exact=True)):
            assert product.name == "reference" and product.nbytes == q.nbytes and product.qtensor() is q
            torch.testing.assert_close(product(x), x @ q.dequantize().T, rtol=1e-5, atol=1e-6)
        assert product(x.half()).dtype is torch.float16


def test_resident_bytes() -> None:
    """One copy of the weight: what the operator's bfloat16 scales cost over the QTensor is the only growth."""
    bounds = {
        "g128.sym": 1.05,
        "g128.asym": 1.05,
        "g64.sym": 1.09,
        "g32.sym": 1.17,
        "g64.zf16": 1.09,
        "channel.sym": 1.04,
    }
    for text, bound in bounds.items():
        q = random_qtensor(f"affine4.{text}", (64, 1024))
        assert prepare(q, torch.bfloat16).nbytes <= bound * q.nbytes, text
    for text, bound in (
        ("affine8.g128.sym", 1.06),
        ("affine8.channel.sym", 1.04),
        ("affine8.channel.sym.a8", 1.01 if W8A8 == "int8" else 1.04),
    ):
        q = random_qtensor(text, (64, 1024))
        assert prepare(q, torch.bfloat16).nbytes <= bound * q.nbytes, text
    for text in LOOKED_UP:
        q = random_qtensor(text, (33 if "axis0" not in text else 32, 172))
        assert prepare(q, torch.bfloat16).nbytes == q.nbytes


def test_unusual_scales_come_back() -> None:
    """Zeros, subnormals and the largest float16 as scales; zero points beyond the grid."""
    q = random_qtensor("affine4.g32.asym", (16, 128))
    q.parts["scales"][0] = torch.tensor([0.0, 6e-8, 65504.0, -0.001]).half()
    q.parts["zeros"][:2] = torch.tensor([[0, 15, 3, 200], [255, 0, 1, 9]], dtype=torch.uint8)
    assert identical(prepare(q, torch.bfloat16).qtensor(), q)
    far = random_qtensor("affine4.g32.zf16", (16, 128))
    far.parts["zeros"][3, 1] = -100
    assert prepare(far, torch.bfloat16).name == "lookup"
    check(prepare(far, torch.bfloat16), far)


def test_packing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q = random_qtensor("affine8.g64.asym", (208, 128))
    once = int4pack.pack(q)
    monkeypatch.setattr(int4pack, "_PACK_ELEMENTS", 1)
    pieces_of_it = int4pack.pack(q)
    assert once is not None and pieces_of_it is not None and torch.equal(once.packed, pieces_of_it.packed)


@pytest.mark.parametrize("layout", probe.LAYOUTS, ids=str)
@pytest.mark.parametrize("text", ["affine4.g32.asym", "affine8.g64.sym"])
def test_every_layout_decodes(layout: probe.Int4Layout, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layouts of other processors, packed here by index arithmetic, through the many-row path and back."""

    def convert(codes: Tensor, _: int) -> Tensor:
        n, k = codes.shape
        flat = []
        for start in range(0, n, layout.block):
            size = min(layout.block, n - start)
            split = layout.split and size == layout.block
            for column in range(k):
                for d in range(size // 2):
                    low, high = (d, d + size // 2) if split else (2 * d, 2 * d + 1)
                    flat.append(int(codes[start + low, column]) | int(codes[start + high, column]) << 4)
        return torch.tensor(flat, dtype=torch.uint8).view(n, k // 2)

    q = random_qtensor(text, (112, 64))
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", convert)
    monkeypatch.setattr(probe, "int4pack", lambda: layout)
    monkeypatch.setattr(int4pack, "_ROWS", {1: 0, 2: 0})
    monkeypatch.setattr(int4pack, "_DECODE_ROWS", 64)
    product = int4pack.pack(q)
    assert product is not None
    x = torch.randn(3, 64).to(torch.bfloat16)
    assert probe.relative_error(product(x), x.float() @ q.dequantize().T) < BOUND
    assert identical(product.qtensor(), q)


# What W8A8 becomes here: without VNNI oneDNN's uint8 x int8 product saturates and is refused.
W8A8 = "int8" if probe.int8_linear() else "a8+int4pack"


def test_w8a8_is_the_rounded_product() -> None:
    q = random_qtensor("affine8.channel.sym.a8", (48, 160))
    product = prepare(q, torch.bfloat16)
    assert product.name == W8A8
    twin = prepare(q, torch.float32)
    assert twin.name == "a8+reference"
    for m in ROWS:
        x = torch.randn(m, 160).to(torch.bfloat16)
        y = product(x)
        # The integers are exact: only y's own rounding is left (otherwise a bfloat16 product's). Rounding activations
        # to 255 steps costs 1e-2.
        assert probe.relative_error(y, twin(x.float())) < (2.5e-3 if W8A8 == "int8" else BOUND)
        assert 3e-3 < probe.relative_error(y, x.float() @ q.dequantize().T) < 1.5e-2
    assert not product(torch.zeros(2, 160, dtype=torch.bfloat16)).any()
    assert identical(product.qtensor(), q)


def test_int8_activations_only_where_asked() -> None:
    q = random_qtensor("affine8.channel.sym", (48, 256))
    assert prepare(q, torch.bfloat16).name == "int4pack"
    assert prepare(q, torch.bfloat16, act="a8").name == W8A8
    grouped = random_qtensor("affine4.g64.asym.perm", (48, 256))
    product = prepare(grouped, torch.bfloat16, act="a8")
    assert product.name == "a8+int4pack" and identical(product.qtensor(), grouped)
    x = torch.randn(9, 256).to(torch.bfloat16)
    assert probe.relative_error(product(x), x.float() @ grouped.dequantize().T) < 1.5e-2
    with pytest.raises(UserError, match=r"activation quantization is 'a6'; accepted: a8 .*, a4 .*, or leave it out"):
        prepare(q, torch.bfloat16, act="a6")


def test_exact_never_rounds_activations() -> None:
    """Not where the caller asks for it, and not where the spec does; a float32 product without `exact` follows it."""
    q = random_qtensor("affine8.channel.sym.a8", (48, 256))
    x = torch.randn(9, 256).to(torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        exact = prepare(q, dtype, exact=True)
        assert exact.name == "reference" and identical(exact.qtensor(), q)
        assert torch.equal(exact(x), torch.nn.functional.linear(x, q.dequantize(torch.bfloat16)))
    follows = prepare(q, torch.float32)
    assert follows.name == "a8+reference" and not torch.equal(follows(x), exact(x))
    for found in (q, random_qtensor("affine8.channel.sym", (48, 256))):
        with pytest.raises(
            UserError, match=r"exact=True never rounds activations and act='a8' asks for .*; leave one of the two out"
        ):
            prepare(found, torch.bfloat16, exact=True, act="a8")


def test_forced_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    q = random_qtensor("affine4.g64.sym", (16, 64))
    monkeypatch.setenv("BITSMITH_KERNELS", "reference")
    assert prepare(q, torch.bfloat16).name == "reference"
    monkeypatch.setenv("BITSMITH_KERNELS", "cpu")
    assert prepare(q, torch.float32).name == "int4pack"
    assert prepare(q, torch.float32, exact=True).name == "reference"
    with pytest.raises(
        UserError, match="BITSMITH_KERNELS is 'cpu' but the weights are on meta; load with device='cpu'"
    ):
        prepare(q.to("meta"), torch.bfloat16)
    monkeypatch.setenv("BITSMITH_KERNELS", "turbo")
    with pytest.raises(UserError, match="BITSMITH_KERNELS is 'turbo'; accepted: reference, triton, cpu, or unset"):
        prepare(q, torch.bfloat16)


def test_forced_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What the device templates take goes there; the rest is dequantized, and the log says why."""
    monkeypatch.setenv("BITSMITH_KERNELS", "triton")
    made = []
    monkeypatch.setattr("bitsmith.kernels.cuda.CudaMatmul", lambda q, dtype: made.append((q, dtype)) or "device")
    q = random_qtensor("affine4.g64.sym", (16, 64))
    assert prepare(q, torch.bfloat16) == "device" and made == [(q, torch.bfloat16)]
    with caplog.at_level(logging.WARNING):
        assert prepare(random_qtensor("affine4.g64.zf16.axis0", (16, 64)), torch.bfloat16).name == "reference"
    assert "axis 0" in caplog.text and "dequantizing at every call instead" in caplog.text


OPERATORS = {
    "_weight_int4pack_mm_for_cpu": ("aten", "affine4.g64.sym", "", "lookup"),
    "_convert_weight_to_int4pack_for_cpu": ("aten", "affine4.g64.sym", "", "lookup"),
    "qlinear_pointwise": ("onednn", "affine8.g256.sym", "a8", "a8+int4pack"),
    "qlinear_prepack": ("onednn", "affine8.g256.sym", "a8", "a8+int4pack"),
}


def _missing(*_: object) -> Tensor:
    raise NotImplementedError("no kernel for this backend\nmore lines follow")


def _changed() -> Tensor:
    raise AssertionError("unreachable: called with arguments")


def _garbage(*arguments: object) -> Tensor:
    shape = next(a.shape for a in arguments if isinstance(a, Tensor))
    return torch.full((*shape[:-1], 112), 7.0)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("broken", [_missing, _changed, _garbage])
def test_probe_falls_back_and_says_so_once(
    operator: str,
    broken: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    unprobed: None,
) -> None:
    namespace, text, act, path = OPERATORS[operator]
    monkeypatch.setattr(getattr(torch.ops, namespace), operator, broken)
    q = random_qtensor(text, (48, 256))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            product = prepare(q, torch.bfloat16, act=act)
    assert product.name == path
    x = torch.randn(3, 256).to(torch.bfloat16)
    assert probe.relative_error(product(x), x.float() @ q.dequantize().T) < 1.5e-2
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and torch.__version__ in said[0] and f"torch.ops.{namespace}." in said[0]
    reason = {_missing: "NotImplementedError: no kernel for this backend)", _changed: "TypeError: ", _garbage: " "}[
        broken
    ]
    assert reason in said[0] and "more lines" not in said[0] and "slower path" in said[0]


def test_unknown_layout_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, unprobed: None
) -> None:
    """Without a way back to the codes a save would need a second copy, so the operator is left alone."""
    monkeypatch.setattr(probe, "LAYOUTS", ())
    assert prepare(random_qtensor("affine4.g64.sym", (16, 64)), torch.bfloat16).name == "lookup"
    assert "wrong result on a test problem" in caplog.text


@pytest.mark.parametrize("shape", [(48, 96), (33, 172), (1, 7)])
def test_dense(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).to(torch.bfloat16)
    product = cpu.prepare_dense(weight)
    assert product.name == ("onednn" if probe.dense_linear() else "linear")
    for m in (0, *ROWS):
        x = torch.randn(2, m, shape[1]).to(torch.bfloat16)
        y = product(x)
        assert y.shape == (2, m, shape[0]) and y.dtype is x.dtype
        assert not m or probe.relative_error(y, x.float() @ weight.float().T) < BOUND
    assert torch.equal(product.weight(), weight) and product.nbytes == weight.nbytes


def test_dense_fallback(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, unprobed: None) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", _missing)
    weight = torch.randn(5, 7).to(torch.bfloat16)
    product = cpu.prepare_dense(weight)
    assert product.name == "linear" and product.weight() is weight and "mkldnn._linear_pointwise" in caplog.text
    wide = torch.randn(5, 7)
    assert torch.equal(cpu.prepare_dense(wide)(torch.eye(7)), wide.T)


def test_flat_view_of_whole_groups_is_the_plain_layout() -> None:
    q = random_qtensor("affine3.g64.zf16.flat", (10, 192))
    plain = straighten(q)
    assert plain.spec.view == "" and torch.equal(plain.dequantize(), q.dequantize())
    assert plain.parts["codes"].data_ptr() == q.parts["codes"].data_ptr()
    for text, shape in (("affine3.g64.zf16.flat", (10, 172)), ("affine3.g8.zf16.flat", (10, 64))):
        q = random_qtensor(text, shape)
        assert straighten(q) is q
