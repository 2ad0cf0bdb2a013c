"""The native library's products of 4-bit codes of a table with a float for each group (NVFP4, MXFP4, IQ4_NL) and int8
activations, against their torch twins."""

import itertools

import pytest
import torch
from bitsmith.kernels import bits, dispatch, native, native_float, native_two_level, rows
from bitsmith.kernels.qtensor import QTensor
from bitsmith.kernels.spec import Spec

from .test_native_float import error, random_qtensor

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(
        native.best_path() not in ("avx2", "avx512"), reason="these products need AVX2 or AVX-512 without AMX"
    ),
]

NVFP4, MXFP4 = FORMS = ("minifloat4.e2m1.g16.ue4m3", "minifloat4.e2m1.g32.e8m0")
# Inputs that fill chunks (128) and super blocks (256) and that do not.
SHAPES = ((48, 512), (33, 160), (16, 128), (1, 64), (40, 608), (17, 96))
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 17)
PATHS = ("", "generic", "avx2")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("text", "shape"), list(itertools.product(FORMS, SHAPES)))
def test_products(text: str, shape: tuple[int, int], path: str) -> None:
    """Integer dot products are exact: only float32 sums differ from dequantize()."""
    q = random_qtensor(text, shape)
    assert native_two_level.supports(q)
    product, weight = native_two_level.pack(q), q.dequantize()
    for m in ROWS:
        x = torch.randn(m, shape[1])
        x[0, 0] = 30.0
        assert error(product(x, path), native_two_level.rounded_activations(x, q.spec), weight) < 1e-6
    alone = torch.cat([product(row[None], path) for row in x])
    assert torch.equal(product(x, path), alone)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("text", FORMS)
def test_every_scale(text: str, path: str) -> None:
    """The NaN of both kinds of scale, the smallest and the largest numbers: 2^-127 and those of E4M3 are subnormal."""
    spec, every = Spec.parse(text), torch.arange(256, dtype=torch.uint8)
    codes = bits.pack(torch.full((256, spec.group * 2), 2), 4)
    q = QTensor(
        spec, (256, spec.group * 2), {"codes": codes, "scales": torch.stack([every, torch.zeros(256)], 1).byte()}
    )
    x = torch.zeros(1, spec.group * 2)
    x[0, 3] = 127.0
    wanted, found = q.dequantize()[:, 3] * 127.0, native_two_level.pack(q)(x, path)[0]
    # Sums are of doubled numbers: they are infinite one power of two earlier.
    kept = ~(wanted > 1.7e38)
    assert kept.sum() > 240 and torch.equal(found[kept].nan_to_num(-1), wanted[kept].nan_to_num(-1))


@pytest.mark.parametrize("shape", SHAPES)
def test_iq4_nl_without_avx512(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere native.py takes it. Its largest value is 127: all codes, and activations, at their smallest and largest
    do not saturate."""
    monkeypatch.setattr(native, "best_path", lambda: "avx2")
    q = random_qtensor("codebook4.iq4nl.g32", shape)
    assert native_two_level.supports(q)
    product, weight = native_two_level.pack(q), q.dequantize()
    back = product.qtensor()
    assert back.parts.keys() == q.parts.keys() and all(torch.equal(back.parts[part], t) for part, t in q.parts.items())
    for path, m in itertools.product(("generic", "avx2"), ROWS):
        x = torch.randn(m, shape[1])
        assert error(product(x, path), native_two_level.rounded_activations(x, q.spec), weight) < 1e-6
    for code in (0, 15):
        q.parts["codes"][:] = bits.pack(torch.full(shape, code), 4)
        product, weight = native_two_level.pack(q), q.dequantize()
        x = torch.tensor([[2.0], [-2.0]]).expand(2, shape[1]).contiguous()
        assert error(product(x, "avx2"), x, weight) < 1e-6


@pytest.mark.parametrize("text", FORMS)
def test_the_same_tensor_comes_back(text: str) -> None:
    q = random_qtensor(text, (48, 512))
    product = dispatch.prepare(q, torch.bfloat16)
    assert product.name == "native-a8" and product.nbytes <= 1.03 * q.nbytes
    back = product.qtensor()
    assert back.spec == q.spec and back.shape == q.shape and back.parts.keys() == q.parts.keys()
    assert all(torch.equal(back.parts[part], t) for part, t in q.parts.items())
    held, ids = rows.source(product), torch.tensor([47, 0, 17])
    assert held is not None and torch.equal(rows.look_up(held, ids, torch.float32), q.dequantize()[ids])


def test_what_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    q = random_qtensor(NVFP4, (16, 64))
    assert not native_two_level.supports(random_qtensor(NVFP4, (16, 72)))
    assert isinstance(dispatch.prepare(q, torch.bfloat16).core, native_two_level.TwoLevelLinear)  # type: ignore[attr-defined]
    # The tiles of native.py take whole blocks of 32 inputs with one scale.
    monkeypatch.setattr(native, "best_path", lambda: "amx")
    assert native_two_level.supports(q) and not native_two_level.supports(random_qtensor(MXFP4, (16, 64)))
    monkeypatch.undo()
    monkeypatch.setenv("BITSMITH_ACT", "bf16")
    assert not native_two_level.supports(q)
    assert isinstance(dispatch.prepare(q, torch.bfloat16).core, native_float.FloatLinear)  # type: ignore[attr-defined]
