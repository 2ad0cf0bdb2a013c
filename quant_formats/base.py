"""What a dialect is: the mapping between one on-disk layout and a family. One file each, found by its file name.

A dialect is a module with

    NAMES                            the --format values it answers to; the first is its plain name
    SUFFIXES                         tensor names, relative to a module, that belong to a quantized weight
    MARK                             the suffix whose presence says "this module is quantized": contents decide
    SIDECAR                          file that repeats quantization_config for older readers, or ""
    detect(config) -> Recipe | None  from a quantization_config; UserError on a field value it does not know
    recipe(options) -> Recipe        from what the user asked for; UserError on what the layout cannot hold
    shaped(spec, shape) -> Spec      the spec as a weight of this shape takes it: flat where groups straddle rows
    check(spec, shape) -> str        why a weight of this shape cannot be stored, with the fix; "" when it can
    load(read, name, shape, recipe) -> QTensor
    save(q, recipe) -> {suffix: tensor}          save(load(x)) == x, byte for byte
    config(recipe) -> dict           the quantization_config to write, {} where config.json has none
    pickled(recipe)                  optional: (file, tensors -> content) of a layout that is a pickle, else None

and no algorithm: quantizers live in calibrate/ and see only grids. What `save` cannot compute from the parts travels in
`QTensor.extra`, by suffix: those tensors of the file win over computed ones.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase, translate
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.qtensor import QTensor
from ..kernels.spec import Spec

Rule = tuple[str, Spec | Literal["skip"]]


@dataclass(frozen=True)
class Recipe:
    """Which module gets which spec. Set by a dialect's `detect` or `recipe`; `with_rules` puts finer rules in front."""

    format: str
    # (pattern, spec or "skip"), first match wins. A pattern is a shell glob over the module path, or "re:" and a regex.
    rules: tuple[Rule, ...]
    # Facts of the dialect that are no property of one weight: checkpoint_format, version, double quantization ...
    options: Mapping[str, Any] = field(default_factory=dict)
    method: str = "rtn"
    calib: str = ""
    # Modules by their full path; goes before the rules.
    modules: Mapping[str, Spec] = field(default_factory=dict)

    def spec(self, module: str) -> Spec | None:
        """The spec of a module, None where it stays as it is."""
        if module in self.modules:
            return self.modules[module]
        for pattern, spec in self.rules:
            if matches(pattern, module):
                return None if spec == "skip" else spec
        return None

    def with_rules(self, rules: tuple[Rule, ...]) -> "Recipe":
        return replace(self, rules=rules + self.rules)

    @property
    def default(self) -> Spec:
        """The spec of the last rule that has one: what a module gets that nothing singles out."""
        return next(s for _, s in reversed(self.rules) if s != "skip")


def matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return fnmatchcase(module, pattern)


@dataclass(frozen=True)
class Options:
    """What a user may ask of a format; None = the format's own default. Set by the command line or `quantize()`."""

    format: str
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    desc_act: bool | None = None


class Reader(Protocol):
    """Tensors of one checkpoint by full name."""

    def __call__(self, name: str) -> Tensor:
        """The tensor; UserError naming file and tensor where it is missing."""
        ...

    def __contains__(self, name: str) -> bool: ...


class Format(Protocol):
    """The functions of a dialect module; see the module docstring."""

    NAMES: tuple[str, ...]
    SUFFIXES: tuple[str, ...]
    MARK: str
    SIDECAR: str

    def detect(self, config: Mapping[str, Any]) -> Recipe | None: ...
    def recipe(self, options: Options) -> Recipe: ...
    def shaped(self, spec: Spec, shape: tuple[int, int]) -> Spec: ...
    def check(self, spec: Spec, shape: tuple[int, int]) -> str: ...
    def load(self, read: Reader, name: str, shape: tuple[int, int], recipe: Recipe) -> QTensor: ...
    def save(self, q: QTensor, recipe: Recipe) -> dict[str, Tensor]: ...
    def config(self, recipe: Recipe) -> dict[str, Any]: ...


def pickled(fmt: Format, recipe: Recipe) -> tuple[str, Callable[[Mapping[str, Tensor]], Any]] | None:
    """(file name, tensors by full name -> what torch.save writes) of a pickled layout; None for safetensors."""
    found = getattr(fmt, "pickled", None)
    return found(recipe) if found else None


@cache
def formats() -> dict[str, Format]:
    """Every dialect of this folder by file name."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        module: Any = import_module(f".{path.stem}", __package__)
        if hasattr(module, "NAMES"):
            found[path.stem] = module
    return found


def names() -> list[str]:
    """Every value --format takes."""
    return sorted(name for module in formats().values() for name in module.NAMES)


def format_by_name(name: str) -> Format:
    """The dialect that answers to a --format value. UserError listing the known ones."""
    for module in formats().values():
        if name in module.NAMES:
            return module
    raise UserError(f"--format {name!r} is not known; accepted: {', '.join(names())}")


def detect(config: Mapping[str, Any], where: str) -> tuple[Format, Recipe] | None:
    """Dialect and recipe of a model's config.json; None for an unquantized model.

    An unknown quantization_config raises UserError: loading would leave random weights where the packed ones belong.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    for module in formats().values():
        try:
            recipe = module.detect(quantization)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if recipe is not None:
            return module, recipe
    kind = quantization.get("quant_method", "<none>")
    raise UserError(
        f"{where}: quantization_config has quant_method {kind!r}, which bitsmith does not read yet "
        f"(it reads {', '.join(formats())}). Nothing was loaded. "
        f"Fix: use the unquantized checkpoint, or one of those formats."
    )


