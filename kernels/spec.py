"""Spec: everything a kernel, a quantizer or a reader has to know about how one weight is stored.

A spec prints to a short string and parses back, goes verbatim into config.json and results, and is hashable so that a
kernel can take it as one `tl.constexpr`. Grammar (tokens after the first may come in any order, defaults are not
printed):

    affine4.g128.asym            4-bit integers, 128 inputs a scale (f16), integer zero point
    affine8.channel.sym          one scale per output row, zero point fixed at 2**(bits-1)
    affine4.g64.zf16.f16         floating zero point kept in f16 (HQQ)
    affine4.g128.sym.perm        columns sorted by group before packing (GPTQ desc_act)
    minifloat8.e4m3.g128x128.f32 FP8, one f32 scale per 128 x 128 tile
    codebook4.nf4.g64.u8:f32:256 NF4, 8-bit block scales, one f32 super scale per 256 of them (double quantization)
"""

import re
from dataclasses import dataclass, fields, replace

from ..errors import UserError

FAMILIES = ("affine", "minifloat", "codebook", "trellis")
SCALES = ("f16", "bf16", "f32", "e8m0")
ZEROS = ("none", "sym", "asym", "zf16", "zbf16", "zf32")
VIEWS = ("", "flat", "axis0")
PRES = ("perm",)
ACTS = ("", "a8")
_TWO_LEVEL = re.compile(r"u8:(f16|f32):(\d+)")
_GROUP = re.compile(r"g(?:(\d+|all)x)?(\d+|all)")


@dataclass(frozen=True)
class Spec:
    """How one weight matrix [out_features, in_features] is stored. Set by a dialect or a recipe, never changed."""

    family: str
    bits: int
    # Inputs that share one scale along a row; -1 = the whole row.
    group: int = -1
    # Output rows that share one scale; 1 = each its own, 128 = tiles of 128 rows (FP8 block), -1 = all.
    rows: int = 1
    # Storage of the scale: f16 | bf16 | f32 | e8m0, or two levels: "u8:f32:256".
    scale: str = "f16"
    # none | sym (fixed 2**(bits-1)) | asym (integer) | zf16, zbf16, zf32 (floating).
    zero: str = "none"
    # Meaning of a code where it is not an integer: e4m3, e5m2 (minifloat), nf4, fp4 (codebook).
    table: str = ""
    # How the weight is laid out as the [R, C] matrix whose rows are grouped:
    #   ""      the weight itself, [N, K]
    #   "flat"  consecutive elements of the row-major weight, [N*K/group, group]: groups may straddle rows
    #   "axis0" columns of weight.reshape(group, -1), transposed: [N*K/group, group] (HQQ axis 0)
    view: str = ""
    # Steps applied to the input before the product, part names given: "perm".
    pre: tuple[str, ...] = ()
    # Activation quantization: "" = none, "a8" = int8 per token.
    act: str = ""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise UserError(f"spec {self._text()!r}: {problem}")

    def _problem(self) -> str:
        if self.family not in FAMILIES:
            return f"unknown family {self.family!r}; accepted: {', '.join(FAMILIES)}"
        if not 1 <= self.bits <= 8:
            return f"bits is {self.bits}; accepted: 1 to 8"
        if self.group != -1 and self.group < 1:
            return f"group is {self.group}; accepted: -1 (whole row) or a positive number"
        if self.rows != -1 and self.rows < 1:
            return f"rows is {self.rows}; accepted: -1 (all rows) or a positive number"
        if self.scale not in SCALES and not _TWO_LEVEL.fullmatch(self.scale):
            return f"unknown scale storage {self.scale!r}; accepted: {', '.join(SCALES)} or u8:f32:256"
        if self.zero not in ZEROS:
            return f"unknown zero point {self.zero!r}; accepted: {', '.join(ZEROS)}"
        if self.view not in VIEWS:
            return f"unknown view {self.view!r}; accepted: flat, axis0 or none"
        if unknown := [p for p in self.pre if p not in PRES]:
            return f"unknown input step {unknown[0]!r}; accepted: {', '.join(PRES)}"
        if self.act not in ACTS:
            return f"unknown activation quantization {self.act!r}; accepted: a8 or none"
        tables = [name for name, kind in TABLES.items() if kind == (self.family, self.bits)]
        if self.table not in (tables or [""]) and self.family != "trellis":
            return (
                f"table {self.table!r} does not fit {self.family}{self.bits}; accepted: {', '.join(tables) or 'none'}"
            )
        return ""

    @property
    def two_level(self) -> tuple[str, int] | None:
        """(dtype of the super scale, scales per super scale), or None where the scale has one level."""
        match = _TWO_LEVEL.fullmatch(self.scale)
        return (match[1], int(match[2])) if match else None

    def without_perm(self) -> "Spec":
        """The same storage with columns in their own order."""
        return replace(self, pre=tuple(p for p in self.pre if p != "perm"))

    def _text(self) -> str:
        group = "channel" if self.group == -1 else f"g{self.group}"
        if self.rows != 1:
            rows = "all" if self.rows == -1 else str(self.rows)
            columns = "all" if self.group == -1 else str(self.group)
            group = "tensor" if (self.rows, self.group) == (-1, -1) else f"g{rows}x{columns}"
        parts = [f"{self.family}{self.bits}", self.table, group]
        parts += [self.zero if self.zero != "none" else "", self.scale if self.scale != "f16" else ""]
        return ".".join(p for p in (*parts, self.view, *self.pre, self.act) if p)

    def __str__(self) -> str:
        return self._text()

    @staticmethod
    def parse(text: str) -> "Spec":
        """The inverse of `str(spec)`. Raises UserError naming the token it does not know."""
        head, *tokens = text.split(".")
        match = re.fullmatch(r"([a-z]+)(\d)", head)
        if not match:
            raise UserError(
                f"spec {text!r}: must begin with a family and its bits, as in affine4; families: {FAMILIES}"
            )
        found: dict[str, object] = {"family": match[1], "bits": int(match[2])}
        pre: list[str] = []
        for token in tokens:
            if token in PRES:
                pre.append(token)
                continue
            fresh = _token(token, text)
            if twice := fresh.keys() & found.keys():
                raise UserError(f"spec {text!r}: {token!r} sets {min(twice)} a second time; leave one of the two out")
            found.update(fresh)
        return Spec(**found, pre=tuple(pre))  # type: ignore[arg-type]


def _token(token: str, text: str) -> dict[str, object]:
    if token == "channel":
        return {"group": -1}
    if token == "tensor":
        return {"group": -1, "rows": -1}
    if match := _GROUP.fullmatch(token):
        rows = {None: 1, "all": -1}.get(match[1]) or int(match[1])
        return {"group": -1 if match[2] == "all" else int(match[2]), "rows": rows}
    for field, accepted in (("zero", ZEROS), ("scale", SCALES), ("view", VIEWS), ("act", ACTS)):
        if token in accepted:
            return {field: token}
    if _TWO_LEVEL.fullmatch(token):
        return {"scale": token}
    if token in TABLES:
        return {"table": token}
    known = [f.name for f in fields(Spec)]
    raise UserError(f"spec {text!r}: token {token!r} is none of the values of {', '.join(known)}")


# name -> (family, bits); the values themselves live with their family.
TABLES = {"e4m3": ("minifloat", 8), "e5m2": ("minifloat", 8), "nf4": ("codebook", 4), "fp4": ("codebook", 4)}
