"""Dialects: the traps other loaders fall into, and what is said about files and options that cannot be right."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsmith.calibrate import rtn
from bitsmith.calibrate.method import Settings
from bitsmith.errors import UserError
from bitsmith.kernels import bits
from bitsmith.kernels.qtensor import QTensor
from bitsmith.kernels.spec import Spec
from bitsmith.quant_formats import awq, base, fbgemm_fp8, fp8, gptq, hqq, nf4
from torch import Tensor

SHAPE = (32, 64)


class Tensors(dict[str, Tensor]):
    """A base.Reader over tensors in memory."""

    def __call__(self, name: str) -> Tensor:
        if name not in self:
            raise UserError(f"tensor {name} is missing")
        return self[name]


def quantized(spec: Spec, shape: tuple[int, int]) -> QTensor:
    return rtn.quantize(torch.randn(shape) * 0.1, spec, None, Settings())


def written(name: str, shape: tuple[int, int] = SHAPE, **options: Any) -> tuple[Any, base.Recipe, QTensor, Tensors]:
    """A random weight in the format's default or the asked-for layout, and its tensors as module `m`."""
    fmt = base.format_by_name(name)
    recipe = fmt.recipe(base.Options(name, **options))
    q = quantized(fmt.shaped(recipe.default, shape), shape)
    return fmt, recipe, q, Tensors({f"m.{s}": t for s, t in fmt.save(q, recipe).items()})


def test_gptq_v1_zero_points_borrow_across_the_word() -> None:
    """gptqmodel subtracts 0x55555555 from the word: fields 0 3 1 2 ... must come back as they were."""
    zeros = torch.tensor([[0, 3, 1, 2] * 4], dtype=torch.uint8)
    word = int(bits.pack(zeros, 2)) & 0xFFFFFFFF
    stored = torch.tensor([[(word - 0x55555555) & 0xFFFFFFFF]], dtype=torch.int64).to(torch.int32)
    fields = [(int(stored) & 0xFFFFFFFF) >> (2 * i) & 3 for i in range(16)]
    assert [(f + 1) % 4 for f in fields] != zeros[0].tolist(), "the trap must be one"
    read = Tensors({"m.qweight": torch.zeros(2, 16, dtype=torch.int32), "m.qzeros": stored})
    read["m.scales"] = torch.ones(1, 16, dtype=torch.float16)
    recipe = gptq.detect({"quant_method": "gptq", "bits": 2, "group_size": 32, "sym": False})
    assert recipe is not None
    q = gptq.load(read, "m", (16, 32), recipe)
    assert q.parts["zeros"][:, 0].tolist() == zeros[0].tolist()
    assert base.same(gptq.save(q, recipe)["qzeros"], stored)


def test_gptq_says_sym_but_stores_other_zero_points() -> None:
    fmt, recipe, q, read = written("gptq", sym=False, group_size=32)
    claims = fmt.detect({**fmt.config(recipe), "sym": True})
    assert torch.equal(fmt.load(read, "m", SHAPE, claims).dequantize(), q.dequantize())


