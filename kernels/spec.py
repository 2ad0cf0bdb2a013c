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
    codebook4.rowtable.channel   a table of 16 values for each output row (SqueezeLLM)
    affine4.g32.min.u6:f16:8     weight = code * scale + min; scales and mins are 6-bit codes, one f16 super scale and
                                 one f16 super min per 8 of them (GGUF Q4_K)
    minifloat4.e2m1.g16.ue4m3    FP4, one E4M3 scale per 16 weights (NVFP4); .a4: of such activations (NVFP4 W4A4)
    codebook4.iq4nl.g32          a named table that never travels with a tensor (GGUF IQ4_NL)
    codebook15.iq2xxs.v8.g32.u4:f16:8  a named grid: one code for 8 weights, its index and signs (GGUF IQ2_XXS)
    codebook8.v8.x2.channel      two 8-bit codes per 8 weights, each the row of a table; the rows are added (AQLM 2x8)
    trellis3.mcg.inscale.had128.outhad128.outscale
                                 EXL3: no scales of its own; vectors and Hadamard transforms on both sides
"""

import re
from dataclasses import dataclass, fields, replace

from ..errors import UserError

# family -> the most bits a code has
FAMILIES = {"affine": 8, "minifloat": 8, "codebook": 16, "trellis": 8}
SCALES = ("f16", "bf16", "f32", "e8m0", "ue4m3")
ZEROS = ("none", "sym", "one", "asym", "zf16", "zbf16", "zf32", "min")
VIEWS = ("", "flat", "axis0")
ACTS = ("", "a8", "a4")
VECS = (1, 2, 4, 8)
# Steps around the product, each side in the order they are applied. kernels/transform.py says what they do.
PRES = ("inscale", "perm", "had")
POSTS = ("outhad", "outscale")
# name -> (family, bits); the values themselves live with their family.
TABLES = {
    "e4m3": ("minifloat", 8),
    "e5m2": ("minifloat", 8),
    "e2m1": ("minifloat", 4),
    "nf4": ("codebook", 4),
    "fp4": ("codebook", 4),
    "iq4nl": ("codebook", 4),
    "sign": ("codebook", 1),
}


@dataclass(frozen=True)
class GridCode:
    """How a code of a named grid, which stands for 8 weights, is read, lowest bits first (kernels/grids.py)."""

    # Of one index: into vectors of 8 where a code has one index, of 4 where it has two.
    index_bits: int
    indices: int
    # Sign bits: 8, 7, or 0 where there is a shift bit instead.
    signs: int
    # The codes of two-level scales stand for (code + 1/2) * factor.
    factor: float
    # Whether the shift bit is one of a group: the highest of its scale's code.
    group_shift: bool = False

    @property
    def bits(self) -> int:
        return self.index_bits * self.indices + (self.signs or int(not self.group_shift))


# Codebook: named grids of vectors, whose codes hold indices and signs.
GRIDS = {
    "iq2xxs": GridCode(8, 1, 7, 0.25),
    "iq2xs": GridCode(9, 1, 7, 0.25),
    "iq2s": GridCode(10, 1, 8, 0.25),
    "iq3xxs": GridCode(8, 2, 7, 0.5),
    "iq3s": GridCode(9, 2, 8, 2.0),
    "iq1s": GridCode(11, 1, 0, 2.0, group_shift=True),
    "iq1m": GridCode(11, 1, 0, 2.0),
}
# Codebook: a table for every output row, of any width up to 8 bits.
ROW_TABLE = "rowtable"
# Trellis: the functions from a 16-bit state to a value, of any width.
STATE_VALUES = ("3inst", "mcg", "mul1")
# Bits of the codes of all books of one vector: what an int32 holds.
_WIDEST = 32
_BLOCKS = [1 << i for i in range(1, 16)]
_TWO_LEVEL = re.compile(r"([us])([3468]):(f16|bf16|f32):(\d+)")
_GROUP = re.compile(r"g(?:(\d+|all)x)?(\d+|all)")
_VEC = re.compile(r"v(\d+)")
_BOOKS = re.compile(r"x(\d+)")
_HEAD = re.compile(r"([a-z]+)(\d{1,2})")
_HADAMARD = re.compile(r"(?:out)?had\d+")


@dataclass(frozen=True)
class Spec:
    """How one weight matrix [out_features, in_features] is stored. Set by a dialect or a recipe, never changed."""

    family: str
    bits: int
    # Inputs that share one scale along a row; -1 = the whole row.
    group: int = -1
    # Output rows that share one scale; 1 = each its own, 128 = tiles of 128 rows (FP8 block), -1 = all.
    rows: int = 1
    # Storage of the scale: f16 | bf16 | f32 | e8m0 | ue4m3 (E4M3 of numbers >= 0), or two levels "u6:f16:8": the code's
    # type and bits (u: as it is, s: less 2**(bits-1)), the super scale's storage, scales per super scale.
    scale: str = "f16"
    # none | sym (fixed 2**(bits-1)) | one (fixed 1) | asym (integer) | zf16, zbf16, zf32 (floating) | min (no zero
    # point: a number stored like the scale is added to code * scale).
    zero: str = "none"
    # Meaning of a code where it is not an integer: e4m3, e5m2, e2m1 (minifloat); nf4, fp4, iq4nl, sign, rowtable, one
    # of GRIDS, or "" for one table that comes with the tensor (codebook); 3inst, mcg, mul1 (trellis).
    table: str = ""
    # How the weight is laid out as the [R, C] matrix whose rows are grouped:
    #   ""      the weight itself, [N, K]
    #   "flat"  consecutive elements of the row-major weight, [N*K/group, group]: groups may straddle rows
    #   "axis0" columns of weight.reshape(group, -1), transposed: [N*K/group, group] (HQQ axis 0)
    view: str = ""
    # Steps applied to the input before the product, in the order of PRES: "inscale", "perm", "had128".
    pre: tuple[str, ...] = ()
    # Activation quantization (activation.py): "" = none, "a8" = 8 bits: int8 per token, FP8 where weights are, "a4" =
    # FP4 with scales as the weight's (NVFP4).
    act: str = ""
    # Consecutive inputs one code stands for (codebook).
    vec: int = 1
    # Tables whose entries are added, each with its own code (codebook).
    books: int = 1
    # Steps applied to the product, in the order of POSTS: "outhad128", "outscale".
    post: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problem = self._problem() or self._step_problem()
        if problem:
            raise UserError(f"spec {self._text()!r}: {problem}")

    def _problem(self) -> str:
        if self.family not in FAMILIES:
            return f"unknown family {self.family!r}; accepted: {', '.join(FAMILIES)}"
        if not 1 <= self.bits <= FAMILIES[self.family] and self.table not in GRIDS:
            return f"bits is {self.bits}; accepted: 1 to {FAMILIES[self.family]}"
        if self.group != -1 and self.group < 1:
            return f"group is {self.group}; accepted: -1 (whole row) or a positive number"
        if self.rows != -1 and self.rows < 1:
            return f"rows is {self.rows}; accepted: -1 (all rows) or a positive number"
        if self.scale not in SCALES and not _TWO_LEVEL.fullmatch(self.scale):
            return f"unknown scale storage {self.scale!r}; accepted: {', '.join(SCALES)} or two levels, as u8:f32:256"
        if self.zero not in ZEROS:
            return f"unknown zero point {self.zero!r}; accepted: {', '.join(ZEROS)}"
        if self.view not in VIEWS:
            return f"unknown view {self.view!r}; accepted: flat, axis0 or none"
        if self.act not in ACTS:
            return f"unknown activation quantization {self.act!r}; accepted: a8, a4 or none"
        if self.act == "a4" and not self.takes_a4:
            return "a4 activations meet weights of minifloat4.e2m1.g16.ue4m3 only; accepted: a8 or none"
        return self._code_problem()

    def _code_problem(self) -> str:
        """What a code means: its table, its vector and its books."""
        if self.vec not in VECS or self.books < 1:
            return f"{self.books} codes for {self.vec} weights; accepted: v2, v4 or v8 weights and x2 or more codes"
        if (self.vec > 1 and self.family != "codebook") or (self.books > 1 and self.vec == 1):
            return "several weights a code (v8) are of the codebook family, several codes (x2) of such vectors"
        if self.width > _WIDEST:
            return f"{self.books} codes of {self.bits} bits for one vector; accepted: {_WIDEST} bits in all"
        if self.family == "trellis" and (self.group, self.rows, self.scale, self.zero, self.view) != _UNSCALED:
            return "a trellis has no groups, scales or zero points; accepted: its table, input and output steps"
        if self.table == ROW_TABLE and (self.family != "codebook" or self.bits > 8 or self.vec > 1 or self.view):
            return "a rowtable is one of 1 to 8 bits of the codebook family, one weight a code, with no view"
        accepted = [name for name, kind in TABLES.items() if kind == (self.family, self.bits) and self.vec == 1]
        if self.family == "codebook":
            if (self.vec, self.books) == (8, 1):
                accepted += [name for name, code in GRIDS.items() if code.bits == self.bits]
            accepted += [ROW_TABLE, ""]
        elif self.family == "trellis":
            accepted += STATE_VALUES
        if self.table not in (accepted or [""]):
            names = [name for name in accepted if name]
            return f"table {self.table!r} does not fit {self.family}{self.bits}; accepted: {', '.join(names) or 'none'}"
        if self.group_shift and self.two_level is None:
            return f"{self.table} has the shift of a group in the code of its scale; accepted: two levels, as u4:f16:8"
        return ""

    def _step_problem(self) -> str:
        for side, steps, known in (("input", self.pre, PRES), ("output", self.post, POSTS)):
            names = ", ".join(f"{name}128" if name.endswith("had") else name for name in known)
            for step in steps:
                block = step.removeprefix(_kind(step))
                if _kind(step) not in known or bool(block) != _kind(step).endswith("had"):
                    return f"unknown {side} step {step!r}; accepted: {names}"
                if block and int(block) not in _BLOCKS:
                    return f"{step!r} has a block of {block}; accepted: a power of two from 2 to {_BLOCKS[-1]}"
            places = [known.index(_kind(step)) for step in steps]
            if places != sorted(set(places)):
                return f"{side} steps are {', '.join(steps)}; accepted: each once, in the order {names}"
        if self.view and (self.in_block, self.out_block) != (1, 1):
            return f"a Hadamard transform around a {self.view} view; accepted: no view"
        return ""

    @property
    def takes_a4(self) -> bool:
        """Whether the weight is of the numbers and scales that `a4` makes of activations."""
        return (self.table, self.group, self.rows, self.scale) == ("e2m1", 16, 1, "ue4m3")

    @property
    def two_level(self) -> tuple[str, int] | None:
        """(dtype of the super scale, scales per super scale), or None where the scale has one level."""
        match = _TWO_LEVEL.fullmatch(self.scale)
        return (match[3], int(match[4])) if match else None

    @property
    def scale_code(self) -> tuple[int, int]:
        """(bits, what is subtracted) of the codes of a two-level scale; those of its mins are never less than 0."""
        match = _TWO_LEVEL.fullmatch(self.scale)
        assert match, self.scale
        return int(match[2]), 1 << (int(match[2]) - 1) if match[1] == "s" else 0

    @property
    def scale_levels(self) -> int:
        """Different numbers the code of a two-level scale can be: its low bits where the highest is a group's shift."""
        return 1 << (self.scale_code[0] - self.group_shift)

    @property
    def group_shift(self) -> bool:
        """Whether the highest bit of a scale's code is the shift of its group."""
        return self.grid_code is not None and self.grid_code.group_shift

    @property
    def grid_code(self) -> GridCode | None:
        """How codes of the spec's named grid are read, or None where its table is none."""
        return GRIDS.get(self.table)

    @property
    def width(self) -> int:
        """Bits of one stored code: those of all books of a vector together, book 0 lowest."""
        return self.bits * self.books

    @property
    def in_block(self) -> int:
        """Inputs are padded to a multiple of this: the block of the input Hadamard transform, or 1."""
        return _block(self.pre)

    @property
    def out_block(self) -> int:
        """Outputs are padded to a multiple of this: the block of the output Hadamard transform, or 1."""
        return _block(self.post)

    def without_perm(self) -> "Spec":
        """The same storage with columns in their own order."""
        return replace(self, pre=tuple(p for p in self.pre if p != "perm"))

    def without_steps(self) -> "Spec":
        """The same storage with nothing around the product, activations as they are."""
        return replace(self, pre=(), post=(), act="")

    def as_compiled(self) -> "Spec":
        """What device kernels are compiled for: the same codes and scales, without view, steps or activation."""
        return replace(self.without_steps(), view="")

    def _text(self) -> str:
        group = "channel" if self.group == -1 else f"g{self.group}"
        if self.rows != 1:
            rows = "all" if self.rows == -1 else str(self.rows)
            columns = "all" if self.group == -1 else str(self.group)
            group = "tensor" if (self.rows, self.group) == (-1, -1) else f"g{rows}x{columns}"
        elif self.family == "trellis" and self.group == -1:
            group = ""
        parts = [f"{self.family}{self.bits}", self.table]
        parts += [f"v{self.vec}" if self.vec != 1 else "", f"x{self.books}" if self.books != 1 else "", group]
        parts += [self.zero if self.zero != "none" else "", self.scale if self.scale != "f16" else ""]
        return ".".join(p for p in (*parts, self.view, *self.pre, *self.post, self.act) if p)

    def __str__(self) -> str:
        return self._text()

    @staticmethod
    def parse(text: str) -> "Spec":
        """The inverse of `str(spec)`. Raises UserError naming the token it does not know."""
        head, *tokens = text.split(".")
        match = _HEAD.fullmatch(head)
        if not match:
            raise UserError(
                f"spec {text!r}: must begin with a family and its bits, as in affine4; families: {', '.join(FAMILIES)}"
            )
        found: dict[str, object] = {"family": match[1], "bits": int(match[2])}
        steps: list[str] = []
        for token in tokens:
            if token in (*PRES, *POSTS) or _HADAMARD.fullmatch(token):
                steps.append(token)
                continue
            fresh = _token(token, text)
            if twice := fresh.keys() & found.keys():
                raise UserError(f"spec {text!r}: {token!r} sets {min(twice)} a second time; leave one of the two out")
            found.update(fresh)
        return Spec(**found, pre=_in_order(steps, PRES), post=_in_order(steps, POSTS))  # type: ignore[arg-type]


# group, rows, scale, zero and view of a spec without them.
_UNSCALED = (-1, 1, "f16", "none", "")


def _kind(step: str) -> str:
    """The name of a step without its block."""
    return step.rstrip("0123456789")


def _block(steps: tuple[str, ...]) -> int:
    return next((int(step.removeprefix(_kind(step))) for step in steps if _HADAMARD.fullmatch(step)), 1)


def _in_order(steps: list[str], known: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted((step for step in steps if _kind(step) in known), key=lambda step: known.index(_kind(step))))


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
    for field, pattern in (("vec", _VEC), ("books", _BOOKS)):
        if match := pattern.fullmatch(token):
            return {field: int(match[1])}
    if _TWO_LEVEL.fullmatch(token):
        return {"scale": token}
    if token in (*TABLES, *GRIDS, *STATE_VALUES, ROW_TABLE):
        return {"table": token}
    known = [f.name for f in fields(Spec)]
    raise UserError(f"spec {text!r}: token {token!r} is none of the values of {', '.join(known)}")
