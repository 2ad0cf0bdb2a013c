"""Spec strings: they parse back, and a wrong one says what is accepted."""

import random
import re
from collections.abc import Callable

import pytest
from bitsmith.errors import UserError
from bitsmith.kernels.spec import SCALES, TABLES, ZEROS, Spec
from hypothesis import given, settings
from hypothesis import strategies as st

KINDS = (
    [("affine", b, "") for b in range(1, 9)]
    + [(kind, b, name) for name, (kind, b) in TABLES.items()]
    + [("trellis", 3, "")]
)


@given(
    kind=st.sampled_from(KINDS),
    group=st.one_of(st.just(-1), st.integers(1, 4096)),
    rows=st.sampled_from([1, -1, 2, 128]),
    scale=st.one_of(
        st.sampled_from(SCALES), st.builds("u8:{}:{}".format, st.sampled_from(["f16", "f32"]), st.integers(1, 999))
    ),
    zero=st.sampled_from(ZEROS),
    view=st.sampled_from(["", "flat", "axis0"]),
    pre=st.sampled_from([(), ("perm",)]),
    act=st.sampled_from(["", "a8"]),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=300, deadline=None)
def test_spec_prints_and_parses(
    kind: tuple[str, int, str],
    group: int,
    rows: int,
    scale: str,
    zero: str,
    view: str,
    pre: tuple[str, ...],
    act: str,
    shuffle: random.Random,
) -> None:
    name, width, table = kind
    spec = Spec(name, width, group, rows, scale, zero, table, view, pre, act)
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
    assert nf4.two_level == ("f32", 256) and Spec.parse("affine4.g32").two_level is None
    assert str(Spec.parse("affine4.g128.sym.perm").without_perm()) == "affine4.g128.sym"


MESSAGES = {
    "x4.g32": "spec 'x4.g32': unknown family 'x'; accepted: affine, minifloat, codebook, trellis",
    "affine9.g32": "spec 'affine9.g32': bits is 9; accepted: 1 to 8",
    "affine4.g0": "spec 'affine4.g0': group is 0; accepted: -1 (whole row) or a positive number",
    "affine4.g0x32": "rows is 0; accepted: -1 (all rows) or a positive number",
    "affine4.g32.g64": "spec 'affine4.g32.g64': 'g64' sets group a second time; leave one of the two out",
    "affine4.q8": "spec 'affine4.q8': token 'q8' is none of the values of family, bits, group, rows, scale",
    "four.g32": "spec 'four.g32': must begin with a family and its bits, as in affine4; families:",
    "affine4.nf4.g32": "table 'nf4' does not fit affine4; accepted: none",
    "minifloat8.g32": "table '' does not fit minifloat8; accepted: e4m3, e5m2",
    "codebook4.e4m3.g32": "table 'e4m3' does not fit codebook4; accepted: nf4, fp4",
}


@pytest.mark.parametrize("text", MESSAGES)
def test_spec_messages(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(MESSAGES[text])):
        Spec.parse(text)


FIELD_MESSAGES: dict[str, tuple[Callable[[], Spec], str]] = {
    "scale": (
        lambda: Spec("affine", 4, scale="f64"),
        "unknown scale storage 'f64'; accepted: f16, bf16, f32, e8m0 or u8:f32:256",
    ),
    "zero": (
        lambda: Spec("affine", 4, zero="z"),
        "unknown zero point 'z'; accepted: none, sym, asym, zf16, zbf16, zf32",
    ),
    "view": (lambda: Spec("affine", 4, view="axis2"), "unknown view 'axis2'; accepted: flat, axis0 or none"),
    "pre": (lambda: Spec("affine", 4, pre=("rotate",)), "unknown input step 'rotate'; accepted: perm"),
    "act": (lambda: Spec("affine", 8, act="a4"), "unknown activation quantization 'a4'; accepted: a8 or none"),
}


@pytest.mark.parametrize("field", FIELD_MESSAGES)
def test_spec_field_messages(field: str) -> None:
    make, message = FIELD_MESSAGES[field]
    with pytest.raises(UserError, match=re.escape(message)):
        make()
