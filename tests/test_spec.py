"""Spec strings: they parse back, and a wrong one says what is accepted."""

import random
import re
from collections.abc import Callable

import pytest
from bitsmith.errors import UserError
from bitsmith.kernels.spec import GRIDS, SCALES, STATE_VALUES, TABLES, ZEROS, Spec
from hypothesis import assume, given, settings
from hypothesis import strategies as st

# family, bits, table, weights a code, codes a vector
KINDS = (
    [("affine", b, "", 1, 1) for b in range(1, 9)]
    + [(kind, b, name, 1, 1) for name, (kind, b) in TABLES.items()]
    + [("codebook", code.bits, name, 8, 1) for name, code in GRIDS.items()]
    + [("codebook", b, "", 1, 1) for b in (2, 16)]
    + [("codebook", 16, "", 8, 1), ("codebook", 8, "", 8, 2), ("codebook", 12, "", 4, 2), ("codebook", 4, "", 2, 8)]
)
STEPS = st.tuples(
    st.sampled_from([(), ("inscale",)]), st.sampled_from([(), ("perm",)]), st.sampled_from([(), ("had128",), ("had2",)])
).map(lambda steps: sum(steps, ()))
POST_STEPS = st.sampled_from([(), ("outhad128",), ("outscale",), ("outhad4096", "outscale")])


@given(
    kind=st.sampled_from(KINDS),
    group=st.one_of(st.just(-1), st.integers(1, 4096)),
    rows=st.sampled_from([1, -1, 2, 128]),
    scale=st.one_of(
        st.sampled_from(SCALES),
        st.builds(
            "{}:{}:{}".format,
            st.sampled_from(["u3", "u4", "u6", "u8", "s4", "s6", "s8"]),
            st.sampled_from(["f16", "bf16", "f32"]),
            st.integers(1, 999),
        ),
    ),
    zero=st.sampled_from(ZEROS),
    view=st.sampled_from(["", "flat", "axis0"]),
    pre=STEPS,
    post=POST_STEPS,
    act=st.sampled_from(["", "a8"]),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=300, deadline=None)
def test_spec_prints_and_parses(
    kind: tuple[str, int, str, int, int],
    group: int,
    rows: int,
    scale: str,
    zero: str,
    view: str,
    pre: tuple[str, ...],
    post: tuple[str, ...],
    act: str,
    shuffle: random.Random,
) -> None:
    name, width, table, vec, books = kind
    assume(table != "iq1s" or scale not in SCALES)
    if view and any("had" in step for step in (*pre, *post)):
        view = ""
    spec = Spec(name, width, group, rows, scale, zero, table, view, pre, act, vec, books, post)
    check_round_trip(spec, shuffle)


@given(
    spec=st.builds(
        Spec, st.just("trellis"), st.integers(1, 8), table=st.sampled_from(STATE_VALUES), pre=STEPS, post=POST_STEPS
    ),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=50, deadline=None)
def test_trellis_prints_and_parses(spec: Spec, shuffle: random.Random) -> None:
    check_round_trip(spec, shuffle)


def check_round_trip(spec: Spec, shuffle: random.Random) -> None:
    assert Spec.parse(str(spec)) == spec
    head, *tokens = str(spec).split(".")
    shuffle.shuffle(tokens)
    assert Spec.parse(".".join([head, *tokens])) == spec


def test_spec_examples() -> None:
    """The strings of the documentation."""
    assert Spec.parse("affine4.g128.asym") == Spec("affine", 4, 128, zero="asym")
    assert Spec.parse("affine8.channel.sym") == Spec("affine", 8, zero="sym")
    assert Spec.parse("affine4.g64.zf16.f16") == Spec("affine", 4, 64, zero="zf16")
    assert Spec.parse("minifloat8.e4m3.g128x128.f32") == Spec("minifloat", 8, 128, 128, "f32", table="e4m3")
    assert Spec.parse("minifloat8.e4m3.tensor").rows == -1
    nf4 = Spec.parse("codebook4.nf4.g64.u8:f32:256")
    q6k = Spec.parse("affine6.g16.sym.s8:f16:16")
    assert q6k.two_level == ("f16", 16) and (q6k.scale_code, nf4.scale_code) == ((8, 128), (8, 0))
    assert Spec.parse("affine4.g32.min.u6:f16:8") == Spec("affine", 4, 32, scale="u6:f16:8", zero="min")
    assert Spec.parse("minifloat4.e2m1.g16.ue4m3") == Spec("minifloat", 4, 16, scale="ue4m3", table="e2m1")
    iq3s = Spec.parse("codebook26.iq3s.v8.g32.u4:f16:8")
    assert iq3s == Spec("codebook", 26, 32, scale="u4:f16:8", table="iq3s", vec=8) and iq3s.width == 26
    assert nf4.two_level == ("f32", 256) and Spec.parse("affine4.g32").two_level is None
    nvfp4 = Spec("minifloat", 4, 16, scale="ue4m3", table="e2m1", act="a4")
    assert Spec.parse("minifloat4.e2m1.g16.ue4m3.a4") == nvfp4 and str(nvfp4).endswith(".ue4m3.a4")
    assert str(Spec.parse("affine4.g128.sym.perm").without_perm()) == "affine4.g128.sym"
    aqlm = Spec.parse("codebook8.v8.x2.channel")
    assert aqlm == Spec("codebook", 8, vec=8, books=2) and aqlm.width == 16
    assert Spec.parse("codebook4.rowtable.channel") == Spec("codebook", 4, table="rowtable")
    exl3 = Spec.parse("trellis3.mcg.inscale.had128.outhad128.outscale")
    assert exl3 == Spec("trellis", 3, table="mcg", pre=("inscale", "had128"), post=("outhad128", "outscale"))
    assert (exl3.in_block, exl3.out_block) == (128, 128) and str(exl3.without_steps()) == "trellis3.mcg"


