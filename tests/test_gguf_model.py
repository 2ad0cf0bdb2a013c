"""GGUF files as checkpoints, both ways: what is written is read back the same, and llama.cpp computes the same with it."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.models.checkpoint import open_checkpoint
from bitsmith.models.gguf_config import read_config
from bitsmith.models.gguf_file import read_gguf
from bitsmith.models.inspect import inspect_checkpoint
from bitsmith.models.linear import QuantLinear
from bitsmith.models.load import load_model, load_tokenizer
from bitsmith.samplers.params import SamplingParams
from bitsmith.serve.llm import LLM

from . import gguf_tiny as tiny
from .gguf_models import llama_quantize

IDS = [(7 * i + 3) % 250 for i in range(100)]
# llama.cpp computes GELU from a table of float16.
GELU = ("gemma", "gemma2", "gemma3", "starcoder2")
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: pip install it to compare"
)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([IDS])).logits[0]
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved("llama")` is a directory with that model, and none of it twice."""
    made: dict[str, Path] = {}

    def save(name: str, **more: Any) -> Path:
        key = f"{name}{sorted(more.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name) / "source"
            tiny.model(name, **more).save_pretrained(made[key])
        return made[key]

    return save


@pytest.mark.parametrize("name", tiny.CASES)
def test_every_architecture_there_and_back(name: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    expected = tiny.model(name)
    path = tiny.write(saved(name), tmp_path / "model.gguf")
    found = load_model(path, attn_implementation="eager")
    for (key, a), (other, b) in zip(expected.state_dict().items(), found.state_dict().items(), strict=True):
        # Norms of Gemma are stored plus one, which rounds.
        assert key == other and torch.allclose(a, b, rtol=0, atol=1e-6 if name.startswith("gemma") else 0), key
    assert relative(logits(found), logits(expected)) < 1e-5


@needs_llama_cpp
@pytest.mark.parametrize("name", [name for name in tiny.CASES if name != "gpt-oss"])
def test_llama_cpp_computes_the_same(name: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny.write(saved(name), tmp_path / "model.gguf")
    difference = relative(tiny.llama_cpp_logits(path, IDS), logits(tiny.model(name)))
    assert difference < (1e-3 if name in GELU else 1e-5)


@needs_llama_cpp
def test_llama_cpp_computes_the_same_gpt_oss(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Without YaRN, whose corrected dimensions llama.cpp rounds and gpt-oss does not."""
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    path = tiny.write(saved("gpt-oss", **plain), tmp_path / "model.gguf")
    assert relative(tiny.llama_cpp_logits(path, IDS), logits(tiny.model("gpt-oss", **plain))) < 1e-5


def test_more_configs_there_and_back(saved: Callable[..., Path], tmp_path: Path) -> None:
    cases = [
        ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("phi3", {"sliding_window": 8}),
        ("qwen3", {"attention_bias": True}),
        ("gemma3", {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }}),
    ]  # fmt: skip
    for number, (name, more) in enumerate(cases):
        path = tiny.write(saved(name, **more), tmp_path / f"{number}.gguf")
        found = load_model(path, attn_implementation="eager")
        assert relative(logits(found), logits(tiny.model(name, **more))) < 1e-5, (name, more)


def test_what_gguf_cannot_say_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    cases = [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'.*read as 'silu'"),
        ("gemma2", {"query_pre_attn_scalar": 20}, "query_pre_attn_scalar is 20.*read as 32"),
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("qwen3-moe", {"mlp_only_layers": [0]}, "has no name for it"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
        ("gpt-oss", {"rope_parameters": {**tiny._YARN, "truncate": True}}, "truncate is True"),
    ]  # fmt: skip
    for name, more, message in cases:
        with pytest.raises(UserError, match=message):
            tiny.write(saved(name, **more), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "MXFP4"])
def test_types_stay_packed(kind: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    """Against the model with every matrix replaced by what the gguf package decodes."""
    path = tiny.write(saved("llama"), tmp_path / "model.gguf", kind)
    found = load_model(path, attn_implementation="eager", exact=True)
    packed = kind not in ("F16", "BF16")
    assert isinstance(found.model.layers[0].self_attn.q_proj, QuantLinear) is packed
    expected = tiny.model("llama")
    for parameter in expected.parameters():
        if parameter.dim() == 2:
            rows = parameter.detach().numpy()
            type_id = gguf.GGMLQuantizationType[kind]
            raw = gguf.quants.quantize(rows, type_id)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(raw, type_id).reshape(rows.shape).copy())
    assert relative(logits(found), logits(expected)) < 1e-5
    report = inspect_checkpoint(path)
    assert report["format"] == ("gguf" if packed else "unquantized")
    if packed:
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        assert report["bpw"] == pytest.approx(8 * size[1] / size[0], abs=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "qwen2-moe", "gemma2", "phi3", "llama-biases"])
def test_packed_experts_norms_and_tied_heads(name: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny.write(saved(name), tmp_path / "model.gguf", "Q8_0")
    found = load_model(path, attn_implementation="eager", exact=True)
    # 8 bits with a scale for 32 are half a percent off; a wrong row order or expert is all of it.
    assert relative(logits(found), logits(tiny.model(name))) < 0.1
    assert any(isinstance(m, QuantLinear) for m in found.modules())
    served = load_model(path, dtype="bfloat16")
    # Routing in bfloat16 sends some tokens to other experts.
    assert relative(logits(served).float(), logits(found)) < 0.25


@needs_llama_cpp
@pytest.mark.parametrize("file_type", [15, 7, 12, 30])
def test_files_of_llama_cpps_quantizer(file_type: int, saved: Callable[..., Path], tmp_path: Path) -> None:
    """Q4_K_M, Q8_0, Q3_K_M, IQ4_XS: weights as the gguf package decodes them, logits within llama.cpp's 8-bit sums."""
    more = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    plain = tiny.write(saved("llama", **more), tmp_path / "plain.gguf")
    path = tmp_path / "model.gguf"
    assert llama_quantize([{"src": str(plain), "ftype": file_type, "dst": str(path)}])[0]
    found = load_model(path, attn_implementation="eager", exact=True)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    names = {"mlp.down_proj": "ffn_down", "self_attn.v_proj": "attn_v", "mlp.gate_proj": "ffn_gate"}
    for module, name in names.items():
        tensor = tensors[f"blk.1.{name}.weight"]
        decoded = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(found.get_submodule(f"model.layers.1.{module}").weight, decoded), name
    # 6 to 9 % with these random weights; a wrong row order is all of it.
    assert relative(tiny.llama_cpp_logits(path, IDS), logits(found)) < 0.15


def test_parts_of_a_split_model(saved: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny.write(saved("llama"), tmp_path / "whole.gguf")
    split = _split(path, tmp_path / "parts")
    assert len(split) == 3
    assert torch.equal(logits(load_model(split[0])), logits(load_model(path)))
    assert torch.equal(logits(load_model(tmp_path / "parts")), logits(load_model(path)))
    with pytest.raises(UserError, match=r"is part 2 of 3\. Fix: give the first part"):
        load_model(split[1])
    split[2].unlink()
    with pytest.raises(UserError, match=r"1 of 3 parts are missing, the first m-00003-of-00003\.gguf"):
        load_model(split[0])
    shutil.copy(split[0], tmp_path / "alone.gguf")
    with pytest.raises(UserError, match="is not named"):
        load_model(tmp_path / "alone.gguf")


def _split(path: Path, directory: Path) -> list[Path]:
    """By the gguf package's own writer."""
    directory.mkdir()
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(directory / "m.gguf", "llama", split_max_tensors=8)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(
                key, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(directory.iterdir())


def test_messages_about_files(saved: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny.write(saved("llama"), tmp_path / "model.gguf")
    raw = path.read_bytes()
    bad = tmp_path / "bad.gguf"
    for content, message in [
        (raw[:4] + b"\x00\x00\x00\x03" + raw[8:], "is big-endian GGUF; accepted: little-endian.*Fix"),
        (raw[:4] + b"\x01\x00\x00\x00" + raw[8:], "is GGUF version 1; accepted: 2, 3"),
        (b"GGML" + raw[4:], "begins with b'GGML'"),
        (raw[:-4000], "truncated or damaged"),
        (raw[:100], "truncated|more than"),
        (b"", "cannot be read"),
    ]:
        bad.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_model(bad)
    with pytest.raises(UserError, match="holds no tokenizer that bitsmith reads"):
        load_tokenizer(path)
    assert read_config(read_gguf(path))[0]["num_hidden_layers"] == 2


def test_a_missing_tensor_and_an_unknown_one_are_named(saved: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny.write(saved("llama"), tmp_path / "model.gguf")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"blk.1.attn_v.weight", b"blk.1.attn_w.weight"))
    with pytest.raises(UserError, match=r"no place in a llama model, the first being blk\.1\.attn_w\.weight"):
        load_model(path)
    path.write_bytes(raw.replace(b"output_norm.weight", b"rope_freqs7.weight"))
    with pytest.raises(UserError, match="rope_freqs7"):
        load_model(path)


def test_generating_from_a_file(tmp_path: Path, shared: Callable[[str], Path]) -> None:
    """Packed weights in the engine, and the tokenizer of the file."""
    source = shared("models/stories260k")
    path = tiny.write(source, tmp_path / "stories.gguf", "F16", load_tokenizer(source))
    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    said = [LLM(model, device="cpu").generate("Once upon a time", greedy) for model in (source, path)]
    assert said[0][0].text == said[1][0].text and len(said[0][0].text) > 20
    assert open_checkpoint(path).generation_config().eos_token_id == [2]  # type: ignore[union-attr]