def bits_among(options: Options, accepted: tuple[int, ...], default: int, fix: str) -> int:
    """The asked-for bits if the layout can hold them; UserError with the accepted widths and the way out."""
    bits = default if options.bits is None else options.bits
    if bits not in accepted:
        raise UserError(
            f"--bits {bits} is not possible with --format {options.format}: accepted {', '.join(map(str, accepted))}. "
            f"Fix: {fix}"
        )
    return bits


def group_size(options: Options, default: int) -> int:
    """The asked-for group size, -1 meaning one group per row."""
    size = default if options.group_size is None else options.group_size
    if size != -1 and size < 1:
        raise UserError(
            f"--group-size {size}: accepted -1 (one group per row) or a positive number, usually 32, 64 or 128"
        )
    return size


def divides(spec: Spec, shape: tuple[int, int]) -> str:
    """Why groups along the inputs do not fit a weight of `shape`; "" when they do."""
    columns = shape[1]
    if spec.group == -1 or columns % spec.group == 0:
        return ""
    fitting = [g for g in (256, 128, 64, 32, 16, 8) if columns % g == 0]
    return (
        f"group_size {spec.group} does not divide in_features {columns}. "
        f"Fix: --group-size {' or '.join(map(str, [*fitting[:3], -1]))}, or --skip this module"
    )


def straddles(spec: Spec, shape: tuple[int, int]) -> str:
    """For the `check` of dialects whose groups may straddle rows: what is wrong with a spec `shaped` has not seen."""
    if spec.view or spec.group == -1 or shape[1] % spec.group == 0:
        return ""
    return f"groups of {spec.group} straddle rows of {shape[1]} inputs, which {spec} does not say; see Format.shaped"


def known(value: Any, accepted: tuple[Any, ...], field_name: str, method: str) -> Any:
    """`value` if the dialect knows it; else a UserError naming the field, the value and what is accepted."""
    if value not in accepted:
        shown = ", ".join(map(repr, accepted))
        raise UserError(
            f"quantization_config of {method!r}: {field_name} is {value!r}; bitsmith reads {shown}. "
            f"Nothing was loaded. Fix: use a checkpoint quantized that way, or the unquantized one"
        )
    return value


_PATH_START, _PATH_END = r".*(^|\.)", r"(\.|$)"


def not_converted(patterns: list[str] | None) -> tuple[Rule, ...]:
    """modules_to_not_convert / skip_modules entries (a path, or a part of one) as skip rules."""
    return tuple((f"re:{_PATH_START}{re.escape(p)}{_PATH_END}", "skip") for p in patterns or ())


def unconverted(recipe: Recipe) -> list[str] | None:
    """modules_to_not_convert of a recipe: its skip rules as paths or parts of them; what the file said without any."""
    found = [_plain(pattern) for pattern, spec in recipe.rules if spec == "skip"]
    return found if found else recipe.options.get("modules_to_not_convert", [])


def _plain(pattern: str) -> str:
    """A skip pattern as other libraries match it: as a prefix, a suffix or a regex at the start of the path."""
    if not pattern.startswith("re:"):
        return pattern.removeprefix("*").removeprefix(".").removesuffix("*").removesuffix(".")
    regex = pattern[3:]
    inner = regex.removeprefix(_PATH_START).removesuffix(_PATH_END)
    return re.sub(r"\\(.)", r"\1", inner) if inner != regex else regex


def regex_of(pattern: str) -> str:
    """A rule's pattern as the regex that gptqmodel's `dynamic` takes."""
    if pattern.startswith("re:"):
        return pattern[3:]
    # fnmatch wraps its result in a flag group and an end anchor, spelled differently between Python versions.
    return translate(pattern).removeprefix("(?s:").removesuffix(")\\Z").removesuffix(")\\z")


def fixed(options: Options, why: str, **accepted: Any) -> None:
    """UserError where an option was asked for that the layout has only one value of."""
    for name, value in accepted.items():
        asked = getattr(options, name)
        if asked is not None and asked != value:
            flag = f"--{name}".replace("_", "-")
            flag = {"--group-size": f"{flag} {asked}", "--sym": "--sym" if asked else "--asym"}.get(flag, flag)
            raise UserError(f"{flag} is not possible with --format {options.format}: {why}. Fix: leave it out")


def sized(read: Reader, name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor if it has that shape; else a UserError naming both."""
    tensor = read(name)
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"tensor {name} has shape {tuple(tensor.shape)}, expected {shape} from the quantization_config. "
            f"Fix: the quantization_config of config.json must be the one the file was written with"
        )
    return tensor


def float_name(tensor: Tensor, name: str) -> str:
    """How a Spec spells the dtype of a tensor of scales; UserError where it is no float of 16 or 32 bits."""
    found = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}.get(tensor.dtype)
    if found is None:
        raise UserError(
            f"tensor {name} has dtype {tensor.dtype}; accepted: float16, bfloat16, float32. Fix: fetch the file again"
        )
    return found


def kept(read: Reader, name: str, made: Mapping[str, Tensor], suffixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Those of the file's small tensors that `save` would not reproduce: what belongs into `QTensor.extra`."""
    found = {s: read(f"{name}.{s}") for s in suffixes if f"{name}.{s}" in read}
    return {s: t for s, t in found.items() if s not in made or not same(t, made[s])}


def same(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bytes (NaN and the sign of zero included)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
