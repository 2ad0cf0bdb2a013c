"""GPTQ checkpoints (AutoGPTQ, gptqmodel; read by transformers, vLLM, ExLlama, Aphrodite).

    qweight int32 [K*bits/32, N]      codes packed along K, low bits first: the transpose of our `codes`
    qzeros  int32 [G, N*bits/32]      zero points packed along N; "gptq" (v1) stores zero - 1, "gptq_v2" the zero itself
    scales  f16   [G, N]
    g_idx   int32 [K]                 group of each input; unless that is i // group_size, its stable argsort is `perm`

W[n, k] = (code - zero[g_idx[k], n]) * scale[g_idx[k], n].

v1 subtracts one from the whole int32 word, not per field: a zero point of 0 borrows from its neighbour. Adding the
same constant to the word undoes it exactly, which is what gptqmodel (its writer) does and so do we; 3-bit fields wrap
one by one. Kernels that add one per field read such files differently (specs: 5 of 36,864 zero points in a 2-bit
model). New symmetric checkpoints are v1, which every reader knows; asymmetric ones v2, which leaves no doubt about zero
points of 0 (gptqmodel opens no asymmetric v1 but its own). Left out: the planar layout gptq_p (5, 6, 7 bits).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import bits
from ..kernels.qtensor import QTensor
from ..kernels.spec import Spec
from .base import Options, Reader, Recipe, Rule, bits_among, divides, float_name, group_size, known, regex_of, sized

NAMES = ("gptq",)
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
MARK = "qweight"
SIDECAR = "quantize_config.json"
BITS = (2, 3, 4, 8)
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def detect(config: Mapping[str, Any]) -> Recipe | None:
    if config.get("quant_method") != "gptq":
        return None
    version = known(
        config.get("checkpoint_format", config.get("format", "gptq")), ("gptq", "gptq_v2"), "checkpoint_format", "gptq"
    )
    known(config.get("pack_dtype", "int32"), ("int32",), "pack_dtype", "gptq")
    width = known(config.get("bits"), BITS, "bits", "gptq")
    spec = _spec(
        width, config.get("group_size", 128), bool(config.get("sym", True)), bool(config.get("desc_act", False))
    )
    rules = tuple(_dynamic(pattern, override, spec) for pattern, override in (config.get("dynamic") or {}).items())
    options = {k: config[k] for k in ("desc_act", "meta", "lm_head", "dynamic") if k in config}
    return Recipe("gptq", (*rules, ("*", spec)), {"checkpoint_format": version, **options})


def _spec(width: int, group: int, sym: bool, desc_act: bool) -> Spec:
    return Spec("affine", width, group, zero="sym" if sym else "asym", pre=("perm",) if desc_act else ())


def _dynamic(pattern: str, override: Mapping[str, Any] | bool, base: Spec) -> Rule:
    """gptqmodel's per-module overrides: "-:regex" skips, "+:regex" or a regex changes bits, group_size, sym ..."""
    if pattern.startswith("-:"):
        return f"re:{pattern[2:]}", "skip"
    change = override if isinstance(override, Mapping) else {}
    spec = _spec(
        known(change.get("bits", base.bits), BITS, f"dynamic[{pattern}].bits", "gptq"),
        change.get("group_size", base.group),
        bool(change.get("sym", base.zero == "sym")),
        bool(change.get("desc_act", base.pre)),
    )
    return f"re:{pattern.removeprefix('+:')}", spec


def recipe(options: Options) -> Recipe:
    width = bits_among(options, BITS, 4, "choose one of those, or --format hqq for 1, 2, 3, 4 or 8 bits")
    sym = True if options.sym is None else options.sym
    spec = _spec(width, group_size(options, 128), sym, bool(options.desc_act))
    version = "gptq" if sym else "gptq_v2"
    return Recipe("gptq", (("*", spec),), {"checkpoint_format": version, "desc_act": bool(options.desc_act)})


def shaped(spec: Spec, shape: tuple[int, int]) -> Spec:
    return spec


def check(spec: Spec, shape: tuple[int, int]) -> str:
    # 3-bit codes come in units of 32 (three words); other widths fill one word at a time.
    unit = 32 if spec.bits == 3 else 32 // spec.bits
    for what, size in (("in_features", shape[1]), ("out_features", shape[0])):
        if size % unit:
            return (
                f"{what} {size} is not a multiple of {unit}, the codes GPTQ packs at {spec.bits} bits. "
                f"Fix: --skip this module, or --format hqq or nf4, which pack any shape"
            )
    return divides(spec, shape)


