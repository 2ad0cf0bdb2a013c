"""The native CPU library against its torch twins: every instruction set this machine has, every storage, awkward shapes."""

import itertools
from functools import partial

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.kernels import bits, codebook, dispatch, fused, native, native_layer, repack
from bitsmith.kernels.affine import zero_dtype
from bitsmith.kernels.attention import Parts, paged_attention
from bitsmith.kernels.attention import native as native_attention
from bitsmith.kernels.families import scale_dtype, scale_shape
from bitsmith.kernels.minifloat import FLOATS
from bitsmith.kernels.qtensor import QTensor, matrix_shape
from bitsmith.kernels.spec import Spec
from bitsmith.kv_quant.base import load_codec
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(
        native.best_path() in ("", "generic"),
        reason="no native library for this processor, or built without a C++ compiler",
    ),
]

SPECS = (
    "affine1.g128.sym", "affine2.g64.zf16", "affine3.g64.asym", "affine4.g128.sym", "affine4.g32.asym", "affine4.channel.asym",
    "affine5.g128.asym.bf16", "affine6.g64.asym", "affine7.g128.asym.f32", "affine8.g128.asym", "affine8.channel.sym.f32",
    "minifloat8.e4m3.g128x128.f32", "minifloat8.e4m3.channel.f32", "minifloat8.e5m2.tensor.f32",
    "codebook4.nf4.g64.f32", "codebook4.nf4.g64.u8:f32:256", "codebook4.fp4.g64.bf16",
    "codebook4.nf4.g64.u8:f32:256.flat", "affine4.g64.zf16.flat",
)  # fmt: skip
# Rows and inputs that fill blocks and that do not.
SHAPES = ((48, 256), (33, 160), (16, 128), (1, 64), (40, 608))
ROWS = (1, 2, 3, 5, 8, 16, 17, 33, 70)