def test_fp8_scales_divide_only_where_the_config_says_so() -> None:
    """quant_method "fp8" and the name weight_scale_inv mean a factor, unless weight_scale_semantics is "inverse"."""
    fmt, recipe, q, read = written("fp8-block", (130, 200))
    inverse = fmt.detect({**fmt.config(recipe), "weight_scale_semantics": "inverse"})
    divisors = Tensors({**read, "m.weight_scale_inv": 1 / read("m.weight_scale_inv")})
    back = fmt.load(divisors, "m", (130, 200), inverse)
    torch.testing.assert_close(back.dequantize(), q.dequantize(), rtol=1e-6, atol=0)
    assert all(base.same(t, divisors[f"m.{s}"]) for s, t in fmt.save(back, inverse).items())
    assert fmt.config(inverse)["weight_scale_semantics"] == "inverse"
    assert torch.equal(fmt.save(q, inverse)["weight_scale_inv"], divisors("m.weight_scale_inv"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_fp8_power_of_two_scales_as_bytes(dtype: torch.dtype) -> None:
    fmt, recipe, _, read = written("fp8-block", (256, 130))
    exponents = torch.tensor([[120, 121], [119, 127]], dtype=torch.uint8)
    read["m.weight_scale_inv"] = exponents if dtype is torch.uint8 else exponents.view(dtype)
    q = fmt.load(read, "m", (256, 130), recipe)
    assert q.spec.scale == "e8m0"
    factor = torch.exp2(exponents.float() - 127).repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :130]
    assert torch.equal(q.dequantize(), read("m.weight").float() * factor)
    assert all(base.same(t, read[f"m.{s}"]) for s, t in fmt.save(q, recipe).items())


@pytest.mark.parametrize("shape", [(576, 64), (128, 200), (1, 1), (127, 129)])
def test_fp8_tiles_need_not_divide_the_weight(shape: tuple[int, int]) -> None:
    fmt, recipe, _, read = written("fp8-block", shape)
    scale = read("m.weight_scale_inv").repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    assert torch.equal(fmt.load(read, "m", shape, recipe).dequantize(), read("m.weight").float() * scale)


def test_fp8_scale_per_row_of_gptqmodel() -> None:
    _, _, q, read = written("fp8-channel", (5, 9))
    config = {"quant_method": "fp8", "weight_scale_method": "row", "weight_scale_semantics": "inverse"}
    recipe = fp8.detect(config)
    assert recipe is not None
    rows = Tensors({"m.weight": read("m.weight"), "m.weight_scale_inv": 1 / read("m.weight_scale").flatten()})
    back = fp8.load(rows, "m", (5, 9), recipe)
    torch.testing.assert_close(back.dequantize(), q.dequantize(), rtol=1e-6, atol=0)
    assert all(base.same(t, rows[f"m.{s}"]) for s, t in fp8.save(back, recipe).items())


def test_bnb_absmax_of_a_repacked_model_is_refused() -> None:
    """bitsandbytes 0.50 on AVX512-BF16 saves bfloat16 [K/64, N] after a forward; read as it is, it is wrong by 0.73."""
    fmt, recipe, _, read = written("nf4")
    read["m.weight.absmax"] = read("m.weight.absmax").view(32, 1).T.to(torch.bfloat16)
    with pytest.raises(UserError, match="save it again before any forward"):
        fmt.load(read, "m", SHAPE, recipe)


def test_bnb_padding_follows_the_last_weight() -> None:
    """3 x 33 weights: an odd number, in blocks of 64 that straddle rows; the spare half byte must shift nothing."""
    fmt, recipe, q, read = written("nf4", (3, 33))
    assert read("m.weight").shape == (50, 1)
    assert torch.equal(fmt.load(read, "m", (3, 33), recipe).dequantize(), q.dequantize())
    high, low = int(read("m.weight")[0]) >> 4, int(read("m.weight")[0]) & 15
    first = q.parts["table"][torch.tensor([high, low])] * read("m.weight.absmax")[0]
    assert torch.equal(q.dequantize()[0, :2], first)


def test_awq_gemv_keeps_what_is_in_the_padding() -> None:
    recipe = awq.detect({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"})
    assert recipe is not None
    tensors = awq.save(quantized(recipe.default, SHAPE), recipe)
    tensors["scales"][:, -1] = 7.0
    read = Tensors({f"m.{s}": t for s, t in tensors.items()})
    assert all(base.same(t, read[f"m.{s}"]) for s, t in awq.save(awq.load(read, "m", SHAPE, recipe), recipe).items())


def test_awq_gemv_fast_gives_integers_back_where_they_are_exact() -> None:
    recipe = fast(32)
    q = quantized(recipe.default, SHAPE)
    scales = torch.full_like(q.parts["scales"], 0.125)
    exact = QTensor(q.spec, q.shape, {**q.parts, "scales": scales})
    back = awq.load(Tensors({f"m.{s}": t for s, t in awq.save(exact, recipe).items()}), "m", SHAPE, recipe)
    assert back.spec.zero == "asym" and torch.equal(back.parts["zeros"], q.parts["zeros"])


def change(name: str, suffix: str, new: Callable[[Tensor], Tensor] | None, **options: Any) -> Callable[[], object]:
    """Load a weight of the format after one of its tensors was changed, or removed."""

    def run() -> object:
        fmt, recipe, _, read = written(name, **options)
        if new is None:
            del read[f"m.{suffix}"]
        else:
            read[f"m.{suffix}"] = new(read(f"m.{suffix}"))
        return fmt.load(read, "m", SHAPE, recipe)

    return run


def bnb_state(**fields: Any) -> Callable[[Tensor], Tensor]:
    def edit(tensor: Tensor) -> Tensor:
        text = json.dumps({**json.loads(bytes(tensor.tolist())), **fields})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    return edit


def as_fact(value: Any) -> Callable[[Tensor], Tensor]:
    return lambda _: hqq._encode(value)


def fast(group: int) -> base.Recipe:
    recipe = awq.detect({"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemv_fast"})
    assert recipe is not None
    return recipe


STATE = "weight.quant_state.bitsandbytes__nf4"
LOADING: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "gptq shape": (
        change("gptq", "scales", lambda t: t[:, 1:], group_size=32),
        ("m.scales", "(2, 31)", "expected (2, 32)"),
    ),
    "gptq dtype": (
        change("gptq", "scales", lambda t: t.double(), group_size=32),
        ("m.scales", "torch.float64", "float16"),
    ),
    "gptq g_idx": (
        change("gptq", "g_idx", lambda t: t.fill_(1), group_size=32),
        ("m.g_idx", "every group 32 inputs", "fetch it again"),
    ),
    "awq missing": (change("awq", "qzeros", None, group_size=32), ("m.qzeros", "missing")),
    "awq shape": (change("awq", "qweight", lambda t: t.T, group_size=32), ("m.qweight", "(4, 64)", "expected (64, 4)")),
    "awq dtype": (change("awq", "scales", lambda t: t.to(torch.int32), group_size=32), ("m.scales", "torch.int32")),
    "awq other model": (
        lambda: awq.load(Tensors(), "m", (60, 64), awq.recipe(base.Options("awq"))),
        ("m: out_features 60 is not a multiple of 8", "does not belong to this model"),
    ),
    "awq fast": (
        lambda: awq.load(Tensors(), "m", (64, 96), fast(32)),
        ("m: in_features 96 is not a multiple of 64, which gemv_fast interleaves",),
    ),
    "hqq fact": (change("hqq", "compute_dtype", as_fact("torch.nonsense")), ("m.compute_dtype", "no encoded dtype")),
    "fp8 dtype": (change("fp8", "weight", lambda t: t.half()), ("m.weight", "torch.float16", "float8_e4m3fn")),
    "fp8 scale": (
        change("fp8", "weight_scale_inv", lambda t: torch.ones(2, 2)),
        ("m.weight_scale_inv", "(2, 2)", "() (per tensor)", "(32, 1) (per row)", "weight_block_size"),
    ),
    "fp8 tiles": (
        change("fp8-block", "weight_scale_inv", lambda t: torch.ones(2, 2)),
        ("(1, 1) (tiles of 128 x 128)", "Fix: weight_block_size"),
    ),
    "fp8 scale dtype": (change("fp8", "weight_scale_inv", lambda t: t.int()), ("m.weight_scale_inv", "torch.int32")),
    "fbgemm scale": (change("fp8-channel", "weight_scale", lambda t: t.T), ("m.weight_scale", "(1, 32)", "(32, 1)")),
    "nf4 absmax": (
        change("nf4", "weight.absmax", lambda t: t[1:]),
        ("m.weight.absmax", "torch.float32 (31,)", "expected torch.float32 (32,)"),
    ),
    "nf4 double": (change("nf4-dq", "weight.absmax", lambda t: t.float()), ("m.weight.absmax", "expected torch.uint8")),
    "nf4 weight": (change("nf4", "weight", lambda t: t[1:]), ("m.weight", "(1023, 1)", "(1024, 1)")),
    "nf4 storage": (
        change("nf4", "weight", lambda t: t.view(torch.int8)),
        ("m.weight", "torch.int8", "bnb_4bit_quant_storage says uint8"),
    ),
    "nf4 state": (change("nf4", STATE, lambda t: t[1:]), (f"m.{STATE}", "no JSON", "Fix")),
    "nf4 no state": (change("nf4", STATE, None), (f"m.{STATE}", "missing")),
    "nf4 shape": (change("nf4", STATE, bnb_state(shape=[64, 32])), ("shape is [64, 32], expected [32, 64]",)),
    "nf4 block": (change("nf4", STATE, bnb_state(blocksize=48)), ("blocksize is 48", "32, 64, 128")),
    "nf4 nested": (
        change("nf4-dq", STATE, bnb_state(nested_dtype="float16")),
        ("nested_dtype is 'float16', expected 'float32'",),
    ),
    "hqq missing": (change("hqq", "packing", None), ("m: packing missing beside m.W_q", "hqq >= 0.2")),
    "hqq shape": (change("hqq", "shape", as_fact(torch.Size((64, 32)))), ("m.shape says (64, 32)", "wants (32, 64)")),
    "hqq packing": (change("hqq", "nbits", as_fact(3)), ("packing '4bit_u8' with nbits 3", "3bit_32 with 3")),
    "hqq axis": (change("hqq", "axis", as_fact(2)), ("axis 2 is not read",)),
    "hqq nested": (change("hqq", "quant_zero", as_fact(True)), ("quant_zero", "Fix: quantize again")),
    "hqq channel": (change("hqq", "channel_wise", as_fact(False)), ("channel_wise",)),
    "hqq group": (change("hqq", "group_size", as_fact(60)), ("m.group_size says 60", "does not divide (32, 64)")),
    "hqq words": (
        change("hqq", "W_q", lambda t: t[1:]),
        ("m.W_q is torch.uint8 (15, 64), expected torch.uint8 (16, 64)",),
    ),
    "hqq scale": (change("hqq", "scale", lambda t: t.T), ("m.scale", "(1, 32)", "expected (32, 1)")),
    "hqq zero": (change("hqq", "zero", lambda t: t.to(torch.uint8)), ("m.zero", "torch.uint8", "float16")),
    "hqq codes": (
        change("hqq", "nbits", as_fact(5), bits=8),
        ("m.W_q holds codes above 31 with nbits 5",),
    ),
    "native structure": (lambda: hqq.native_to_tensors({"m": 3}), ("qmodel.pt: m holds a int", "Fix")),
    "native nested": (
        lambda: hqq.native_to_tensors({"m": {"W_q": torch.ones(1), "meta_scale": {}}}),
        ("qmodel.pt: m.meta_scale is not read", "quant_scale=False"),
    ),
    "native plain": (lambda: hqq.native_to_tensors({"m": {"weight": torch.ones(1)}}), ("no quantized module", "Fix")),
}


@pytest.mark.parametrize("case", LOADING)
def test_damaged_files(case: str) -> None:
    run, fragments = LOADING[case]
    with pytest.raises(UserError) as caught:
        run()
    for fragment in fragments:
        assert fragment in str(caught.value)


def read_config(**config: Any) -> Callable[[], object]:
    return lambda: base.detect({"quantization_config": config}, "dir/config.json")


def options(name: str, **asked: Any) -> Callable[[], object]:
    return lambda: base.format_by_name(name).recipe(base.Options(name, **asked))


ASKING: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "unknown": (read_config(quant_method="qqq"), ("dir/config.json", "'qqq'", "Nothing was loaded", "Fix")),
    "no method": (read_config(bits=4), ("'<none>'", "Nothing was loaded")),
    "gptq bits": (read_config(quant_method="gptq", bits=5), ("'gptq': bits is 5", "reads 2, 3, 4, 8", "Fix")),
    "gptq planar": (read_config(quant_method="gptq", bits=4, checkpoint_format="gptq_p"), ("'gptq_p'", "'gptq_v2'")),
    "awq bits": (read_config(quant_method="awq", bits=8), ("'awq': bits is 8", "reads 4", "Fix")),
    "awq marlin": (read_config(quant_method="awq", bits=4, version="marlin"), ("version is 'marlin'", "'gemv_fast'")),
    "awq dynamic": (
        read_config(quant_method="awq", bits=4, dynamic={"+:x": {"bits": 8}}),
        ("dynamic[+:x].bits is 8", "reads 4"),
    ),
    "fp8 e5m2": (read_config(quant_method="fp8", fmt="e5m2"), ("fmt is 'e5m2'", "'e4m3'")),
    "fp8 tile": (read_config(quant_method="fp8", weight_block_size=[128]), ("length of weight_block_size is 1",)),
    "fp8 experts": (read_config(quant_method="fp8", expert_dtype="fp4"), ("expert_dtype is 'fp4'",)),
    "fp8 semantics": (
        read_config(quant_method="fp8", weight_scale_semantics="log"),
        ("weight_scale_semantics is 'log'",),
    ),
    "hqq bits": (
        read_config(quant_method="hqq", quant_config={"weight_quant_params": {"nbits": 7}}),
        ("weight_quant_params.nbits is 7", "8, 6, 5, 4, 3, 2, 1.58, 1"),
    ),
    "hqq nested": (
        read_config(
            quant_method="hqq", quant_config={"weight_quant_params": {"nbits": 4}, "zero_quant_params": {"nbits": 8}}
        ),
        ("quant_config.zero_quant_params", "reads None"),
    ),
    "bnb type": (
        read_config(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="af4"),
        ("bnb_4bit_quant_type is 'af4'", "'nf4', 'fp4'"),
    ),
    "bnb int8": (read_config(quant_method="bitsandbytes", load_in_8bit=True), ("load_in_8bit", "Nothing was loaded")),
    "name": (lambda: base.format_by_name("awk"), ("--format 'awk'", "awq, bnb-fp4")),
    "awq 5": (options("awq", bits=5), ("--bits 5", "--format awq", "accepted 4", "Fix: --bits 4, or --format gptq")),
    "awq sym": (options("awq", sym=True), ("--sym is not possible with --format awq", "Fix: leave it out")),
    "awq desc_act": (options("awq", desc_act=True), ("--desc-act is not possible with --format awq",)),
    "gptq 5": (options("gptq", bits=5), ("--bits 5", "accepted 2, 3, 4, 8")),
    "gptq group": (options("gptq", group_size=0), ("--group-size 0", "-1 (one group per row)")),
    "hqq 6": (options("hqq", bits=6), ("--bits 6", "accepted 1, 2, 3, 4, 8", "5 and 6 bits in 8")),
    "fp8 4": (options("fp8", bits=4), ("--bits 4", "accepted 8")),
    "fp8 group": (options("fp8", group_size=64), ("--group-size 64 is not possible", "the whole tensor")),
    "fp8 asym": (options("fp8-block", sym=False), ("--asym is not possible", "tiles of 128 x 128")),
    "fp8 row": (options("fp8-channel", group_size=32), ("--group-size 32", "cover a row")),
    "nf4 block": (options("nf4", group_size=48), ("--group-size 48", "32, 64, 128", "Fix: one of those")),
    "nf4 8": (options("nf4-dq", bits=8), ("--bits 8", "accepted 4")),
}


@pytest.mark.parametrize("case", ASKING)
def test_what_cannot_be_asked_for(case: str) -> None:
    run, fragments = ASKING[case]
    with pytest.raises(UserError) as caught:
        run()
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("fmt", "spec", "shape", "fragments"),
    [
        (
            gptq,
            "affine4.g128.sym",
            (64, 192),
            ("group_size 128 does not divide in_features 192", "--group-size 64 or 32 or 16"),
        ),
        (gptq, "affine3.g32.sym", (64, 40), ("in_features 40 is not a multiple of 32", "--format hqq or nf4")),
        (gptq, "affine4.g32.sym", (60, 64), ("out_features 60 is not a multiple of 8",)),
        (awq, "affine4.g32.asym", (60, 64), ("out_features 60 is not a multiple of 8", "Fix: --skip")),
        (awq, "affine4.g64.asym", (64, 96), ("group_size 64 does not divide in_features 96", "--group-size 32")),
        (awq, "affine8.g64.asym", (64, 64), ("8 bits: AWQ holds 4 bits only", "Fix: 4 bits")),
        (hqq, "affine4.g64.zf16", (5, 7), ("group_size 64 does not divide the 5 x 7 weight", "--group-size")),
        (hqq, "affine4.g32.zf16", (3, 32), ("3 rows of groups are no multiple of 2", "smaller --group-size")),
        (hqq, "affine5.g32.zf16", (32, 32), ("5 bits: HQQ holds 1, 2, 3, 4, 8",)),
        (hqq, "affine4.g64.zf16", (64, 172), ("groups of 64 straddle rows of 172 inputs", "shaped")),
        (nf4, "codebook4.nf4.g48.f32", (64, 96), ("group_size 48", "32, 64, 128")),
        (nf4, "affine3.g64.asym", (64, 64), ("3 bits: bitsandbytes tables have 4",)),
        (nf4, "codebook4.nf4.g64.f32", (64, 172), ("groups of 64 straddle rows of 172 inputs", "shaped")),
        (fp8, "minifloat8.e4m3.g64x64.f32", (64, 64), ("no FP8 spec", "128 x 128", "Fix: drop the rule")),
        (fbgemm_fp8, "minifloat8.e4m3.tensor.f32", (64, 64), ("no FBGEMM FP8 spec", "one scale per row")),
    ],
)
def test_shapes_that_cannot_be_stored(fmt: Any, spec: str, shape: tuple[int, int], fragments: tuple[str, ...]) -> None:
    """`check` says why before anything is computed."""
    problem = fmt.check(Spec.parse(spec), shape)
    for fragment in fragments:
        assert fragment in problem
