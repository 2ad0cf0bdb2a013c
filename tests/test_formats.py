"""Dialects: what other libraries wrote is read exactly and written back byte for byte."""

import inspect
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.kernels import codebook
from bitsmith.kernels.families import family, spread
from bitsmith.kernels.grid import Params
from bitsmith.kernels.qtensor import QTensor, build, matrix_shape, to_matrix
from bitsmith.kernels.spec import Spec
from bitsmith.quant_formats import base, hqq
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).with_name("golden") / "formats.safetensors"
OURS = (
    "awq-autoawq029-gemm", "awq-autoawq029-gemv_fast", "awq-w4g128-gemm", "bnb-nf4", "fbgemm-fp8",
    "fp8-deepseek-block128", "fp8-deepseek-block128-ue8m0", "fp8-pertensor-static", "gptq-w3g64-asym", "gptq-w4g128",
    "gptq-w4g128-asym-actorder", "gptq-w4g128-asym-v2", "gptq-w8g-1",
    "gptqmodel-fp8-block", "hqq-hf457-w4g64", "hqq-w1g16-axis1", "hqq-w2g16-axis1",
    "hqq-w3g64-axis1", "hqq-w4g64-axis0", "hqq-w4g64-axis1", "hqq-w8g128-axis1",
)  # fmt: skip
FOREIGN = {
    "aqlm-1x12g8": "aqlm", "autoround-fp8block": "auto-round", "autoround-rtn-mxfp4": "auto-round",
    "autoround-rtn-nvfp4": "compressed-tensors", "autoround-w2g64-auto_round": "auto-round",
    "autoround-w4g128-auto_round": "auto-round", "bitnet-autobitlinear-offline": "bitnet", "bnb-int8": "load_in_8bit",
    "ct-fp8": "compressed-tensors", "ct-fp8-dynamic-kv8": "compressed-tensors", "ct-gptq-w4a16": "compressed-tensors",
    "ct-mxfp4": "compressed-tensors", "ct-mxfp4a16": "compressed-tensors", "ct-nvfp4a16": "compressed-tensors",
    "ct-spinquant-w4a16": "compressed-tensors", "ct-w2a16": "compressed-tensors",
    "ct-w3a16-padded-ct013": "compressed-tensors", "ct-w4a16": "compressed-tensors", "ct-w4afp8": "compressed-tensors",
    "ct-w8a16": "compressed-tensors", "ct-w8a8": "compressed-tensors", "gptqmodel-gguf-q4_0": "gguf",
    "mxfp4-gptoss": "mxfp4", "quark-int4wo128": "quark", "torchao-fp8wo": "torchao", "torchao-intx4": "torchao",
}  # fmt: skip


class Tensors(dict[str, Tensor]):
    """A base.Reader over tensors in memory."""

    def __call__(self, name: str) -> Tensor:
        if name not in self:
            raise UserError(f"tensor {name} is missing")
        return self[name]


def open_interop(path: Path) -> tuple[dict[str, Any], Tensors]:
    config = json.loads((path / "config.json").read_text())
    if not (path / "qmodel.pt").exists():
        return config, Tensors(load_file(path / "model.safetensors"))
    config["quantization_config"], tensors = hqq.native_to_tensors(torch.load(path / "qmodel.pt", weights_only=True))
    return config, Tensors(tensors)


def assert_saved_as_read(read: Tensors, name: str, saved: dict[str, Tensor]) -> None:
    own = {n.removeprefix(f"{name}.") for n in read if n.startswith(f"{name}.")}
    assert set(saved) == own
    for suffix, tensor in saved.items():
        assert base.same(tensor, read[f"{name}.{suffix}"]), f"{name}.{suffix}"


def assert_equal(a: QTensor, b: QTensor) -> None:
    assert (a.spec, a.shape) == (b.spec, b.shape)
    for mine, other in ((a.parts, b.parts), (a.extra, b.extra)):
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            assert base.same(tensor, other[name]), name


