"""`quantize --format gguf:TYPE`: a checkpoint goes in, a file comes out that is read back as the same model."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsmith.calibrate.driver import quantize
from bitsmith.calibrate.gguf_goal import GGUFOptions
from bitsmith.calibrate.gguf_size import Target
from bitsmith.calibrate.imatrix import write
from bitsmith.calibrate.importance import measure
from bitsmith.errors import UserError
from bitsmith.models.checkpoint import open_checkpoint
from bitsmith.models.gguf_file import read_gguf
from bitsmith.models.load import load_model, load_tokenizer
from bitsmith.quant_formats.gguf_mixture import Overrides
from torch import Tensor

from . import gguf_tiny

IDS = torch.arange(3, 35)
ROWS: dict[str, Any] = {"calib_samples": 8, "calib_seqlen": 32, "progress": False}
STORYWORLD = Path(__file__).resolve().parents[1] / "examples" / "storyworld" / "model"
# Wide enough for blocks of 256.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Callable[..., Path]:
    """`source("llama")` is a saved checkpoint of gguf_tiny's model; llama's have a tokenizer."""
    made: dict[str, Path] = {}

    def save(name: str, **more: Any) -> Path:
        key = f"{name}{sorted(more)}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name)
            # Room for what transformers adds to a tokenizer of some model types.
            gguf_tiny.model(name, vocab_size=320, **more).save_pretrained(made[key])
            if name == "llama":
                byte_tokenizer.save_pretrained(made[key])
        return made[key]

    return save


@pytest.fixture
def calib(tmp_path: Path) -> str:
    path = tmp_path / "calib.txt"
    path.write_text("".join(f"The {i}th cat sat on the mat, and {i * i} dogs looked at it. " for i in range(200)))
    return str(path)


def logits(path: Path, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        found: Tensor = load_model(path, exact=True)(ids[None]).logits[0].float()
    return found


def distance(path: Path, like: Path, ids: Tensor = IDS) -> float:
    """Mean KL divergence from the model at `like`."""
    p, q = logits(like, ids).log_softmax(-1), logits(path, ids).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def types(path: Path) -> dict[str, str]:
    return {name: info.type_name for name, info in read_gguf(path).tensors.items()}


@pytest.mark.parametrize(
    "name", ["llama", "llama-biases", "qwen2", "qwen3", "gemma2", "phi3", "mixtral", "qwen3-moe", "gpt-oss"]
)
def test_an_eight_bit_file_is_the_model(name: str, source: Callable[..., Path], tmp_path: Path) -> None:
    """Rotated rows, stacked experts, norms plus one, tied and untied outputs: all in place."""
    out = tmp_path / "m.gguf"
    summary = quantize(source(name), out, format="gguf:q8_0", progress=False)
    assert summary["bytes"] == out.stat().st_size and not (tmp_path / "m.gguf.partial").exists()
    assert "Q8_0" in types(out).values()
    a, b = logits(source(name)), logits(out)
    assert float((a - b).norm() / a.norm()) < 0.1


def test_numbers_only(source: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    quantize(source("llama"), out, format="gguf:f16", progress=False)
    assert set(types(out).values()) == {"F16", "F32"}
    torch.testing.assert_close(logits(out), logits(source("llama")), rtol=2e-2, atol=2e-2)


def test_the_mixture_decides(source: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    overrides = Overrides(output="Q8_0", tensors=(("ffn_up", "Q5_K"),))
    quantize(source("llama", **WIDE), out, format="gguf:q4_k_m", gguf=GGUFOptions(overrides=overrides), progress=False)
    found = types(out)
    assert found["output.weight"] == "Q8_0" and found["blk.1.ffn_up.weight"] == "Q5_K"
    assert found["blk.0.ffn_down.weight"] == found["blk.0.attn_q.weight"] == "Q4_K"
    assert found["blk.0.attn_norm.weight"] == "F32" and found["token_embd.weight"] == "Q4_K"


@pytest.mark.parametrize("kind", ["q4_k_m", "q2_k"])
def test_error_feedback_keeps_a_trained_model_closer(kind: str, tmp_path: Path) -> None:
    """The same types by GPTQ and by rounding with an importance matrix of the same text."""
    text = (STORYWORLD.parent / "heldout.txt").read_text()[:4000]
    ids = torch.tensor(load_tokenizer(STORYWORLD)(text)["input_ids"][:512])
    calib = str(STORYWORLD.parent / "calib.txt")
    results = {}
    for method in ("rtn", "gptq"):
        out = tmp_path / f"{method}.gguf"
        quantize(STORYWORLD, out, format=f"gguf:{kind}", method=method, calib=calib, **ROWS)
        results[method] = distance(out, STORYWORLD, ids), types(out)
    assert results["gptq"][1] == results["rtn"][1]
    assert results["gptq"][0] < results["rtn"][0]


def test_an_importance_matrix_is_heeded(source: Callable[..., Path], calib: str, tmp_path: Path) -> None:
    """Given as a file or made of the same text, it is the same matrix, and other bytes than without one."""
    model = source("llama", **WIDE)
    write(measure(model, calib=calib, **ROWS)[0], tmp_path / "m.dat")
    given, made, plain = (tmp_path / f"{name}.gguf" for name in ("given", "made", "plain"))
    quantize(model, given, format="gguf:q4_k_s", gguf=GGUFOptions(imatrix=str(tmp_path / "m.dat")), progress=False)
    quantize(model, made, format="gguf:q4_k_s", calib=calib, **ROWS)
    quantize(model, plain, format="gguf:q4_k_s", progress=False)
    a, b, c = logits(given), logits(made), logits(plain)
    assert float((a - b).norm() / a.norm()) < 1e-2 < float((a - c).norm() / a.norm())


@pytest.mark.parametrize("bpw", ["5", "7.5"])
def test_a_size_is_met(bpw: str, source: Callable[..., Path], calib: str, tmp_path: Path) -> None:
    out, wanted = tmp_path / "m.gguf", GGUFOptions(target=Target(bpw=bpw))
    quantize(source("llama", **WIDE), out, format="gguf", gguf=wanted, calib=calib, **ROWS)
    found = read_gguf(out).tensors.values()
    weights, size = sum(math.prod(info.shape) for info in found), sum(info.nbytes for info in found)
    largest = max(math.prod(info.shape) for info in found)
    assert float(bpw) * weights / 8 - largest / 4 < size <= float(bpw) * weights / 8
    assert len({info.type_name for info in found} - {"F32"}) > 1
    assert not list(tmp_path.glob("*.losses.json"))


@pytest.mark.parametrize(("bpw", "message"), [("0.6", "below the smallest file possible"), ("31", "above the largest")])
def test_a_size_that_cannot_be(bpw: str, message: str, source: Callable[..., Path], calib: str, tmp_path: Path) -> None:
    wanted = GGUFOptions(target=Target(bpw=bpw))
    with pytest.raises(UserError, match=message):
        quantize(source("llama"), tmp_path / "m.gguf", format="gguf", gguf=wanted, calib=calib, **ROWS)


def test_a_gguf_file_is_a_source(source: Callable[..., Path], tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    quantize(source("llama"), first, format="gguf:q8_0", progress=False)
    quantize(first, second, format="gguf:q5_0", progress=False)
    assert types(second)["blk.0.attn_q.weight"] == "Q5_0" and open_checkpoint(second).recipe is not None
    assert distance(second, source("llama")) < 0.5


def test_a_killed_run_resumes_to_the_same_bytes(source: Callable[..., Path], tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.gguf", tmp_path / "broken.gguf"
    options: dict[str, Any] = {"format": "gguf:q4_0", "progress": False}
    quantize(source("llama"), whole, **options)
    code = (
        "import os, signal, bitsmith.calibrate.store as s\n"
        "put = s.Store.put\n"
        "def once(self, *a): put(self, *a); os.kill(os.getpid(), signal.SIGKILL)\n"
        "s.Store.put = once\n"
        f"from bitsmith.calibrate.driver import quantize; quantize({str(source('llama'))!r}, {str(broken)!r}, **{options!r})"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    )
    part = tmp_path / "broken.gguf.partial" / "part-00000.safetensors"
    assert killed.returncode == -signal.SIGKILL and part.exists() and not broken.exists()
    quantize(source("llama"), broken, **options)
    assert broken.read_bytes() == whole.read_bytes() and not part.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gguf:q4_k_m", "bits": 4}, r"--bits is not possible with --format gguf:q4_k_m"),
        ({"format": "gguf:q4_k_m", "skip": ("lm_head",)}, r"--skip is not for --format gguf. Fix: --tensor-type"),
        ({"format": "gguf"}, r"expected a file type .* or gguf alone with --target-size"),
        ({"format": "gguf:q4_0", "gguf": GGUFOptions(target=Target(size="1M"))}, r"expected a file type"),
        ({"format": "gguf:q9_z"}, r"GGUF file type 'q9_z' is not known; accepted: .*q4_k_m"),
        (
            {"format": "gguf", "gguf": GGUFOptions(target=Target(bpw="5"))},
            r"a target size needs text .* Fix: --calib FILE",
        ),
        ({"format": "rtn", "gguf": GGUFOptions()}, r"are for --format gguf:TYPE"),
    ],
)
def test_what_cannot_be_is_said_first(
    options: dict[str, Any], message: str, source: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        quantize(source("llama"), tmp_path / "m.gguf", progress=False, **options)
    assert not list(tmp_path.glob("m.gguf*.partial")) and not (tmp_path / "m.gguf").exists()


def test_garbage_types_need_an_importance_matrix(source: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"garbage without an importance matrix.*--imatrix"):
        quantize(source("llama", **WIDE), tmp_path / "m.gguf", format="gguf:iq2_xs", progress=False)


def test_a_directory_is_no_file(source: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"writes one file. Fix: an OUT that ends in .gguf"):
        quantize(source("llama"), tmp_path / "m", format="gguf:q8_0", progress=False)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_killed_run_keeps_its_losses(
    source: Callable[..., Path], calib: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring is the long part of a size target: a run that stopped after it does not measure again."""
    out, wanted = tmp_path / "m.gguf", GGUFOptions(target=Target(bpw="7.5"))
    asked: dict[str, Any] = {"format": "gguf", "gguf": wanted, "calib": calib, **ROWS}
    with monkeypatch.context() as stopped:
        stopped.setattr("bitsmith.calibrate.gguf_goal.header", _stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(source("llama", **WIDE), out, **asked)
    monkeypatch.setattr("bitsmith.calibrate.gguf_size.curvatures", lambda *_, **__: pytest.fail("measured again"))
    quantize(source("llama", **WIDE), out, **asked)
    assert out.exists() and not list(tmp_path.glob("*.losses.json"))
