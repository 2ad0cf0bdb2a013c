"""Which ggml type each tensor of a GGUF model gets: llama.cpp's mixtures as tables.

A file type ("q4_k_m") is a base type and rules for the tensors that deserve other bits. The rules (gguf_rules.py), the
fallbacks for shapes and the order in which layers are counted are those of `llama_model_quantize` (src/llama-quant.cpp
of July 2026, as in llama-cpp-python 0.3.36); tests/test_gguf_mixture.py compares tensor by tensor. Two facts that its
source hides:

- fused q/k/v (attn_qkv) is treated as attn_v; the rules it has for attn_qkv alone are never reached
- "i-th attn_v" counts tensors in the order layer, then name, whatever the order of the file; ffn tensors count too,
  unless the model has experts: then the layer is read from the name

Not llama.cpp's: file types `mxfp4` and `nvfp4`, which it only offers for experts (MXFP4_MOE) or not at all. They put
every weight in that type except output and token_embd, which get Q8_0 as in MXFP4_MOE.

Types are spelled as ggml spells them, in capitals: "Q4_K".
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import gguf

from ..errors import UserError
from .gguf_rules import (
    ALIASES,
    EIGHT_O,
    FALCON,
    GUARDED,
    KEPT,
    KEPT_IN,
    KINDS,
    MIXTURES,
    Facts,
    Mixture,
    Place,
    Rule,
    every,
)

# Type -> (weights of a block, its bytes). Older gguf packages do not know the last three.
SIZES: dict[str, tuple[int, int]] = {"NVFP4": (64, 36), "Q1_0": (128, 18), "Q2_0": (64, 18)} | {
    t.name: s
    for t, s in gguf.GGML_QUANT_SIZES.items()
    if t.name not in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")
}
# What a type becomes where its block does not divide the rows; what fits nothing else becomes F16.
_FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
_PLAIN = ("F32", "F16", "BF16")
# Without to know which weights matter these types give garbage.
_NEED_IMATRIX = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


@dataclass(frozen=True)
class Overrides:
    """What the user asks for beyond a file type: --pure, --output-tensor-type, --token-embedding-type, --tensor-type.

    `tensors` are (regex, type), searched in the name regardless of case; the first match wins. Unlike llama-quantize
    they also apply to f16, bf16 and f32 files, and a type that does not fit a tensor's rows falls back.
    """

    pure: bool = False
    output: str | None = None
    token_embedding: str | None = None
    tensors: tuple[tuple[str, str], ...] = ()


class Plan(NamedTuple):
    """The type of every tensor, and what those that fell back for their shape were meant to be."""

    types: dict[str, str]
    fallbacks: dict[str, str]


def file_type(name: str) -> str:
    """The key in MIXTURES of a file type spelled in any case; UserError listing the known ones."""
    low = name.lower()
    if ALIASES.get(low, low) not in MIXTURES:
        raise UserError(f"GGUF file type {name!r} is not known; accepted: {', '.join(MIXTURES)}")
    return ALIASES.get(low, low)


def ggml_type(name: str, where: str) -> str:
    """A ggml type in any case, spelled as ggml does; UserError naming `where` it was asked for."""
    if name.upper() not in SIZES:
        raise UserError(f"{where}: {name!r} is no ggml type that weights can have; accepted: {', '.join(SIZES)}")
    return name.upper()


def parse_tensor_type(text: str) -> tuple[str, str]:
    """--tensor-type REGEX=TYPE -> (regex, type). UserError naming what is wrong with it."""
    pattern, _, kind = text.partition("=")
    if not pattern or not kind:
        raise UserError(f"--tensor-type {text!r}: expected REGEX=TYPE, such as ffn_down=q6_k")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"--tensor-type {text!r}: {pattern!r} is not a valid regex ({error})") from error
    return pattern, ggml_type(kind, f"--tensor-type {text!r}")


def parse_overrides(
    pure: bool = False,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    tensor_type: Sequence[str] = (),
) -> Overrides:
    """The flags of those names, as llama-quantize spells them, `tensor_type` being REGEX=TYPE texts in the order given.

    UserError naming flag and value for what is no type or no regex.
    """
    output, embedding = (
        None if kind is None else ggml_type(kind, flag)
        for flag, kind in (
            ("--output-tensor-type", output_tensor_type),
            ("--token-embedding-type", token_embedding_type),
        )
    )
    return Overrides(pure, output, embedding, tuple(parse_tensor_type(text) for text in tensor_type))


def tensor_bytes(kind: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of `shape` ([..., in]) in a type whose block divides its rows."""
    block, size = SIZES[kind]
    return prod(shape) // block * size


