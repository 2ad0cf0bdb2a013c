"""Loading: checkpoints of other libraries, awkward layouts, damaged files. Never random weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsmith.calibrate.driver import quantize
from bitsmith.calibrate.method import Settings
from bitsmith.calibrate.rtn import quantize as rtn
from bitsmith.errors import UserError
from bitsmith.kernels import probe
from bitsmith.kernels.dispatch import prepare
from bitsmith.kernels.spec import Spec
from bitsmith.models.inspect import inspect_checkpoint
from bitsmith.models.linear import DenseLinear, QuantLinear, _Member, fuse_siblings, prepare_linears
from bitsmith.models.load import load_model, load_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn

OURS = [
    "awq-autoawq029-gemm", "awq-autoawq029-gemv_fast", "awq-w4g128-gemm", "bnb-nf4", "fbgemm-fp8", "fp8-deepseek-block128",
    "fp8-deepseek-block128-ue8m0", "fp8-pertensor-static", "gptq-w3g64-asym", "gptq-w4g128", "gptq-w4g128-asym-actorder",
    "gptq-w4g128-asym-v2", "gptq-w8g-1", "gptqmodel-fp8-block", "hqq-hf457-w4g64", "hqq-w1g16-axis1", "hqq-w2g16-axis1",
    "hqq-w3g64-axis1", "hqq-w4g64-axis0", "hqq-w4g64-axis1", "hqq-w8g128-axis1",
]  # fmt: skip
NOT_YET = [
    "aqlm-1x12g8", "autoround-fp8block", "autoround-rtn-mxfp4", "autoround-rtn-nvfp4", "autoround-w2g64-auto_round",
    "autoround-w4g128-auto_round", "bitnet-autobitlinear-offline", "bnb-int8", "ct-fp8", "ct-fp8-dynamic-kv8", "ct-gptq-w4a16",
    "ct-mxfp4", "ct-mxfp4a16", "ct-nvfp4a16", "ct-spinquant-w4a16", "ct-w2a16", "ct-w3a16-padded-ct013", "ct-w4a16", "ct-w4afp8",
    "ct-w8a16", "ct-w8a8", "gptqmodel-gguf-q4_0", "mxfp4-gptoss", "quanto-int4", "quanto-int8", "quark-int4wo128", "torchao-fp8wo",
    "torchao-intx4",
]  # fmt: skip


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", OURS)
def test_logits_of_other_libraries_checkpoints(name: str, shared: Callable[[str], Path]) -> None:
    path = shared(f"interop/{name}")
    ref = load_file(path / "ref.safetensors")
    with torch.no_grad():
        logits = load_model(path, exact=True)(ref["input_ids"]).logits
    assert relative(logits, ref["logits_exact_fp32"]) < 1e-4


@pytest.mark.parametrize("name", NOT_YET)
def test_unknown_formats_are_refused_not_randomised(name: str, shared: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="Fix: ") as caught:
        load_model(shared(f"interop/{name}"))
    assert name in str(caught.value)


def test_interop_directories_are_all_accounted_for(shared: Callable[[str], Path]) -> None:
    found = {p.name for p in shared("interop").iterdir() if p.is_dir()}
    assert found == {"base", *OURS, *NOT_YET}


def test_stories260k_speaks_as_its_golden_says(shared: Callable[[str], Path]) -> None:
    path = shared("models/stories260k")
    golden = json.loads((path / "golden.json").read_text())
    model = load_model(path)
    ids = torch.tensor([load_tokenizer(path)(golden["prompt"])["input_ids"]])
    out = model.generate(
        ids, max_new_tokens=len(golden["greedy_ids"]) - ids.shape[1], do_sample=False, eos_token_id=None
    )
    assert out[0].tolist() == golden["greedy_ids"]


@pytest.fixture(scope="module")
def tiny(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], byte_tokenizer: Any
) -> Callable[..., Path]:
    def save(name: str, **config: Any) -> Path:
        path = tmp_path_factory.mktemp(name)
        tiny_model(name, **config).save_pretrained(path, max_shard_size=config.pop("max_shard_size", "1GB"))
        byte_tokenizer.save_pretrained(path)
        return path

    return save


IDS = torch.arange(60).view(2, 30)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mistral", "Gemma2", "Phi3", "Mixtral", "GptOss"])
def test_loading_equals_transformers(name: str, tiny: Callable[..., Path], tiny_model: Callable[..., Any]) -> None:
    expected, found = tiny_model(name), load_model(tiny(name), attn_implementation="eager")
    for (key, a), (other, b) in zip(expected.state_dict().items(), found.state_dict().items(), strict=True):
        assert key == other and torch.equal(a, b), key
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, expected(IDS).logits)


def test_sharded_files_and_index(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("Llama")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(IDS).logits, model(IDS).logits)
    name = sorted(tmp_path.glob("*.safetensors"))[1]
    name.unlink()
    with pytest.raises(UserError, match=f"{name.name}.*missing, truncated or damaged.*Fix"):
        load_model(tmp_path)


def test_tied_embeddings_are_shared_and_a_quantized_head_stays_apart(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny("Llama", tie_word_embeddings=True, vocab_size=288)
    model = load_model(source)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    quantize(source, tmp_path / "q", format="rtn", group_size=32, head_bits=8, progress=False)
    found = load_model(tmp_path / "q", exact=True)
    assert isinstance(found.lm_head, QuantLinear) and torch.equal(
        found.model.embed_tokens.weight, model.model.embed_tokens.weight
    )
    assert 0 < relative(found.lm_head.weight, model.lm_head.weight) < 0.01


def test_biases_survive(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny("Llama", attention_bias=True, mlp_bias=True)
    quantize(source, tmp_path / "q", format="hqq", bits=8, group_size=32, progress=False)
    base, found = load_model(source), load_model(tmp_path / "q", exact=True)
    assert torch.equal(found.model.layers[1].mlp.down_proj.bias, base.model.layers[1].mlp.down_proj.bias)
    with torch.no_grad():
        assert relative(found(IDS).logits, base(IDS).logits) < 0.1


def test_only_exact_linears_are_swapped(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A router is a Linear by its maths, not by its type: it must stay as it is."""
    quantize(tiny("Mixtral"), tmp_path / "q", format="rtn", group_size=32, progress=False)
    model = load_model(tmp_path / "q", exact=True)
    assert not isinstance(model.model.layers[0].mlp.gate, QuantLinear)
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantLinear)


