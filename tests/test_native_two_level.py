"""The native library's products of two-level scales, of grids, and of one level with mins, against their torch twins."""

import itertools

import pytest
import torch
from bitsmith.kernels import dispatch, native, native_grids, native_two_level
from bitsmith.kernels.qtensor import QTensor
from bitsmith.kernels.spec import Spec
from bitsmith.quant_formats import gguf_blocks
from torch import Tensor

from . import gguf_bytes

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(
        native.best_path() in ("", "generic"),
        reason="no native library for this processor, or built without a C++ compiler",
    ),
]

NAMES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
GRIDS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
ONE_LEVEL = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SHAPES = ((48, 512), (33, 256), (1, 1024))
ROWS = (1, 2, 3, 4, 5, 7, 17)


def random_qtensor(name: str, shape: tuple[int, int]) -> QTensor:
    return gguf_blocks.unpack(name, gguf_bytes.random_rows(name, *shape, calm=True), shape)


def pack(q: QTensor) -> native_two_level.TwoLevelLinear | native_grids.GridLinear:
    """The one product that takes `q`."""
    assert native_two_level.supports(q) != native_grids.supports(q)
    return native_two_level.pack(q) if native_two_level.supports(q) else native_grids.pack(q)


def native_paths() -> list[str]:
    """The best of this machine, the loops that define the result, and what lesser machines would take."""
    return ["", "generic", *(["avx2"] if native.best_path() in ("avx512", "amx") else [])]


def error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """Relative to the size of a sum of products with independent errors; x and weight as they meet."""
    assert bool(y.isfinite().all())
    terms = (x.double().square() @ weight.double().square().T).sqrt()
    return float((y.double() - x.double() @ weight.double().T).norm() / terms.norm())


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ2_XS"])
def test_more_rows_than_a_cache_holds(name: str) -> None:
    """Half a MB of activations goes through a product at once: the last part ends inside a tile."""
    product = pack(random_qtensor(name, (40, 4096)))
    x = torch.randn(603, 4096)
    assert torch.equal(product(x), torch.cat([product(piece) for piece in x.split(201)]))


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize(("name", "shape"), list(itertools.product(NAMES + GRIDS, SHAPES)))
def test_products(name: str, shape: tuple[int, int], path: str) -> None:
    """Integer dot products are exact: only float32 sums differ from dequantize()."""
    q = random_qtensor(name, shape)
    product, weight = pack(q), q.dequantize()
    for m in ROWS:
        x = torch.randn(m, shape[1])
        x[0, 0] = 30.0
        assert error(product(x, path), native_two_level.rounded_activations(x, q.spec), weight) < 1e-6


@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("name", NAMES + GRIDS)
def test_extreme_codes_do_not_saturate(name: str, byte: int) -> None:
    """All codes, scale codes and activations at their smallest or largest."""
    raw = torch.full((16, gguf_blocks.row_bytes(name, 512)), byte, dtype=torch.uint8)
    _, size, halves = gguf_bytes.LAYOUTS[name]
    for at in halves:
        raw.view(-1, size)[:, at : at + 2] = torch.tensor([0.5]).half().view(torch.uint8)
    if name == "IQ1_M":
        # Its float16 lies in the top four bits of four words: 0x3000 and what the byte leaves below.
        raw.view(-1, size)[:, 55] = raw.view(-1, size)[:, 55] & 0x0F | 0x30
    q = gguf_blocks.unpack(name, raw, (16, 512))
    x = torch.full((3, 512), 2.0)
    x[1] = -2.0
    product, weight = pack(q), q.dequantize().double()
    # Terms are all alike, and so are their roundings: an ulp of what they come to.
    ulp = 2.0**-23 * (x.double().abs() @ weight.abs().T)
    for path in native_paths():
        found = product(x, path).double()
        assert bool(((found - x.double() @ weight.T).abs() <= ulp).all())


@pytest.mark.parametrize(("name", "shape"), list(itertools.product(NAMES + GRIDS, SHAPES)))
def test_the_same_tensor_comes_back(name: str, shape: tuple[int, int]) -> None:
    q = random_qtensor(name, shape)
    product = dispatch.prepare(q, torch.bfloat16)
    assert product.name == "native-a8"
    back = product.qtensor()
    assert back.spec == q.spec and back.shape == q.shape and back.parts.keys() == q.parts.keys()
    assert all(torch.equal(back.parts[part], t) for part, t in q.parts.items())
    if shape == (48, 512):
        assert product.nbytes <= 1.03 * q.nbytes


@pytest.mark.parametrize("name", NAMES + GRIDS)
def test_16_bit_activations_and_results(name: str) -> None:
    q = random_qtensor(name, (40, 512))
    product = dispatch.prepare(q, torch.bfloat16)
    x = torch.randn(2, 3, 512)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        y = product(x.to(dtype))
        assert y.dtype == dtype and y.shape == (2, 3, 40)
        assert error(y.flatten(0, 1), x.to(dtype).float().flatten(0, 1), q.dequantize()) < 2e-2
    assert not product(torch.zeros(3, 512, dtype=torch.bfloat16)).any()


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("name", NAMES + GRIDS)
def test_a_row_does_not_depend_on_its_neighbours(name: str, path: str) -> None:
    product = pack(random_qtensor(name, (80, 256)))
    x = torch.randn(9, 256)
    alone = torch.cat([product(row[None], path) for row in x])
    for m in (2, 3, 4, 7, 9):
        assert torch.equal(product(x[:m].contiguous(), path), alone[:m])


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_S"])
def test_threads_share_one_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    product = pack(random_qtensor(name, (700, 256)))
    x = torch.randn(9, 256)
    results = []
    for count in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        results += [product(x) for _ in range(5)]
    assert all(torch.equal(y, results[0]) for y in results)


def test_what_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not native_two_level.supports(random_qtensor("Q4_0", (16, 256)))
    both = [random_qtensor(name, (16, 256)) for name in ("Q4_K", "IQ2_XS")]
    other = Spec.parse("codebook16.iq2xs.v8.g32.u4:f16:8")
    assert not native_grids.supports(QTensor(other, both[1].shape, both[1].parts))
    monkeypatch.setenv("BITSMITH_ACT", "bf16")
    for q in both:
        assert not native_two_level.supports(q) and not native_grids.supports(q)
        assert dispatch.prepare(q, torch.bfloat16).name != "native-a8"


@pytest.mark.parametrize("name", ONE_LEVEL)
def test_one_level_types_take_the_integer_product(name: str) -> None:
    """Groups of 32, mins as the zero points that have their effect; a group whose scale is 0 is its min."""
    q = random_qtensor(name, (33, 256))
    q.parts["scales"][3, 1] = 0
    q.parts["scales"][4, 2] = -0.0
    assert native.supports(q)
    product, weight = native.pack(q), q.dequantize()
    for path, m in itertools.product(("generic", ""), ROWS):
        x = torch.randn(m, 256)
        assert error(product(x, path), native.rounded_activations(x, 32), weight) < 2e-6, (path, m)
    back = product.qtensor()
    assert back.parts.keys() == q.parts.keys() and all(torch.equal(back.parts[part], t) for part, t in q.parts.items())
    assert dispatch.prepare(q, torch.bfloat16).name == "native-a8"
    whole = random_qtensor(name, (48, 512))
    assert native.pack(whole).nbytes <= 1.03 * whole.nbytes