def load(read: Reader, name: str, shape: tuple[int, int], recipe: Recipe) -> QTensor:
    spec = recipe.spec(name)
    assert spec is not None
    n, k = shape
    groups = 1 if spec.group == -1 else -(-k // spec.group)
    qweight = sized(read, f"{name}.qweight", (bits.words(k, spec.bits), n))
    qzeros = sized(read, f"{name}.qzeros", (groups, bits.words(n, spec.bits)))
    scales = sized(read, f"{name}.scales", (groups, n))
    # As they lie in the file: what packs them for a device reads them in that order.
    parts = {"codes": qweight.T, "scales": scales.T}
    if spec.zero == "asym" or not _symmetric(qzeros, spec.bits, recipe):
        parts["zeros"] = _zeros(qzeros, spec.bits, n, recipe).T
        spec = _spec(spec.bits, spec.group, False, bool(spec.pre))
    extra: dict[str, Tensor] = {}
    perm = _perm(read, name, k, spec.group, parts, spec.bits, extra)
    spec = _spec(spec.bits, spec.group, spec.zero == "sym", perm is not None)
    if perm is not None:
        parts["perm"] = perm
    if scales.dtype != torch.float16:
        spec = Spec(
            spec.family, spec.bits, spec.group, scale=float_name(scales, f"{name}.scales"), zero=spec.zero, pre=spec.pre
        )
    return QTensor(spec, shape, parts, extra)


def _symmetric(qzeros: Tensor, width: int, recipe: Recipe) -> bool:
    """Whether all zero points are those of a symmetric grid, by their words: nothing is unpacked."""
    unit = 3 if width == 3 else 1
    wanted = _pack_zeros(torch.full((1, 32), 1 << (width - 1), dtype=torch.uint8), width, recipe)[:, :unit]
    return bool((qzeros.reshape(-1, unit) == wanted).all())


def _zeros(qzeros: Tensor, width: int, n: int, recipe: Recipe) -> Tensor:
    """int32 [G, N*bits/32] -> uint8 zero points [G, N]."""
    v1 = recipe.options["checkpoint_format"] == "gptq"
    if v1 and width in _ONES:
        qzeros = _wrap(qzeros.to(torch.int64) + _ONES[width])
    zeros = bits.unpack(qzeros, width, n)
    return (zeros + 1) & 7 if v1 and width == 3 else zeros


def _wrap(wide: Tensor) -> Tensor:
    """int64 -> int32 modulo 2**32."""
    return ((wide + (1 << 31)) % (1 << 32) - (1 << 31)).to(torch.int32)


def _perm(
    read: Reader, name: str, k: int, group: int, parts: dict[str, Tensor], width: int, extra: dict[str, Tensor]
) -> Tensor | None:
    """Sort the columns of `parts["codes"]` by group if g_idx asks for it; returns the permutation, or None."""
    if f"{name}.g_idx" not in read:
        extra["no_g_idx"] = torch.ones(())
        return None
    g_idx = read(f"{name}.g_idx").long()
    sequential = torch.arange(k) // (k if group == -1 else group)
    if torch.equal(g_idx, sequential):
        return None
    perm = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[perm], sequential):
        raise UserError(
            f"tensor {name}.g_idx does not give every group {group} inputs. Fix: the file is damaged; fetch it again"
        )
    codes = bits.unpack(parts["codes"], width, k)
    parts["codes"] = bits.pack(codes[:, perm], width)
    return perm.to(torch.int32)


def save(q: QTensor, recipe: Recipe) -> dict[str, Tensor]:
    k = q.shape[1]
    spec, codes = q.spec, q.parts["codes"]
    g_idx = torch.arange(k) // (k if spec.group == -1 else spec.group)
    if spec.pre:
        inverse = torch.argsort(q.parts["perm"])
        codes = bits.pack(bits.unpack(codes, spec.bits, k)[:, inverse], spec.bits)
        g_idx = g_idx[inverse]
    zeros = q.parts.get("zeros")
    if zeros is None:
        zeros = torch.full(q.parts["scales"].shape, 1 << (spec.bits - 1), dtype=torch.uint8)
    tensors = {
        "qweight": codes.T.contiguous(),
        "qzeros": _pack_zeros(zeros.T.contiguous(), spec.bits, recipe),
        "scales": q.parts["scales"].T.contiguous(),
        "g_idx": g_idx.to(torch.int32),
    }
    if "no_g_idx" in q.extra:
        del tensors["g_idx"]
    return tensors


def _pack_zeros(zeros: Tensor, width: int, recipe: Recipe) -> Tensor:
    v1 = recipe.options["checkpoint_format"] == "gptq"
    if v1 and width == 3:
        return bits.pack((zeros + 7) & 7, width)
    packed = bits.pack(zeros, width)
    return _wrap(packed.to(torch.int64) - _ONES[width]) if v1 else packed


def config(recipe: Recipe) -> dict[str, Any]:
    spec = recipe.default
    dynamic = dict(recipe.options.get("dynamic") or {})
    for pattern, override in recipe.rules[:-1]:
        regex = regex_of(pattern)
        if override == "skip":
            dynamic.setdefault(f"-:{regex}", {})
        elif f"+:{regex}" not in dynamic and regex not in dynamic:
            dynamic[f"+:{regex}"] = _override(override)
    version = recipe.options["checkpoint_format"]
    found: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": spec.bits,
        "group_size": spec.group,
        "desc_act": bool(recipe.options.get("desc_act")),
        "sym": spec.zero == "sym",
        "lm_head": recipe.spec("lm_head") is not None,
        "format": version,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "meta": recipe.options.get("meta", {"quantizer": ["bitsmith"], "method": recipe.method}),
    }
    return {**found, "dynamic": dynamic} if dynamic else found


def _override(spec: Spec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group, "sym": spec.zero == "sym", "desc_act": bool(spec.pre)}