def test_siblings_share_one_product(tiny: Callable[..., Path], tmp_path: Path) -> None:
    quantize(tiny("Llama"), tmp_path / "q", format="rtn", group_size=32, progress=False)
    apart, fused = load_model(tmp_path / "q", exact=True), load_model(tmp_path / "q", dtype=torch.float32)
    names = ("q_proj", "k_proj", "v_proj")
    assert all(isinstance(getattr(fused.model.layers[0].self_attn, n).matmul, _Member) for n in names)
    for name, linear in apart.named_modules():
        if isinstance(linear, QuantLinear):
            other = fused.get_submodule(name).qtensor()
            assert other.shape == linear.qtensor().shape
            assert all(torch.equal(t, other.parts[k]) for k, t in linear.qtensor().parts.items())
    with torch.no_grad():
        torch.testing.assert_close(fused(IDS).logits, apart(IDS).logits)
        # Twice, and out of order: nothing of an earlier input may leak into a later one.
        attention, x, y = fused.model.layers[0].self_attn, torch.randn(1, 3, 64), torch.randn(1, 3, 64)
        first = attention.v_proj(x)
        torch.testing.assert_close(attention.v_proj(y), apart.model.layers[0].self_attn.v_proj(y))
        torch.testing.assert_close(attention.v_proj(x), first)
    assert fuse_siblings(nn.Sequential(), torch.float32) == 0


def test_int8_activations_where_asked(tiny: Callable[..., Path], tmp_path: Path) -> None:
    quantize(tiny("Llama"), tmp_path / "q", format="rtn", bits=8, group_size=-1, progress=False)
    model = load_model(tmp_path / "q", dtype="bfloat16", act="a8")
    names = {m.matmul.name.partition("[")[0] for m in model.modules() if isinstance(m, QuantLinear)}
    # Without VNNI oneDNN's product of int8 saturates and is refused; then tokens are rounded before any other product.
    assert all(name == "int8" if probe.int8_linear() else name.startswith("a8+") for name in names), names
    with torch.no_grad():
        assert relative(model(IDS).logits.float(), load_model(tmp_path / "q", exact=True)(IDS).logits) < 0.1
    with pytest.raises(UserError, match="activation quantization is 'a6'; accepted: a8"):
        load_model(tmp_path / "q", dtype="bfloat16", act="a6")


def test_exact_and_rounded_activations_are_a_contradiction(tiny: Callable[..., Path]) -> None:
    """Said before anything is read, for unquantized models too."""
    with pytest.raises(UserError, match="exact=True never rounds activations and act='a8' asks for 8 bits of them"):
        load_model(tiny("Llama"), exact=True, act="a8")
    with pytest.raises(UserError, match="activation quantization is 'a6'; accepted: a8"):
        load_model(tiny("Llama"), act="a6")


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "a8+reference"), (torch.bfloat16, "int8")])
def test_activations_a_spec_rounds_are_rounded_at_load(dtype: torch.dtype, name: str) -> None:
    """No dialect writes one yet. What waits for its product is exact, and becomes what the spec says."""
    weight = torch.randn(16, 64)
    spec = Spec.parse("affine8.channel.sym.a8")
    q = rtn(weight, spec, None, Settings())
    model = nn.Sequential(QuantLinear(prepare(q, dtype, exact=True), (16, 64), None, dtype))
    assert model[0].matmul.name == "reference"
    prepare_linears(model, dtype)
    found = model[0].matmul.name
    assert found == name if probe.int8_linear() or dtype is torch.float32 else found.startswith("a8+")