@pytest.mark.parametrize("directory", OURS)
def test_checkpoints_of_other_libraries(shared: Callable[[str], Path], directory: str) -> None:
    """Every quantized weight is written back byte for byte, and decodes to the weights behind the reference logits."""
    path = shared(f"interop/{directory}")
    config, read = open_interop(path)
    found = base.detect(config, directory)
    assert found is not None
    fmt, recipe = found
    keys = {k: v for k, v in config.items() if k not in ("quantization_config", "dtype", "torch_dtype")}
    model = LlamaForCausalLM(LlamaConfig(**keys)).float().eval()
    weights = {name: tensor.float() for name, tensor in read.items() if name in model.state_dict()}
    modules = [name.removesuffix(f".{fmt.MARK}") for name in read if name.endswith(f".{fmt.MARK}")]
    assert len(modules) == 14
    for name in modules:
        linear = model.get_submodule(name)
        shape = (int(linear.out_features), int(linear.in_features))
        q = fmt.load(read, name, shape, recipe)
        assert_saved_as_read(read, name, fmt.save(q, recipe))
        assert sum(t.numel() for t in q.extra.values()) < 300, "extra is for what is small"
        assert fmt.shaped(q.spec, shape) == q.spec
        weights[f"{name}.weight"] = q.dequantize()
    model.load_state_dict(weights)
    reference = load_file(path / "ref.safetensors")
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    exact = reference["logits_exact_fp32"]
    assert (logits - exact).norm() / exact.norm() < 1e-4


@pytest.mark.parametrize("directory", FOREIGN)
def test_foreign_checkpoints_are_refused_by_name(shared: Callable[[str], Path], directory: str) -> None:
    """An unknown quant_method must never become a model with random weights."""
    config = json.loads((shared(f"interop/{directory}") / "config.json").read_text())
    with pytest.raises(UserError) as caught:
        base.detect(config, f"{directory}/config.json")
    assert FOREIGN[directory] in str(caught.value)
    assert "Nothing was loaded" in str(caught.value)
    assert "Fix:" in str(caught.value)


def _golden() -> dict[str, dict[str, Any]]:
    with safe_open(GOLDEN, "pt") as file:
        return {case: json.loads(about) for case, about in sorted(file.metadata().items())}


@pytest.mark.parametrize("case", _golden())
def test_golden_vectors(case: str) -> None:
    """Small weights packed by the libraries themselves (golden/make_formats.py) decode to the library's own numbers."""
    with safe_open(GOLDEN, "pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{case}/")]  # noqa: SIM118 (safe_open is no mapping)
        read = Tensors({name.removeprefix(f"{case}/"): file.get_tensor(name) for name in names})
    found = base.detect({"quantization_config": _golden()[case]["config"]}, case)
    assert found is not None
    fmt, recipe = found
    expected = read.pop("expected")
    rows = read.pop("rows", torch.arange(len(expected)))
    q = fmt.load(read, "m", (int(rows.max()) + 1, expected.shape[1]), recipe)
    torch.testing.assert_close(q.dequantize()[rows], expected, rtol=1e-6, atol=1e-7)
    assert_saved_as_read(read, "m", fmt.save(q, recipe))
    # What `save` writes for weights quantized here is what the libraries write: extra holds true peculiarities only.
    peculiar = {"view_as_float"} if case.endswith("-float") else {s for s in fmt.SUFFIXES if "quant_state" in s}
    assert set(q.extra) <= peculiar


def test_golden_tables_are_the_libraries_own() -> None:
    with safe_open(GOLDEN, "pt") as file:
        assert torch.equal(file.get_tensor("bnb-nf4/m.weight.quant_map"), torch.tensor(codebook.VALUES["nf4"]))
        assert torch.equal(file.get_tensor("bnb-fp4-dq-bf16/m.weight.quant_map"), torch.tensor(codebook.VALUES["fp4"]))
        assert torch.equal(file.get_tensor("bnb-nf4-dq/m.weight.nested_quant_map"), codebook.dynamic_map())


