"""The tables behind gguf_mixture.py: llama.cpp's file types as rules, and which weights it never quantizes.

A rule is (type, condition on the tensor's place); of a kind's rules the first that holds decides, else the file type's
base. Learned from src/llama-quant.cpp as of July 2026.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What the rules look at besides names and shapes."""

    # general.architecture of the file.
    arch: str
    # block_count, layers for predicting further tokens included.
    n_layer: int
    # Of the first layer, where layers differ.
    n_head: int
    n_head_kv: int
    n_expert: int = 0
    has_imatrix: bool = False

    @property
    def gqa(self) -> int:
        return self.n_head // self.n_head_kv if self.n_head_kv else 0

    @property
    def is_70b(self) -> bool:
        """Models that llama.cpp labels 70B: their attn_v is 8 times smaller than attn_q, so more bits cost nothing."""
        if self.arch == "llama":
            return self.n_layer == 80 and self.n_head != self.n_head_kv and self.n_expert != 8
        return (self.arch, self.n_layer) in (("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68))


@dataclass(frozen=True)
class Place:
    """Where a tensor is among its like: the `count`-th of `total`, in layer `layer`; `stacked`: experts' weights."""

    facts: Facts
    kind: str
    count: int
    layer: int
    total: int
    stacked: bool


Condition = Callable[[Place], bool]
Rule = tuple[str, Condition]


def _always(p: Place) -> bool:
    return True


def _gqa4(p: Place) -> bool:
    return p.facts.gqa >= 4


def _imatrix(p: Place) -> bool:
    return p.facts.has_imatrix


def _no_imatrix(p: Place) -> bool:
    return not p.facts.has_imatrix


def _many(p: Place) -> bool:
    return p.facts.gqa >= 4 or p.facts.n_expert >= 4


def _eight(p: Place) -> bool:
    return p.facts.n_expert == 8


def _first(fraction: int) -> Condition:
    return lambda p: p.layer < p.total // fraction


def _below(count: int) -> Condition:
    return lambda p: p.count < count


def _early(p: Place) -> bool:
    """The first eighth by count: the smallest file types do not look at the layer."""
    return p.count < p.total // 8


def _more(p: Place) -> bool:
    """The first and last eighth, and every third in between."""
    eighth = p.total // 8
    return p.layer < eighth or p.layer >= 7 * p.total // 8 or (p.layer - eighth) % 3 == 2


def _middle(p: Place) -> bool:
    return p.total // 8 <= p.layer < 7 * p.total // 8


def _experts(p: Place) -> bool:
    """Weights of experts; this architecture stacks those of attention too."""
    return p.stacked and (p.facts.arch != "bailingmoe3" or p.kind in ("up", "gate", "down"))


def _both(a: Condition, b: Condition) -> Condition:
    return lambda p: a(p) and b(p)


def _either(a: Condition, b: Condition) -> Condition:
    return lambda p: a(p) or b(p)


@dataclass(frozen=True)
class Mixture:
    """A file type: llama_ftype id, base type, and rules by kind of tensor (first that holds wins, else the base).

    Kinds: v (attn_v, attn_qkv, attn_kv_b), k, q, o (attn_output), gate, up, down, embd (token_embd where there is an
    output.weight); "*" is every kind without rules of its own.
    """

    ftype: int
    base: str
    rules: Mapping[str, tuple[Rule, ...]]
    # Type of output.weight (or of token_embd where tied).
    output: str = "Q6_K"
    # The group of 1 and 2 bit types, which has its own rules for experts.
    tiny: bool = False


def every(kind: str) -> tuple[Rule, ...]:
    return ((kind, _always),)


def _mix(ftype: int, base: str, output: str = "Q6_K", **rules: tuple[Rule, ...]) -> Mixture:
    return Mixture(ftype, base, rules, output)


def _tiny(ftype: int, base: str, embd: str, v: str, o: str | None) -> Mixture:
    rules: dict[str, tuple[Rule, ...]] = {
        "embd": every(embd),
        "v": (("Q4_K", _many), (v, _always)),
        "k": (("Q4_K", _eight),),
        "down": ((v, _early),),
        "o": (("Q5_K", _eight), *(every(o) if o else ())),
    }
    return Mixture(ftype, base, rules, "Q5_K", tiny=True)


_IQ4_DOWN = (("Q5_K", _both(_first(8), _no_imatrix)),)
_XXS_MIDDLE = (("IQ3_XXS", _middle),)
_IQ3_DOWN = _either(_first(8), _both(_eight, _more))

MIXTURES: dict[str, Mixture] = {
    "f32": _mix(0, "F32"),
    "f16": _mix(1, "F16"),
    "bf16": _mix(32, "BF16"),
    "q4_0": _mix(2, "Q4_0", down=(("Q4_1", _both(_first(8), _imatrix)),)),
    "q4_1": _mix(3, "Q4_1"),
    "q5_0": _mix(8, "Q5_0", down=(("Q5_1", _both(_first(8), _imatrix)),)),
    "q5_1": _mix(9, "Q5_1"),
    "q8_0": _mix(7, "Q8_0", "Q8_0"),
    "q2_k": _mix(10, "Q2_K", v=(("Q4_K", _gqa4), ("Q3_K", _always)), down=every("Q3_K"), o=every("Q3_K")),
    "q2_k_s": _mix(21, "Q2_K", v=(("Q4_K", _gqa4),), down=(("Q4_K", _first(8)),)),
    "q3_k_s": _mix(11, "Q3_K"),
    "q3_k_m": _mix(12, "Q3_K", v=(("Q5_K", _below(2)), ("Q4_K", _always)),
                   down=(("Q5_K", _first(16)), ("Q4_K", _always)), o=every("Q4_K")),
    "q3_k_l": _mix(13, "Q3_K", v=every("Q5_K"), down=every("Q5_K"), o=every("Q5_K")),
    "q4_k_s": _mix(14, "Q4_K", v=(("Q5_K", _below(4)),), down=(("Q5_K", _first(8)),)),
    "q4_k_m": _mix(15, "Q4_K", v=(("Q6_K", _more),), down=(("Q6_K", _more),)),
    "q5_k_s": _mix(16, "Q5_K"),
    "q5_k_m": _mix(17, "Q5_K", v=(("Q6_K", _more),), down=(("Q6_K", _more),)),
    "q6_k": _mix(18, "Q6_K"),
    "iq1_s": _tiny(24, "IQ1_S", "Q2_K", "Q2_K", "IQ2_XXS"),
    "iq1_m": _tiny(31, "IQ1_M", "Q2_K", "Q2_K", "IQ2_XXS"),
    "iq2_xxs": _tiny(19, "IQ2_XXS", "Q2_K", "Q2_K", None),
    "iq2_xs": _tiny(20, "IQ2_XS", "Q2_K", "Q2_K", None),
    "iq2_s": _tiny(28, "IQ2_XS", "IQ3_S", "IQ3_S", "IQ3_S"),
    "iq2_m": _tiny(29, "IQ2_S", "IQ3_S", "IQ3_S", "IQ3_S"),
    "iq3_xxs": _mix(23, "IQ3_XXS", "Q5_K", embd=every("IQ3_S"), v=(("Q4_K", _gqa4), ("IQ3_S", _no_imatrix)),
                    k=every("IQ2_S"), q=every("IQ2_S"), o=every("IQ3_S"),
                    down=(("Q4_K", _both(_first(8), _no_imatrix)), ("Q3_K", _no_imatrix))),
    "iq3_xs": _mix(22, "IQ3_S", v=(("Q4_K", _gqa4),), k=every("IQ3_XXS"), q=every("IQ3_XXS"),
                   gate=_XXS_MIDDLE, up=_XXS_MIDDLE),
    "iq3_s": _mix(26, "IQ3_S", v=(("Q4_K", _gqa4),)),
    "iq3_m": _mix(27, "IQ3_S", v=every("Q4_K"), down=(("Q4_K", _IQ3_DOWN),), o=every("Q4_K")),
    "iq4_nl": _mix(25, "IQ4_NL", v=(("Q5_K", _gqa4),), down=_IQ4_DOWN),
    "iq4_xs": _mix(30, "IQ4_XS", v=(("Q5_K", _gqa4),), down=_IQ4_DOWN),
    "tq1_0": _mix(36, "TQ1_0", embd=every("Q4_K")),
    "tq2_0": _mix(37, "TQ2_0", embd=every("Q4_K")),
    "mxfp4": _mix(38, "MXFP4", "Q8_0", embd=every("Q8_0")),
    "mxfp4_moe": Mixture(38, "MXFP4", {"*": (("MXFP4", _experts), ("Q8_0", _always))}, "Q8_0"),
    "nvfp4": _mix(39, "NVFP4", "Q8_0", embd=every("Q8_0")),
    "q1_0": _mix(40, "Q1_0"),
    "q2_0": _mix(41, "Q2_0", embd=every("Q4_K")),
}  # fmt: skip
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
# Eight experts (Mixtral): attention is so small a part that more bits cost little.
EIGHT_O = ("q2_k", "iq3_xs", "iq3_xxs", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq3_s", "iq3_m", "iq4_xs")
FALCON: dict[str, dict[str, tuple[Rule, ...]]] = {
    "q3_k_m": {"down": (("Q5_K", _first(16)), ("Q4_K", _more))},
    "q3_k_l": {"down": every("Q4_K"), "o": every("Q4_K")},
    "q4_k_s": {"down": ()},
    "q4_k_m": {"down": (("Q6_K", _first(16)), ("Q5_K", _more))},
}
# Weights that llama.cpp keeps at 8 bits or more in one architecture.
GUARDED = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}
# Substrings of the names of weights that are small or fragile, and stay as they are; in all models, or in one.
KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight",
    *(f"time_mix_{part}.weight" for part in (
        "first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1", "decay_w2", "lerp_fused",
    )),
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger",
    "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
KEPT_IN = {
    "glm5-next": (
        "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate",
        "indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight",
        "ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight",
    )
}  # fmt: skip
# Substring of a name -> kind; the first that is found counts.
KINDS = {
    "attn_qkv.weight": "v", "attn_kv_b.weight": "v", "attn_v.weight": "v", "attn_k.weight": "k", "attn_q.weight": "q",
    "attn_output.weight": "o", "ffn_up": "up", "ffn_gate": "gate", "ffn_down": "down",
}  # fmt: skip