def test_bfloat16_path_stays_near_the_exact_one(tiny: Callable[..., Path], tmp_path: Path) -> None:
    quantize(tiny("Llama"), tmp_path / "q", format="rtn", group_size=32, progress=False)
    with torch.no_grad():
        exact = load_model(tmp_path / "q", exact=True)(IDS).logits
        fast = load_model(tmp_path / "q", dtype="bfloat16")(IDS).logits.float()
    assert relative(fast, exact) < 0.1


def test_dense_linears_are_prepacked_in_bfloat16(tiny: Callable[..., Path]) -> None:
    plain, packed = (
        load_model(tiny("Llama", attention_bias=True), exact=True),
        load_model(tiny("Llama", attention_bias=True), dtype="bfloat16"),
    )
    linear = packed.model.layers[1].self_attn.q_proj
    assert isinstance(linear, DenseLinear) and isinstance(packed.lm_head, DenseLinear)
    assert torch.equal(linear.weight, plain.model.layers[1].self_attn.q_proj.weight.bfloat16())
    with torch.no_grad():
        assert relative(packed(IDS).logits.float(), plain(IDS).logits) < 0.05
    tied = load_model(tiny("Llama", tie_word_embeddings=True), dtype="bfloat16")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def broken(source: Path, target: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(source, target)
    change(target)
    return target


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = json.loads((path / file).read_text())
        content.update(changes)
        (path / file).write_text(json.dumps(content))

    return apply


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        found = load_file(path / "model.safetensors")
        change(found)
        save_file(found, path / "model.safetensors")

    return apply


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


NORM = "model.layers.0.input_layernorm.weight"
DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("truncated", truncate, r"model\.safetensors cannot be read as safetensors.*truncated.*Fix: fetch"),
    ("empty", lambda p: (p / "model.safetensors").write_bytes(b""), r"cannot be read as safetensors"),
    ("no weights", lambda p: (p / "model.safetensors").unlink(), r"holds no \*\.safetensors file"),
    ("no config", lambda p: (p / "config.json").unlink(), r"config\.json is missing"),
    ("bad config", lambda p: (p / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    ("list config", lambda p: (p / "config.json").write_text("[]"), r"config\.json holds a list, expected a JSON object"),
    ("unknown model", edit("config.json", model_type="nonsense"), r"config\.json: transformers cannot build this model"),
    ("unknown quantization", edit("config.json", quantization_config={"quant_method": "qqq"}), r"quant_method 'qqq', which bitsmith does not read yet"),
    ("missing tensor", tensors(lambda t: t.pop(NORM)), rf"1 tensors the model needs are missing, the first being {NORM}"),
    ("extra tensor", tensors(lambda t: t.update({"model.layers.0.mlp.extra": torch.zeros(1)})), r"have no place in a llama model.*mlp\.extra"),
    ("wrong shape", tensors(lambda t: t.update({NORM: torch.zeros(3)})), rf"tensor {NORM} has shape \(3,\), the model needs \(64,\)"),
    ("wrong dtype", tensors(lambda t: t.update({NORM: torch.zeros(64, dtype=torch.int8)})), rf"tensor {NORM} has dtype torch\.int8.*Fix"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "change", "message"), DAMAGE, ids=[d[0] for d in DAMAGE])
def test_damage_is_named(
    what: str, change: Callable[[Path], None], message: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        load_model(broken(tiny("Llama"), tmp_path / "broken", change))


def test_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/nowhere/at/all does not exist\. Fix"):
        load_model("/nowhere/at/all")
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(UserError, match=r"model\.bin is a file; bitsmith reads a model directory"):
        load_model(tmp_path / "model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"model\.bin, a pickle, which can run code.*convert it to safetensors"):
        load_model(tmp_path)
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_dtype_names_are_checked(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="dtype 'fp12' is not known; accepted: float32, bfloat16, float16, auto"):
        load_model(tiny("Llama"), dtype="fp12")


def test_no_remote_code_is_run(tiny: Callable[..., Path], tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    path = broken(
        tiny("Llama"),
        tmp_path / "evil",
        edit("config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
    )
    (path / "evil.py").write_text(f"open({str(flag)!r}, 'w').write('x')")
    load_model(path)
    assert not flag.exists()


def test_inspect_counts_bits_and_bytes(tiny: Callable[..., Path], tmp_path: Path) -> None:
    plain = inspect_checkpoint(tiny("Llama"))
    assert plain["format"] == "unquantized" and plain["bpw"] == 32 and plain["kv_bytes_per_token"] == 2 * 2 * 2 * 2 * 16
    quantize(tiny("Llama"), tmp_path / "q", format="rtn", group_size=32, progress=False)
    found = inspect_checkpoint(tmp_path / "q")
    assert found["format"] == "gptq" and found["bpw"] == 4 + 16 / 32
    assert found["tensors"]["model.layers.0.mlp.up_proj.weight"] == "affine4.g32.sym"
    assert found["tensors"]["model.norm.weight"] == "float32 [64]"
    assert (
        found["parameters"] == plain["parameters"]
        and found["file_bytes"] == (tmp_path / "q" / "model.safetensors").stat().st_size
    )