def quantized(spec: Spec, shape: tuple[int, int]) -> QTensor:
    """Round-to-nearest of random numbers, with a random order of columns where the spec has one."""
    perm = torch.randperm(shape[1]) if spec.pre else None
    matrix = to_matrix(torch.randn(shape) * 0.1, spec)
    grid, size = family(spec).grid, matrix_shape(spec, shape)
    params = grid.fit(matrix, spec)
    zero = None if params.zero is None else spread(params.zero, spec, size)
    codes, _ = grid.nearest(matrix, spec, Params(spread(params.scale, spec, size), zero, params.parts))
    return build(codes, params, spec, shape, perm)


BITS, GROUPS = (None, 1, 2, 3, 4, 8), (None, -1, 8, 16, 32, 64, 128)
SIZES = (1, 5, 8, 16, 24, 32, 40, 64, 96, 128, 130, 172, 257)


def accepted(name: str) -> list[base.Recipe]:
    """The recipes of every combination of options that a format takes."""
    recipes = []
    for bits, group, sym, desc_act in product(BITS, GROUPS, (None, True, False), (None, True)):
        try:
            recipes.append(base.format_by_name(name).recipe(base.Options(name, bits, group, sym, desc_act)))
        except UserError as error:
            assert "Fix:" in str(error) or "accepted" in str(error)
    return recipes


# GGUF types have no config.json and no options: tests/test_gguf_blocks.py.
@pytest.mark.parametrize("name", [name for name in base.names() if not name.startswith("gguf:")])
def test_whatever_is_accepted_survives_save_and_load(name: str) -> None:
    """Random options and shapes: the weight is the same after save, config, detect and load."""
    fmt, recipes, draw = base.format_by_name(name), accepted(name), Random(0)
    assert all(recipe.format == name for recipe in recipes)
    done = 0
    while done < 40:
        recipe, shape = draw.choice(recipes), (draw.choice(SIZES), draw.choice(SIZES))
        spec = fmt.shaped(recipe.default, shape)
        refused = fmt.check(spec, shape)
        if refused:
            assert "Fix:" in refused
            continue
        done += 1
        q = quantized(spec, shape)
        saved = fmt.save(q, recipe)
        assert fmt.MARK in saved and set(saved) <= set(fmt.SUFFIXES)
        config = fmt.config(recipe)
        if pickled := base.pickled(fmt, recipe):
            # Nothing goes to config.json: a pickled layout is recognised by its file, and described by what is in it.
            assert not config
            config = hqq.native_to_tensors(pickled[1]({f"m.{s}": t for s, t in saved.items()}))[0]
        found = base.detect(json.loads(json.dumps({"quantization_config": config})), "config.json")
        assert found is not None and found[0] is fmt
        back = fmt.load(Tensors({f"m.{s}": t for s, t in saved.items()}), "m", shape, found[1])
        if spec.pre or pickled:
            # Any order within a group is the same weight: g_idx, which is what is written, forgets it. The native form of
            # HQQ gives the size of a group, not that it was asked for as the whole row.
            assert torch.equal(back.dequantize(), q.dequantize())
            assert_saved_as_read(Tensors({f"m.{s}": t for s, t in saved.items()}), "m", fmt.save(back, found[1]))
        else:
            assert_equal(q, back)


@pytest.mark.parametrize("name", base.formats())
def test_modules_obey_the_protocol(name: str) -> None:
    module = base.formats()[name]
    for function in ("detect", "recipe", "shaped", "check", "load", "save", "config"):
        wanted = [p for p in inspect.signature(getattr(base.Format, function)).parameters if p != "self"]
        assert list(inspect.signature(getattr(module, function)).parameters) == wanted, function
    assert module.MARK in module.SUFFIXES
    assert module.detect({}) is None and module.detect({"quant_method": "of the future"}) is None
    assert len((module.__doc__ or "").splitlines()) >= 5
    assert isinstance(module.SIDECAR, str)