MESSAGES = {
    "x4.g32": "spec 'x4.g32': unknown family 'x'; accepted: affine, minifloat, codebook, trellis",
    "affine9.g32": "spec 'affine9.g32': bits is 9; accepted: 1 to 8",
    "affine4.g0": "spec 'affine4.g0': group is 0; accepted: -1 (whole row) or a positive number",
    "affine4.g0x32": "rows is 0; accepted: -1 (all rows) or a positive number",
    "affine4.g32.g64": "spec 'affine4.g32.g64': 'g64' sets group a second time; leave one of the two out",
    "affine4.q8": "spec 'affine4.q8': token 'q8' is none of the values of family, bits, group, rows, scale",
    "four.g32": "spec 'four.g32': must begin with a family and its bits, as in affine4; families: affine, minifloat",
    "affine4.nf4.g32": "table 'nf4' does not fit affine4; accepted: none",
    "minifloat8.g32": "table '' does not fit minifloat8; accepted: e4m3, e5m2",
    "codebook4.e4m3.g32": "table 'e4m3' does not fit codebook4; accepted: nf4, fp4, iq4nl, rowtable",
    "codebook17.channel": "bits is 17; accepted: 1 to 16",
    "codebook17.iq2s.v8.g16": "table 'iq2s' does not fit codebook17; accepted: rowtable",
    "codebook18.iq2s.g16": "table 'iq2s' does not fit codebook18; accepted: rowtable",
    "codebook11.iq1s.v8.g32": "iq1s has the shift of a group in the code of its scale; accepted: two levels, as u4:f16:8",
    "codebook8.v3.channel": "1 codes for 3 weights; accepted: v2, v4 or v8 weights and x2 or more codes",
    "codebook8.x2.channel": "several weights a code (v8) are of the codebook family, several codes (x2) of such vectors",
    "affine8.v8.channel": "several weights a code (v8) are of the codebook family",
    "codebook16.v8.x3.channel": "3 codes of 16 bits for one vector; accepted: 32 bits in all",
    "codebook4.v2.nf4.channel": "table 'nf4' does not fit codebook4; accepted: rowtable",
    "codebook12.rowtable.channel": "a rowtable is one of 1 to 8 bits of the codebook family, one weight a code, with no view",
    "trellis3": "table '' does not fit trellis3; accepted: 3inst, mcg, mul1",
    "trellis3.mcg.g32": "a trellis has no groups, scales or zero points; accepted: its table, input and output steps",
    "affine4.g32.had": "unknown input step 'had'; accepted: inscale, perm, had128",
    "affine4.g32.had96": "'had96' has a block of 96; accepted: a power of two from 2 to 32768",
    "affine4.g32.outhad1": "'outhad1' has a block of 1; accepted: a power of two from 2 to 32768",
    "affine4.g32.had64.had128": "input steps are had64, had128; accepted: each once, in the order inscale, perm, had128",
    "affine4.g32.a4": "a4 activations meet weights of minifloat4.e2m1.g16.ue4m3 only; accepted: a8 or none",
    "minifloat4.e2m1.g32.e8m0.a4": "a4 activations meet weights of minifloat4.e2m1.g16.ue4m3 only",
    "minifloat4.e2m1.g16.ue4m3.a8.a4": "'a4' sets act a second time",
    "affine4.g32.flat.had128": "a Hadamard transform around a flat view; accepted: no view",
}


@pytest.mark.parametrize("text", MESSAGES)
def test_spec_messages(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(MESSAGES[text])):
        Spec.parse(text)


FIELD_MESSAGES: dict[str, tuple[Callable[[], Spec], str]] = {
    "scale": (
        lambda: Spec("affine", 4, scale="f64"),
        "unknown scale storage 'f64'; accepted: f16, bf16, f32, e8m0, ue4m3 or two levels, as u8:f32:256",
    ),
    "zero": (
        lambda: Spec("affine", 4, zero="z"),
        "unknown zero point 'z'; accepted: none, sym, one, asym, zf16, zbf16, zf32, min",
    ),
    "view": (lambda: Spec("affine", 4, view="axis2"), "unknown view 'axis2'; accepted: flat, axis0 or none"),
    "pre": (lambda: Spec("affine", 4, pre=("rotate",)), "unknown input step 'rotate'; accepted: inscale, perm, had128"),
    "post": (
        lambda: Spec("affine", 4, post=("had128",)),
        "unknown output step 'had128'; accepted: outhad128, outscale",
    ),
    "order": (
        lambda: Spec("affine", 4, pre=("had128", "inscale")),
        "input steps are had128, inscale; accepted: each once, in the order inscale, perm, had128",
    ),
    "act": (lambda: Spec("affine", 8, act="a6"), "unknown activation quantization 'a6'; accepted: a8, a4 or none"),
}


@pytest.mark.parametrize("field", FIELD_MESSAGES)
def test_spec_field_messages(field: str) -> None:
    make, message = FIELD_MESSAGES[field]
    with pytest.raises(UserError, match=re.escape(message)):
        make()
