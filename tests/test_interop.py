"""The libraries that define the formats load what we write and compute our logits.

Their python is named by BITSMITH_INTEROP_PYTHON (`make test-interop` builds it). Two comparisons for every format:
each module's weight, read off in the peer by feeding it the identity, equals ours rounded to the peer's dtype; and the
logits differ by no more than that dtype's arithmetic, measured on the unquantized model in the same run.
"""

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsmith.calibrate.driver import quantize
from bitsmith.models.checkpoint import Checkpoint
from bitsmith.models.linear import QuantLinear
from bitsmith.models.load import load_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

pytestmark = pytest.mark.interop

ROOT = Path(__file__).resolve().parents[1]
MODEL, CALIB = ROOT / "examples/storyworld/model", ROOT / "examples/storyworld/calib.txt"
PEER = os.environ.get("BITSMITH_INTEROP_PYTHON", "")
IDS = (torch.arange(96).view(2, 48) * 37 + 11) % 512


@dataclass(frozen=True)
class Case:
    # Arguments of `quantize`.
    ours: Mapping[str, Any]
    # Job of tests/interop/peers.py and its further fields.
    peer: Mapping[str, Any]
    # dtype in which the peer computes.
    dtype: torch.dtype
    # Rewrites the checkpoint after it is written.
    rewrite: Callable[[Path], None] | None = None


RULES = (
    "rules:\n  - {match: '*.down_proj', bits: 8, group_size: 64}\n  - {match: '*.layers.0.self_attn.*', skip: true}\n"
)


def gptq(**options: Any) -> Mapping[str, Any]:
    return {"format": "gptq", "method": "gptq", **options}