def tensor_types(
    name: str, facts: Facts, tensors: Sequence[tuple[str, tuple[int, ...]]], overrides: Overrides | None = None
) -> Plan:
    """The type of each tensor in a file of type `name`; `tensors` are (gguf name, shape as torch has it: [out, in], or
    [experts, out, in]), in any order.

    Tensors that llama.cpp leaves as they are get F32. Raises UserError for an unknown file type, and for a type without
    fallback whose block does not divide a tensor's rows.
    """
    name, asked = file_type(name), overrides or Overrides()
    mix, rules = MIXTURES[name], _rules_for(name, facts)
    tied = all(n != "output.weight" for n, _ in tensors)
    totals = dict.fromkeys(("gate", "up", "down"), facts.n_layer) | {"v": sum(kind_of(n) == "v" for n, _ in tensors)}
    counts = dict.fromkeys(totals, 0)
    types, fallbacks = dict.fromkeys((n for n, _ in tensors), "F32"), {}
    for tensor, shape in sorted(tensors, key=lambda t: (_layer(t[0], -1), t[0])):
        if not is_quantized(tensor, shape, facts.arch):
            continue
        wanted = _asked(tensor, asked)
        if wanted is None and (asked.pure or mix.base in _PLAIN):
            wanted = mix.base
        if wanted is None:
            kind = kind_of(tensor)
            count = counts.get(kind, 0)
            layer = _layer(tensor, count) if facts.n_expert > 1 and kind != "v" else count
            place = Place(facts, kind, count, layer, totals.get(kind, 0), len(shape) > 2 and shape[-3] > 1)
            head = kind == "output" or (tied and kind == "embd")
            wanted = _head(mix, facts, shape, asked.output) if head else _chosen(mix, rules, tensor, place)
            counts[kind] = count + 1
        types[tensor] = fitting(tensor, shape, wanted)
        if types[tensor] != wanted:
            fallbacks[tensor] = wanted
    return Plan(types, fallbacks)


def check_imatrix(name: str, types: Mapping[str, str], covered: Collection[str] = ()) -> None:
    """UserError for the first tensor whose type needs an importance matrix and has no entry in it (`covered`: names).

    In q2_k_s files so do Q2_K tensors, but for embeddings and the output, which few matrices cover. Where --pure or the
    user's own choice gives those a type that needs one, llama.cpp does not look and aborts; here it is the same error.
    """
    name = file_type(name)
    for tensor, kind in types.items():
        needs = needs_imatrix(kind) or (
            kind == "Q2_K" and name == "q2_k_s" and kind_of(tensor) not in ("embd", "output")
        )
        if needs and tensor not in covered:
            raise UserError(
                f"{tensor} becomes {kind} in a {name} file, which is garbage without an importance matrix, and there "
                f"is none for it. Fix: --imatrix FILE that covers it, or --calib TEXT to make one, or a file type that "
                f"needs none, such as q2_k or iq4_xs"
            )


def needs_imatrix(kind: str) -> bool:
    """Whether a type gives garbage where nobody says which weights matter."""
    return kind in _NEED_IMATRIX


def fitting(name: str, shape: Sequence[int], wanted: str) -> str:
    """The type `wanted`, or what llama.cpp falls back to where its block does not divide the rows; UserError where
    there is nothing.
    """
    columns = shape[-1]
    block = SIZES[wanted][0]
    if columns % block == 0:
        return wanted
    if wanted not in _FALLBACKS and block > 32:
        raise UserError(
            f"{name}: rows of {columns} weights are no multiple of the {block} that {wanted} packs together, and "
            f"{wanted} has no smaller relative. Fix: --tensor-type '{re.escape(name)}=q8_0', or another file type"
        )
    other = _FALLBACKS.get(wanted, wanted)
    return other if columns % SIZES[other][0] == 0 else "F16"


def kind_of(name: str) -> str:
    """Kind of a tensor, as in `Mixture.rules`; "output" and "other" besides."""
    if name == "output.weight":
        return "output"
    if name in _EMBEDDINGS:
        return "embd"
    return next((kind for part, kind in KINDS.items() if part in name), "other")


def is_quantized(name: str, shape: Sequence[int], arch: str) -> bool:
    """Whether llama.cpp quantizes the tensor at all."""
    matrices = [n for i, n in enumerate(shape) if n > 1 or any(m > 1 for m in shape[:i])]
    if len(matrices) < 2 or not name.endswith("weight") or name in ("position_embd.weight", "token_types.weight"):
        return False
    return not any(part in name for part in (*KEPT, *KEPT_IN.get(arch, ())))


def _rules_for(name: str, facts: Facts) -> Mapping[str, tuple[Rule, ...]]:
    """The rules of a file type as a model with eight experts, or a Falcon, changes them."""
    rules = dict(MIXTURES[name].rules)
    if MIXTURES[name].tiny or name == "mxfp4_moe":
        return rules
    if facts.n_expert == 8:
        rules |= {"v": every("Q8_0"), "k": every("Q8_0"), "o": every("Q5_K") if name in EIGHT_O else ()}
    if facts.arch == "falcon":
        rules |= {"o": (), **FALCON.get(name, {})}
    return rules


def _asked(name: str, asked: Overrides) -> str | None:
    """The type the user gave this tensor, if any."""
    matched = next((kind for pattern, kind in asked.tensors if re.search(pattern, name, re.IGNORECASE)), None)
    kind = kind_of(name)
    # The tables of a layer's own embeddings are large: a pattern that names them wins over --token-embedding-type.
    if kind == "embd" and asked.token_embedding and not (matched and name.startswith("per_layer_")):
        return asked.token_embedding
    if kind == "output" and asked.output:
        return asked.output
    return matched


def _head(mix: Mixture, facts: Facts, shape: Sequence[int], asked: str | None) -> str:
    if asked:
        return asked
    return "Q8_0" if facts.arch == "falcon" or shape[-1] % SIZES[mix.base][0] else mix.output


def _chosen(mix: Mixture, rules: Mapping[str, tuple[Rule, ...]], name: str, place: Place) -> str:
    if any(part in name for part in GUARDED.get(place.facts.arch, ())):
        return "Q8_0"
    candidates = rules.get(place.kind, rules.get("*", ()))
    found = next((kind for kind, holds in candidates if holds(place)), mix.base)
    if place.kind == "v" and place.facts.is_70b and not mix.tiny and found in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return found


def _layer(name: str, default: int) -> int:
    found = re.match(r"blk\.(\d+)", name)
    return int(found[1]) if found else default
