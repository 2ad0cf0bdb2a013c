"""`inspect --validate`: damage of every kind is found where it is, and sound weights of every format are left alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsmith.calibrate import rtn
from bitsmith.calibrate.driver import quantize
from bitsmith.calibrate.method import Settings
from bitsmith.cli.main import main
from bitsmith.kernels import bits
from bitsmith.kernels.qtensor import QTensor, codes_of
from bitsmith.kernels.spec import Spec
from bitsmith.models.validate import validate_checkpoint, validate_weight
from bitsmith.quant_formats import gguf_blocks
from safetensors.torch import load_file, save_file
from torch import Tensor

SHAPE = (32, 512)
SPECS = ["affine4.g128.asym", "affine4.g64.zf16.axis0", "minifloat8.e4m3.g32x32.f32", "codebook4.nf4.g64.u8:f32:256",
         "affine8.channel.sym", "minifloat4.e2m1.g32.e8m0", "minifloat4.e2m1.g16.ue4m3"]  # fmt: skip


def sound(spec: str) -> QTensor:
    return rtn.quantize(torch.randn(SHAPE) * 0.05, Spec.parse(spec), None, Settings())


def changed(q: QTensor, part: str, index: int, value: Any) -> QTensor:
    """The weight with entry `index` of a part, counted in memory, set to `value`."""
    found = q.parts[part].contiguous().clone()
    found.view(-1)[index] = value
    return replace(q, parts={**q.parts, part: found})


@pytest.mark.parametrize("spec", SPECS)
def test_sound_weights_of_every_family_pass(spec: str) -> None:
    assert validate_weight("w", sound(spec)) == []


@pytest.mark.parametrize(
    "name", ["Q4_0", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_XS", "IQ1_M", "TQ2_0", "MXFP4"]
)
def test_gguf_blocks_of_random_bytes_are_garbage(name: str) -> None:
    block = gguf_blocks.BLOCKS[name]
    raw = torch.randint(0, 256, (64, 4096 // block.width * block.size), dtype=torch.uint8)
    problems = {f.problem for f in validate_weight("w", gguf_blocks.unpack(name, raw, (64, 4096)))}
    assert problems, name
    if name == "TQ2_0":
        assert any("codes: 3" in p for p in problems)
    if name == "MXFP4":
        assert problems == {"scales: NaN or inf"}


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ4_XS"])
def test_a_gguf_super_scale_out_of_proportion(name: str) -> None:
    spec = gguf_blocks.spec(name)
    assert spec is not None
    block = gguf_blocks.BLOCKS[name]
    raw = torch.randint(0, 256, (64, 4096 // block.width * block.size), dtype=torch.uint8)
    q = gguf_blocks.unpack(name, raw, (64, 4096))
    supers = {k: torch.full_like(v, 0.01) for k, v in q.parts.items() if k.startswith("super_")}
    q = replace(q, parts={**q.parts, **supers})
    assert validate_weight("w", q) == []
    (found,) = validate_weight("w", changed(q, "super_scales", 100, 60.0))
    assert (found.problem, found.count, found.first) == ("super_scales: over 1000 times the median", 1, (100,))
    assert found.total == q.parts["super_scales"].numel() and found.stored == str(spec)
    (found,) = validate_weight("w", changed(q, "super_scales", 7, float("nan")))
    assert (found.problem, found.first) == ("super_scales: NaN or inf", (7,))


def damaged() -> list[tuple[str, QTensor, str, tuple[int, ...]]]:
    fp8 = sound("minifloat8.e4m3.g32x32.f32")
    codes = codes_of(fp8)
    codes[3, 17] = 0x7F
    nan_code = replace(fp8, parts={**fp8.parts, "codes": bits.pack(codes, 8)})
    zeros = sound("affine4.g128.asym")
    dead = {**zeros.parts, "scales": zeros.parts["scales"].clone()}
    dead["scales"][:8] = 0
    return [
        ("gptq", changed(sound("affine4.g128.asym"), "scales", 5, float("inf")), "scales: NaN or inf", (1, 1)),
        ("hqq", changed(sound("affine4.g64.zf16.axis0"), "zeros", 2, float("nan")), "zeros: NaN or inf", (2, 0)),
        ("nf4", changed(sound("codebook4.nf4.g64.u8:f32:256"), "table", 3, float("nan")), "table: NaN or inf", (3,)),
        ("scale", changed(sound("affine4.g128.asym"), "scales", 6, 60000.0), "scales: over 1000 times the median", (1, 2)),
        ("e8m0", changed(sound("minifloat4.e2m1.g32.e8m0"), "scales", 16, 255), "scales: NaN or inf", (1, 0)),
        ("ue4m3", changed(sound("minifloat4.e2m1.g16.ue4m3"), "scales", 33, 0x7F), "scales: NaN or inf", (1, 1)),
        ("fp8", nan_code, "weights: NaN or inf", (3, 17)),
        ("zeros", replace(zeros, parts=dead), "blocks of zeros", (0, 0)),
    ]  # fmt: skip


def test_damage_is_found_where_it_is() -> None:
    for name, q, problem, first in damaged():
        found = [(f.problem, f.first, f.count) for f in validate_weight("w", q)]
        assert found == [(problem, first, 32 if problem == "blocks of zeros" else 1)], name


def test_unquantized_weights() -> None:
    w = torch.randn(40, 8).bfloat16()
    assert validate_weight("w", w) == [] and validate_weight("ids", torch.arange(3)) == []
    assert validate_weight("bias", torch.zeros(40)) == []
    w[:4] = 0
    assert validate_weight("w", w) == [], "a tenth may be unused tokens"
    w[4] = 0
    w[7, 2] = float("nan")
    found = validate_weight("w", w)
    assert [(f.problem, f.count, f.total) for f in found] == [("NaN or inf", 1, 320), ("rows of zeros", 5, 40)]
    assert found[0].first == (7, 2) and found[0].stored == "bfloat16 [40, 8]"


def tamper(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_the_command(
    tiny_model: Callable[..., transformers.PreTrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("Llama").save_pretrained(tmp_path / "src")
    quantize(tmp_path / "src", tmp_path / "q", format="rtn", group_size=32, progress=False)
    for name in ("src", "q"):
        assert main(["inspect", "--validate", str(tmp_path / name)]) == 0
    out = capsys.readouterr()
    assert out.out == "" and out.err.count("21 weights, 0 of them with problems") == 2

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.scales"][1, 3] = float("nan")
        tensors["model.norm.weight"][5] = float("inf")
        tensors["model.layers.0.self_attn.q_proj.qweight"] = tensors["model.layers.0.self_attn.q_proj.qweight"][:-1]

    tamper(tmp_path / "q", damage)
    assert main(["inspect", "--validate", str(tmp_path / "q")]) == 1
    out = capsys.readouterr()
    head, *rows = out.out.splitlines()
    assert head.split() == ["tensor", "stored", "as", "count", "first", "problem"]
    assert {row.split()[0] for row in rows} == {
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
    }
    assert "21 weights, 3 of them with problems" in out.err
    assert main(["inspect", "--validate", "--json", str(tmp_path / "q")]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == 21
    by_name = {f["tensor"]: f for f in found["findings"]}
    scales = by_name["model.layers.1.mlp.up_proj.weight"]
    # GPTQ keeps scales [groups, outputs], the family [outputs, groups].
    assert (scales["problem"], scales["count"], scales["first"]) == ("scales: NaN or inf", 1, [3, 1])
    assert by_name["model.layers.0.self_attn.q_proj.weight"]["stored"] == "unreadable"
    assert "qweight" in by_name["model.layers.0.self_attn.q_proj.weight"]["problem"]


def test_real_models_pass(shared: Callable[[str], Path]) -> None:
    for name in ("stories260k", "books-8m"):
        count, found = validate_checkpoint(shared(f"models/{name}"))
        assert count > 40 and found == []