def as_v2(path: Path) -> None:
    """Rewrite a GPTQ checkpoint with zero points as they are; bitsmith itself does so for asymmetric ones."""
    checkpoint = Checkpoint(path)
    assert checkpoint.format is not None and checkpoint.recipe is not None
    recipe = replace(checkpoint.recipe, options={**checkpoint.recipe.options, "checkpoint_format": "gptq_v2"})
    tensors = {name: checkpoint(name).clone() for name in checkpoint}
    for name, module in load_model(path, exact=True).named_modules():
        if isinstance(module, QuantLinear):
            saved = checkpoint.format.save(module.qtensor(), recipe)
            tensors |= {f"{name}.{suffix}": t.contiguous() for suffix, t in saved.items()}
    config = {**checkpoint.config, "quantization_config": checkpoint.format.config(recipe)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    (path / "quantize_config.json").write_text(json.dumps(config["quantization_config"]))


GPTQMODEL = {"do": "load_gptqmodel", "format": "gptq"}
BNB = {"do": "load_transformers", "dtype": "float32"}
F16, F32 = torch.float16, torch.float32
CASES = {
    "gptq-w4g128": Case(gptq(bits=4), GPTQMODEL, F16),
    "gptq-w4g128-asym": Case(gptq(bits=4, sym=False), GPTQMODEL, F16),
    "gptq-w4g32-actorder": Case(gptq(bits=4, group_size=32, desc_act=True), GPTQMODEL, F16),
    "gptq-w4g128-v2": Case(gptq(bits=4), GPTQMODEL, F16, rewrite=as_v2),
    "gptq-w4g-1": Case(gptq(bits=4, group_size=-1), GPTQMODEL, F16),
    "gptq-w3g128": Case(gptq(bits=3), GPTQMODEL, F16),
    "gptq-w3g64-asym": Case(gptq(bits=3, group_size=64, sym=False), GPTQMODEL, F16),
    "gptq-w2g32-asym": Case(gptq(bits=2, group_size=32, sym=False), GPTQMODEL, F16),
    "gptq-w8g128": Case(gptq(bits=8), GPTQMODEL, F16),
    "gptq-mixed": Case(gptq(bits=4, recipe="RULES"), GPTQMODEL, F16),
    "gptq-head8": Case(gptq(bits=4, head_bits=8), GPTQMODEL, F16),
    "gptq-rtn": Case({"format": "rtn", "bits": 4}, GPTQMODEL, F16),
    "gptq-transformers": Case(gptq(bits=4), {"do": "load_transformers", "dtype": "float16"}, F16),
    "awq-w4g128": Case({"format": "awq"}, {**GPTQMODEL, "format": "awq"}, F16),
    "awq-w4g32": Case({"format": "awq", "group_size": 32}, {**GPTQMODEL, "format": "awq"}, F16),
    "awq-transformers": Case({"format": "awq"}, {"do": "load_transformers", "dtype": "float16"}, F16),
    "hqq-w4g64": Case({"format": "hqq-native"}, {"do": "load_hqq"}, F32),
    "hqq-w3g64": Case({"format": "hqq-native", "bits": 3}, {"do": "load_hqq"}, F32),
    "hqq-w2g16": Case({"format": "hqq-native", "bits": 2, "group_size": 16}, {"do": "load_hqq"}, F32),
    "hqq-w1g16": Case({"format": "hqq-native", "bits": 1, "group_size": 16}, {"do": "load_hqq"}, F32),
    "hqq-w8g128": Case({"format": "hqq-native", "bits": 8, "group_size": 128}, {"do": "load_hqq"}, F32),
    "hqq-hf-w4g64": Case({"format": "hqq"}, {"do": "load_hqq_hf"}, F32),
    "hqq-hf-w3g64": Case({"format": "hqq", "bits": 3}, {"do": "load_hqq_hf"}, F32),
    "nf4": Case({"format": "nf4"}, BNB, F32),
    "nf4-dq": Case({"format": "nf4-dq"}, BNB, F32),
    "bnb-fp4": Case({"format": "bnb-fp4"}, BNB, F32),
    "fp8": Case({"format": "fp8"}, {"do": "load_transformers", "dtype": "float16"}, F16),
    "fp8-block": Case({"format": "fp8-block"}, {"do": "load_transformers", "dtype": "float16"}, F16),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`written(case)` is that checkpoint as bitsmith writes it."""
    folder = tmp_path_factory.mktemp("interop")
    (folder / "rules.yaml").write_text(RULES)

    @cache
    def write(name: str) -> Path:
        case, out = CASES[name], folder / name
        options = {"calib": str(CALIB), "calib_samples": 8, "calib_seqlen": 128, "progress": False, **case.ours}
        if "recipe" in options:
            options["recipe"] = str(folder / "rules.yaml")
        quantize(MODEL, out, **options)
        if case.rewrite:
            case.rewrite(out)
        return out

    return write


@pytest.fixture(scope="module")
def peer_says(written: Callable[[str], Path]) -> Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]:
    """`peer_says(case)`: tensors and facts from the peer; all cases of one job run in one process, at the first call."""
    if not PEER:
        pytest.skip("BITSMITH_INTEROP_PYTHON is not set: `make test-interop` builds the peers' environment and sets it")

    @cache
    def run(kind: str) -> subprocess.CompletedProcess[str]:
        jobs = []
        for name, case in CASES.items():
            if case.peer["do"] == kind:
                path = written(name)
                save_file({"ids": IDS}, path / "ids", metadata={"modules": json.dumps(quantized(path))})
                jobs.append({**case.peer, "path": str(path), "ids": str(path / "ids"), "out": str(path / "peer")})
        list_of_jobs = written(name).parent / f"{kind}.json"
        list_of_jobs.write_text(json.dumps(jobs))
        command = [PEER, str(ROOT / "tests/interop/peers.py"), str(list_of_jobs)]
        # gptqmodel does not start on two cores without being told that two workers are enough.
        environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=list_of_jobs.parent, check=False
        )

    def says(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        done, out = run(CASES[name].peer["do"]), written(name) / "peer"
        assert out.exists(), done.stderr[-3000:]
        with safe_open(out, "pt") as file:
            return load_file(out), file.metadata()

    return says


def quantized(path: Path) -> list[str]:
    """Three quantized modules: one of each shape, the head where it is one of them."""
    names = sorted(Checkpoint(path).quantized_modules)
    return [next(n for n in names if n.endswith(leaf)) for leaf in ("k_proj", "gate_proj", "down_proj")] + [
        n for n in names if n == "lm_head"
    ]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@cache
def rounding(dtype: torch.dtype) -> float:
    """Relative error of the unquantized model's logits computed in `dtype`."""
    with torch.no_grad():
        exact, rounded = (load_model(MODEL, dtype=d)(IDS).logits.float() for d in (torch.float32, dtype))
    return relative(rounded, exact)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_peer_computes_our_logits(
    name: str, written: Callable[[str], Path], peer_says: Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]
) -> None:
    case = CASES[name]
    found, facts = peer_says(name)
    model = load_model(written(name), exact=True)
    error, allowed = relative(found.pop("logits"), model(IDS).logits), 2 * rounding(case.dtype) + 1e-6
    print(f"{name}: {facts['classes']} in {facts['dtype']}: logits differ by {error:.1e}, allowed {allowed:.1e}")
    assert len(found) >= 3
    for module, theirs in found.items():
        ours = model.get_submodule(module).weight
        assert theirs.dtype == case.dtype
        assert torch.equal(theirs, ours.to(case.dtype)), f"{module}: {relative(theirs.float(), ours):.1e}"
    assert error < allowed