def random_qtensor(text: str, shape: tuple[int, int]) -> QTensor:
    spec = Spec.parse(text)
    matrix = matrix_shape(spec, shape)
    grid = scale_shape(spec, matrix)
    codes = torch.randint(0, 1 << spec.bits, matrix, dtype=torch.uint8)
    parts = {}
    if spec.family == "minifloat":
        # NaN and infinity are not weights.
        finite = torch.arange(256, dtype=torch.uint8).view(FLOATS[spec.table]).float().isfinite()
        codes = torch.where(finite[codes.long()], codes, 0)
    if spec.two_level:
        parts["scales"] = torch.randint(0, 256, grid, dtype=torch.uint8)
        parts["super_scales"] = torch.rand(-(-grid[0] * grid[1] // spec.two_level[1])) + 0.5
        parts["scale_table"], parts["scale_offset"] = codebook.dynamic_map(), torch.tensor(2.0)
    else:
        parts["scales"] = (torch.rand(grid) + 0.5).to(scale_dtype(spec.scale))
    if spec.zero == "asym":
        parts["zeros"] = torch.randint(0, 1 << spec.bits, grid, dtype=torch.uint8)
    elif spec.zero.startswith("z"):
        parts["zeros"] = (torch.rand(grid) * (1 << spec.bits)).to(zero_dtype(spec))
    if spec.family == "codebook":
        parts["table"] = codebook.table(spec)
    return QTensor(spec, shape, {"codes": bits.pack(codes, spec.bits), **parts})


def cases() -> list[tuple[str, tuple[int, int]]]:
    found = []
    for text, shape in itertools.product(SPECS, SHAPES):
        group = Spec.parse(text).group
        if group == -1 or shape[1] % group == 0:
            found.append((text, shape))
    return found


def paths() -> list[str]:
    """All that this machine can run."""
    if not native.best_path():
        return []
    best = native.best_path()
    if best.startswith("neon"):
        return ["generic", "neon"] + ["neon-dotprod"] * (best == "neon-dotprod")
    last = native.PATHS.index(best)
    return [p for p in native.PATHS if (p == "folded" and best == "amx") or native.PATHS.index(p) <= last]


def close(y: Tensor, wanted: Tensor, limit: float, size: Tensor | None = None) -> None:
    """size: what an error is measured by, where the numbers wanted may be small by cancellation."""
    assert y.shape == wanted.shape and bool(y.isfinite().all())
    error = float((y.float() - wanted.float()).norm() / (wanted if size is None else size).float().norm())
    assert error < limit, error


def terms(x: Tensor, weight: Tensor) -> Tensor:
    """The size of a sum of products with independent errors."""
    return (x.square() @ weight.square().T).sqrt()


@pytest.mark.parametrize(("text", "shape"), cases())
def test_products(text: str, shape: tuple[int, int]) -> None:
    """Integer dot products are exact: only float32 sums differ from the twin. Panels and tables round weights to bfloat16."""
    q = random_qtensor(text, shape)
    if not native.supports(q):
        # Tables need AVX-512 with bfloat16.
        assert q.spec.family != "affine" and native.best_path() not in ("avx512", "amx")
        pytest.skip(f"{q.spec} needs avx512 and this machine has {native.best_path()}")
    product, weight = native.pack(q), q.dequantize()
    for path, m in itertools.product(paths(), ROWS):
        if product.name == "native" and path in ("generic", "avx2"):
            continue
        x = torch.randn(m, shape[1])
        x[0, 0] = 30.0
        if product.name == "native-a8" and path != "folded":
            group = shape[1] if q.spec.group == -1 else q.spec.group
            close(product(x, path), native.rounded_activations(x, group) @ weight.T, 1e-5, terms(x, weight))
        else:
            x = x.bfloat16().float()
            close(product(x, path), x @ weight.T, 4e-3, terms(x, weight))


@pytest.mark.parametrize(("text", "shape"), cases())
def test_the_same_tensor_comes_back(text: str, shape: tuple[int, int]) -> None:
    q = random_qtensor(text, shape)
    if not native.supports(q):
        pytest.skip(f"{q.spec} is not packed on this machine")
    product = native.pack(q)
    back = product.qtensor()
    assert back.spec == q.spec and back.shape == q.shape and back.parts.keys() == q.parts.keys()
    for name, part in q.parts.items():
        assert torch.equal(back.parts[name], part) and back.parts[name].dtype == part.dtype, name
    if shape == (48, 256):
        assert product.nbytes <= 1.03 * q.nbytes


def test_dtypes_and_activations_of_any_layout() -> None:
    q = random_qtensor("affine4.g64.asym", (48, 128))
    product = dispatch.prepare(q, torch.bfloat16)
    assert product.name == "native-a8"
    x = torch.randn(2, 256, 3)[:, ::2].transpose(1, 2)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        y = product(x.to(dtype))
        assert y.dtype == dtype and y.shape == (2, 3, 48)
        close(y, x.to(dtype).float() @ q.dequantize().T, 2e-2)
    assert product(torch.zeros(0, 128, dtype=torch.bfloat16)).shape == (0, 48)
    zero = torch.zeros(3, 128, dtype=torch.bfloat16)
    assert torch.equal(product(zero), torch.zeros(3, 48, dtype=torch.bfloat16))


def test_permuted_inputs() -> None:
    q = random_qtensor("affine4.g32.sym", (32, 96))
    spec = Spec.parse("affine4.g32.sym.perm")
    permuted = QTensor(spec, q.shape, {**q.parts, "perm": torch.randperm(96).int()})
    product = dispatch.prepare(permuted, torch.bfloat16)
    assert product.name == "native-a8"
    x = torch.randn(4, 96).bfloat16()
    close(product(x), x.float() @ permuted.dequantize().T, 2e-2)
    assert torch.equal(product.qtensor().parts["perm"], permuted.parts["perm"])


@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("text", ["affine4.g128.asym", "affine4.g64.zf16", "affine4.g96.zf16"])
def test_bfloat16_activations_on_request(text: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.best_path() not in ("avx512", "amx"):
        pytest.skip("needs avx512 with bfloat16")
    q = random_qtensor(text, (64, 480))
    x, weight = torch.randn(m, 480).bfloat16(), q.dequantize()
    wanted = x.float() @ weight.T
    rounded = dispatch.prepare(q, torch.bfloat16)(x)
    monkeypatch.setenv("BITSMITH_ACT", "bf16")
    product = dispatch.prepare(q, torch.bfloat16)
    assert product.name == "native"
    kept = product(x)
    assert (kept - wanted).norm() < (rounded - wanted).norm()
    close(kept, wanted, 4e-3, terms(x.float(), weight))
    monkeypatch.setenv("BITSMITH_ACT", "fp4")
    with pytest.raises(UserError, match="BITSMITH_ACT is 'fp4'; accepted: int8"):
        dispatch.prepare(q, torch.bfloat16)


@pytest.mark.parametrize("text", ["affine4.g32.asym", "affine3.g128.asym", "affine8.channel.sym.f32"])
def test_a_row_does_not_depend_on_its_neighbours(text: str) -> None:
    """int8 products of few rows give a row the same bits whatever the batch, on vectors and on tiles."""
    product = native.pack(random_qtensor(text, (80, 256)))
    x = torch.randn(48, 256)
    alone = torch.cat([product(row[None]) for row in x])
    for path in paths():
        if path in ("avx512", "amx"):
            for m in (1, 2, 4, 7, 16, 33, 48):
                assert torch.equal(product(x[:m].contiguous(), path), alone[:m])


@pytest.mark.parametrize("text", ["affine4.g128.sym", "affine8.g32.sym", "affine4.g32.asym"])
def test_more_rows_than_a_cache_holds(text: str) -> None:
    """1 MB of activations goes through a product at once: the last part ends inside a tile."""
    product = dispatch.prepare(random_qtensor(text, (40, 4096)), torch.bfloat16)
    x = torch.randn(603, 4096).bfloat16()
    assert torch.equal(product(x), torch.cat([product(piece) for piece in x.split(201)]))


def test_more_rows_than_pass_a_panel_at_once() -> None:
    """Two parts of the rows (cpp/pairs512.h), the last of which ends inside a tile."""
    q = random_qtensor("codebook4.nf4.g64.f32", (40, 608))
    x = torch.randn(603, 608).bfloat16()
    weight = q.dequantize()
    close(dispatch.prepare(q, torch.bfloat16)(x), x.float() @ weight.T, 4e-3, terms(x.float(), weight))


def test_exact_never_rounds_activations() -> None:
    q = random_qtensor("affine4.g128.asym", (64, 256))
    x = torch.randn(3, 256)
    product = dispatch.prepare(q, torch.bfloat16, exact=True)
    assert product.name == "reference"
    close(product(x), x @ q.dequantize().T, 1e-6)


def test_threads_share_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    q = random_qtensor("affine4.g128.sym", (700, 256))
    product = native.pack(q)
    x = torch.randn(9, 256)
    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        results += [product(x) for _ in range(20)]
    monkeypatch.undo()
    assert torch.get_num_threads() == before
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("form", fused.FORMS)
def test_norm(form: str) -> None:
    x = (torch.randn(3, 5, 72) * 3).bfloat16()
    weight = torch.randn(72).bfloat16()
    wanted = fused.norm_twin(x, weight, 1e-5, form)
    close(fused.rms_norm(x, weight, 1e-5, form), wanted, 1e-3)
    strided = torch.randn(4, 6, 144).bfloat16()[:, ::2, 36:108]
    close(fused.rms_norm(strided, weight, 1e-5, form), fused.norm_twin(strided, weight, 1e-5, form), 1e-3)


@pytest.mark.parametrize("act", fused.ACTS)
def test_gated(act: str) -> None:
    both = (torch.randn(5, 2, 90) * 4).bfloat16()
    gate, up = both[:, 0, 1:], both[:, 1, 1:]
    close(fused.gated(gate, up, act), fused.gated_twin(gate, up, act), 1e-3)
    far = torch.tensor([[-3e38, -100.0, 100.0, 3e38]]).bfloat16()
    wanted = fused.gated_twin(far, torch.ones_like(far), "silu")
    assert torch.equal(fused.gated(far, torch.ones_like(far), "silu"), wanted)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(interleaved: bool) -> None:
    q, k = torch.randn(5, 4, 48).bfloat16(), torch.randn(5, 2, 96).bfloat16()[:, :, ::1][:, :, :48]
    angle = torch.randn(5, 16)
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    for found, wanted in zip(
        fused.rope(q, k, cos, sin, interleaved), fused.rope_twin(q, k, cos, sin, interleaved), strict=True
    ):
        close(found, wanted, 1e-3)
        assert torch.equal(found[..., 32:], wanted[..., 32:])


def test_other_dtypes_take_the_twins() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(8)
    assert torch.equal(fused.rms_norm(x, weight, 1e-5, "float"), fused.norm_twin(x, weight, 1e-5, "float"))
    assert torch.equal(fused.gated(x, x, "silu"), fused.gated_twin(x, x, "silu"))


def paged(
    lengths: list[int], block_size: int, kv_heads: int, dims: tuple[int, int], kv: str
) -> tuple[Tensor, list[Parts], list[Parts]]:
    """Block table, and keys and values in blocks of any order: as the codec stores them, and the numbers it gives in
    float32. Slots out of use hold NaN."""
    blocks = [-(-n // block_size) for n in lengths]
    order = torch.randperm(sum(blocks) + 3)
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    slots = []
    for row, (length, own) in enumerate(zip(lengths, order[: sum(blocks)].split(blocks), strict=True)):
        table[row, : len(own)] = own
        slots.append((own[:, None] * block_size + torch.arange(block_size)).flatten()[:length])
    used, codec = torch.cat(slots), load_codec(kv, torch.bfloat16)
    stored, numbers = [], []
    for dim in dims:
        x = torch.full((len(order) * block_size, kv_heads, dim), float("nan"), dtype=torch.bfloat16)
        x[used] = torch.randn(len(used), kv_heads, dim).bfloat16()
        stored.append(codec.encode(x))
        numbers.append((codec.decode(stored[-1]).float(),))
    return table, stored, numbers


@pytest.mark.parametrize("kv", ["none", "int8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "softcap", "sinks"),
    [(4, 4, 32, None, None, False), (8, 2, 64, None, None, False), (24, 2, 80, 7, None, False), (6, 1, 48, None, 20.0, False),
     (4, 2, 64, 5, 3.0, True), (8, 1, 128, 300, 30.0, True), (34, 34, 128, None, None, True), (16, 1, 256, None, None, False),
     (4, 1, 512, None, None, True)],
)  # fmt: skip
def test_decode_attention(
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    kv: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the same function in float32, whose path is the torch twin: a token, parts of a step (cpp/attend.h), and
    sequences in several parts."""
    lengths, block_size, value_dim = [1, 5, 37, 16, 129, 2600], 4, {64: 80, 128: 128, 256: 80, 512: 512}.get(dim, 40)
    table, stored, numbers = paged(lengths, block_size, kv_heads, (dim, value_dim), kv)
    q = torch.randn(len(lengths), heads, dim).bfloat16()
    extra = torch.randn(heads) if sinks else None

    def run(q: Tensor, cache: list[Parts]) -> Tensor:
        return paged_attention(
            q, *cache, cu_q=torch.arange(len(lengths) + 1, dtype=torch.int32),
            context_len=torch.tensor(lengths, dtype=torch.int32), block_table=table, num_decode=len(lengths),
            block_size=block_size, decode=lambda parts: parts[0], scale=dim**-0.5, window=window, softcap=softcap,
            sinks=extra,
        )  # fmt: skip

    wanted = run(q.float(), numbers)
    assert native_attention(q, *stored)
    close(run(q, stored), wanted, 4e-3)
    monkeypatch.setattr(native_layer, "attend", partial(native_layer.attend, plain=True))
    close(run(q, stored), wanted, 4e-3)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("kv", "window"), [("none", None), ("int8", 300)])
def test_a_sequence_is_attended_to_alike_in_any_batch(kv: str, window: int | None, plain: bool) -> None:
    """Also where there are more parts than are worked on at once (HELD of cpp/attend.h)."""
    lengths = [700, 3, 40, 1000] * 24
    table, stored, _ = paged(lengths, 16, 2, (64, 64), kv)
    q, context = torch.randn(len(lengths), 8, 64).bfloat16(), torch.tensor(lengths, dtype=torch.int32)
    more = (16, 0.1, window, None, torch.randn(8), plain)
    together = native_layer.attend(q, *stored, table, context, *more)
    for row in range(len(lengths)):
        one = slice(row, row + 1)
        assert torch.equal(native_layer.attend(q[one], *stored, table[one], context[one], *more), together[one])


def test_what_the_library_reads() -> None:
    plain, codes, scales = (
        torch.zeros(4, 1, 544).bfloat16(),
        torch.zeros(4, 1, 64).char(),
        torch.zeros(4, 1, 1).bfloat16(),
    )
    assert native_layer.reads((plain[:, :, :512].contiguous(),), 512) and native_layer.reads((codes, scales), 64)
    assert not native_layer.reads((plain,), 544)
    assert not native_layer.reads((codes, scales.float()), 64)
    assert not native_layer.reads((codes, plain), 64)
    assert not native_layer.reads((codes,), 64)


@pytest.mark.parametrize("plain", [False, True])
def test_not_a_number_stays_one(plain: bool) -> None:
    table, (k, v), _ = paged([70], 16, 1, (64, 64), "none")
    q = torch.randn(1, 4, 64).bfloat16()
    q[0, 1, 3] = torch.nan
    out = native_layer.attend(q, k, v, table, torch.tensor([70], dtype=torch.int32), 16, 0.1, None, None, None, plain)
    assert out[0, 1].isnan().all() and out[0, [0, 2, 3]].isfinite().all()


@pytest.mark.skipif(native.best_path() != "avx512", reason="chunks have AVX-512 kernels only")
@pytest.mark.parametrize("kv", ["none", "int8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "window", "softcap", "sinks"),
    [(4, 4, 64, 64, None, None, False), (8, 1, 128, 128, None, None, True), (6, 3, 80, 96, 50, None, True),
     (4, 2, 96, 16, 9, 30.0, False), (4, 2, 256, 256, 128, 5.0, True), (2, 1, 512, 512, None, None, False)],
)  # fmt: skip
def test_prefill_attention(
    heads: int, kv_heads: int, dim: int, value_dim: int, window: int | None, softcap: float | None, sinks: bool, kv: str
) -> None:
    """Decode rows and chunks (one token, the end of a longer text, whole prompts) against the torch twin in float32."""
    lengths, counts, block_size = [9, 1, 200, 65, 130], [1, 1, 70, 65, 130], 4
    table, stored, numbers = paged(lengths, block_size, kv_heads, (dim, value_dim), kv)
    # Heads of a projection that holds more than queries.
    q = torch.randn(sum(counts), heads + 2, dim).bfloat16()[:, :heads]
    extra = torch.randn(heads) if sinks else None

    def run(q: Tensor, cache: list[Parts]) -> Tensor:
        return paged_attention(
            q, *cache, cu_q=torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32),
            context_len=torch.tensor(lengths, dtype=torch.int32), block_table=table, num_decode=1,
            block_size=block_size, decode=lambda parts: parts[0], scale=dim**-0.5, window=window, softcap=softcap,
            sinks=extra,
        )  # fmt: skip

    close(run(q, stored), run(q.float(), numbers), 4e-3)


def test_absent_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the torch paths serve, and give the same within rounding."""
    q = random_qtensor("affine4.g128.sym", (64, 256))
    x = torch.randn(3, 256).bfloat16()
    fast = dispatch.prepare(q, torch.bfloat16)(x)
    monkeypatch.setattr(native, "library", lambda: None)
    product = dispatch.prepare(q, torch.bfloat16)
    assert product.name in ("int4pack", "lookup")
    close(product(x), fast, 2e-2)


@pytest.mark.parametrize("text", SPECS)
def test_resident_bytes(text: str) -> None:
    """One copy of a weight in memory, as large as in its file: the CPU's and the GPU's layout alike."""
    q = random_qtensor(text, (256, 1024))
    assert dispatch.prepare(q, torch.bfloat16).nbytes <= 1.03 * q.nbytes
    packed = repack.pack(q)
    assert sum(t.nbytes for t in packed.parts if t is not None) <= 1.03 * q.nbytes
