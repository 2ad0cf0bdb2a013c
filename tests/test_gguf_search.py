"""Our quantizers of every GGUF type beside llama.cpp's, whose results are kept in golden/gguf_search.json."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from bitsmith.calibrate import gptq, rtn
from bitsmith.calibrate.method import Settings
from bitsmith.calibrate.stats import Squares, Stats, output_error
from bitsmith.errors import UserError
from bitsmith.kernels.spec import Spec
from bitsmith.quant_formats import gguf_blocks

from .gguf_weights import error, importance, weights

THEIRS = json.loads((Path(__file__).parent / "golden" / "gguf_search.json").read_text())
# Rules without a search: the same bytes. NVFP4 differs in which of two equal errors it takes.
EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
K_QUANTS = [str(gguf_blocks.spec(kind)) for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")]


@pytest.mark.parametrize("case", THEIRS)
def test_errs_no_more_than_llama_cpp(case: str) -> None:
    kind, shape, how = case.split()
    w = weights(shape)
    weight = importance() if how == "imatrix" else None
    spec = gguf_blocks.spec(kind)
    assert spec is not None
    known = None if weight is None else Squares(w.shape[1], 1, weight.double())
    q = rtn.quantize(w, spec, known, Settings())
    raw = gguf_blocks.pack(kind, q)
    # What is written is what was measured.
    assert torch.equal(gguf_blocks.unpack(kind, raw, (w.shape[0], w.shape[1])).dequantize(), q.dequantize())
    if kind in EXACT and weight is None:
        assert hashlib.sha256(raw.numpy().tobytes()).hexdigest() == THEIRS[case]["sha256"]
    assert error(w, q.dequantize(), weight) <= 1.005 * THEIRS[case]["error"]


@pytest.mark.parametrize("kind", [kind for kind in gguf_blocks.BLOCKS if kind not in ("Q1_0", "Q2_0")])
def test_zeros_and_lone_outliers(kind: str) -> None:
    """Groups of zeros stay zeros (types that have no zero: next to nothing), and one large number is kept roughly."""
    spec = gguf_blocks.spec(kind)
    assert spec is not None
    w = torch.zeros(2, 512)
    w[1, 300] = 3.0
    found = rtn.quantize(w, spec, None, Settings()).dequantize()
    assert found.isfinite().all() and float(found[0].abs().max()) < 1e-6
    if not kind.startswith("IQ"):
        assert float(found[1, 300]) == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("spec", K_QUANTS)
def test_error_feedback_drives_two_level_types(spec: str) -> None:
    torch.manual_seed(0)
    w = torch.randn(32, 512) * 0.05
    mix = torch.randn(512, 512) * 0.3 + torch.eye(512)
    stats = Stats(512)
    stats.add(torch.randn(1024, 512) @ mix)
    plain, fed = (m.quantize(w, Spec.parse(spec), stats, Settings()) for m in (rtn, gptq))
    errors = [output_error(q.dequantize() - w, stats.hessian) for q in (fed, plain)]
    assert errors[0] < 0.8 * errors[1], errors


def test_vectors_are_not_fed_back() -> None:
    stats = Stats(256)
    stats.add(torch.randn(512, 256))
    with pytest.raises(UserError, match=r"iq2xxs.*8 weights at a time.*--method rtn"):
        gptq.quantize(torch.randn(8, 256), Spec.parse("codebook15.iq2xxs.v8.g32.u4:f16:8"), stats, Settings())


@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_XS", "IQ2_XXS", "Q4_0"])
def test_what_is_not_finite_is_refused(kind: str) -> None:
    spec = gguf_blocks.spec(kind)
    assert spec is not None
    w = torch.randn(4, 256)
    w[2, 7] = torch.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        rtn.quantize(w, spec, Squares(256, 1, torch.ones(256).double()), Settings())
    with pytest.raises(UserError, match="importance"):
        rtn.quantize(torch.randn(4, 256), spec, Squares(256, 1, -torch.ones(256).double()), Settings())