def test_every_dialect_is_found_and_names_are_unique() -> None:
    # gguf_*: blocks and mixtures of GGUF, whose container is a checkpoint of its own kind (models/).
    files = {p.stem for p in Path(base.__file__).parent.glob("*.py") if not p.stem.startswith("gguf_")} - {"base"}
    assert set(base.formats()) == files
    assert len(set(base.names())) == len(base.names()) == sum(len(m.NAMES) for m in base.formats().values())


@pytest.mark.parametrize("directory", [d for d in OURS if d.startswith("hqq-w")])
def test_native_hqq_round_trip(shared: Callable[[str], Path], directory: str) -> None:
    """qmodel.pt -> tensors -> qmodel.pt gives the same keys in the same order, of the same types."""
    modules = torch.load(shared(f"interop/{directory}") / "qmodel.pt", weights_only=True)
    back = hqq.tensors_to_native(hqq.native_to_tensors(modules)[1])
    assert list(back) == list(modules)
    for name, state in modules.items():
        assert list(back[name]) == list(state)
        for key, value in state.items():
            assert type(back[name][key]) is type(value), f"{name}.{key}"
            if isinstance(value, Tensor):
                assert base.same(back[name][key], value), f"{name}.{key}"
            else:
                assert back[name][key] == value, f"{name}.{key}"


@pytest.mark.parametrize(
    "facts", [{"nbits": 1.58, "packing": "2bit_u8"}, {"group_size": None}, {"view_as_float": True}]
)
def test_native_hqq_keeps_unusual_facts(facts: dict[str, Any]) -> None:
    state = {
        "W_q": torch.nn.Parameter(torch.zeros(8, 16, dtype=torch.uint8), requires_grad=False),
        "nbits": 4,
        "group_size": 16,
    }
    state |= {"shape": torch.Size((16, 16)), "scale": torch.ones(16, 1), "zero": torch.ones(16, 1), "axis": 1, **facts}
    back = hqq.tensors_to_native(hqq.native_to_tensors({"m": state})[1])["m"]
    assert {k: v for k, v in back.items() if not isinstance(v, Tensor)} == {
        k: v for k, v in state.items() if not isinstance(v, Tensor)
    }
    assert all(base.same(back[k], v) for k, v in state.items() if isinstance(v, Tensor))


def test_config_repeats_what_was_left_out() -> None:
    """Skip rules come back as modules_to_not_convert, whether they were read from a file or asked for as globs."""
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "version": "GEMM",
        "modules_to_not_convert": ["mlp.gate"],
    }
    found = base.detect({"quantization_config": config}, "here")
    assert found is not None
    fmt, recipe = found
    assert recipe.spec("model.layers.0.mlp.gate") is None and recipe.spec("model.layers.0.mlp.gate_proj") is not None
    assert fmt.config(recipe)["modules_to_not_convert"] == ["mlp.gate"]
    more = recipe.with_rules((("lm_head", "skip"), ("*.layers.1.*", "skip")))
    assert fmt.config(more)["modules_to_not_convert"] == ["lm_head", "layers.1", "mlp.gate"]
    assert fmt.config(more)["version"] == "gemm"
    null = base.detect({"quantization_config": {**config, "modules_to_not_convert": None}}, "here")
    assert null is not None and fmt.config(null[1])["modules_to_not_convert"] is None


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_overrides_survive_the_config(name: str) -> None:
    fmt = base.format_by_name(name)
    recipe = fmt.recipe(base.Options(name))
    finer = recipe.with_rules((("lm_head", "skip"), ("*.down_proj", Spec("affine", 4, 32, zero=recipe.default.zero))))
    read = fmt.detect(fmt.config(finer))
    assert read is not None
    for module in ("lm_head", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"):
        assert read.spec(module) == finer.spec(module), module


def test_old_spellings_of_awq() -> None:
    found = base.detect(
        {"quantization_config": {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMV"}}, ""
    )
    assert found is not None
    assert (found[1].default.group, found[1].options["version"]) == (32, "gemv")
    found = base.detect({"quantization_config": {"method": "awq", "bits": 4, "group_size": 64, "format": "gemm"}}, "")
    assert found is not None and found[1].default.group == 64
