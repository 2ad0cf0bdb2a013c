"""Every sampling parameter, declared once: the Python API, the command line's flags and the server read this dataclass.

A field's default is its neutral value: a sampler whose fields are all at their defaults changes nothing and is skipped
(samplers/pipeline.py). `metadata` holds what a field accepts and its help text. A new sampler adds one field here, one
function in steps.py or truncation.py and its place in inputs.ORDER. Names of other servers are translated in
samplers/names.py.

Left out: `n` (the server asks n times) and beam search (deterministic decoding that no chat client uses). No torch
here: the scheduler imports this file and must stay free of it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import UserError
from .checks import CHECKS, SPELLINGS
from .names import translate

# Below this, dividing by the temperature could overflow float32, and nobody can tell the result from greedy. vLLM draws
# the same line.
GREEDY_BELOW = 1e-5


def about(default: Any, kind: str, help: str, low: float | None = None, high: float | None = None, **more: bool) -> Any:
    """A field whose value is a `kind` (a key of checks.CHECKS) within [low, high].

    `above`: low itself is refused; `optional`: None is allowed.
    """
    return field(default=default, metadata={"kind": kind, "help": help, "low": low, "high": high, **more})


@dataclass(frozen=True)
class SamplingParams:
    """How to turn logits into tokens and when to stop. UserError for a value out of range.

    Spellings of one meaning are made equal at construction: `stop="x"` is `("x",)`, lists become tuples, top_k -1 is 0,
    nsigma -1 and dry_range -1 are 0, seed, max_tokens and thinking_token_budget -1 are None, JSON's string keys of
    logit_bias become ints, and sampler_priority holds our names.
    """

    temperature: float = about(1.0, "float", "divides the logits; 0 picks the most likely token (greedy)", 0, 1000)
    temperature_last: bool = about(False, "bool", "divide after the tokens were cut, not before")
    dynatemp_min: float = about(0.0, "float", "temperature where the model is certain (dynamic temperature)", 0, 1000)
    dynatemp_max: float = about(
        0.0, "float", "temperature where it is not; 0 and min 0: no dynamic temperature", 0, 1000
    )
    dynatemp_exponent: float = about(1.0, "float", "how entropy maps to temperature between them", 0, 100, above=True)
    smoothing_factor: float = about(0.0, "float", "quadratic smoothing of the logits; 0 is off", 0, 100)
    smoothing_curve: float = about(1.0, "float", "cubic part of the smoothing; 1 has none", 0, 100)
    nsigma: float = about(0.0, "float", "keep logits within this many standard deviations of the best; 0 keeps all", 0)
    top_k: int = about(0, "int", "keep the k most likely tokens; 0 or -1 keeps all", 0, 2**31 - 1)
    top_p: float = about(1.0, "float", "keep the smallest set of tokens with this probability", 0, 1, above=True)
    min_p: float = about(0.0, "float", "keep tokens at least this fraction as likely as the most likely one", 0, 1)
    top_a: float = about(0.0, "float", "keep tokens with p of at least this times the square of the best p", 0)
    tfs: float = about(1.0, "float", "tail-free sampling: share of curvature to keep; 1 keeps all", 0, 1, above=True)
    eta_cutoff: float = about(0.0, "float", "keep p >= min(eta, sqrt(eta) exp(-entropy)); 0 keeps all", 0)
    epsilon_cutoff: float = about(0.0, "float", "keep tokens with at least this probability", 0)
    typical_p: float = about(1.0, "float", "keep the most typical tokens with this probability", 0, 1)
    xtc_probability: float = about(0.0, "float", "how often to exclude all top choices but the last", 0, 1)
    xtc_threshold: float = about(0.1, "float", "what is a top choice: at least this probability", 0, 1)
    skew: float = about(0.0, "float", "bends the ranked distribution: above 0 towards its tail", -20, 20)
    mirostat_mode: int = about(0, "int", "1 or 2: hold the surprise of the text instead of cutting tokens", 0, 2)
    mirostat_tau: float = about(5.0, "float", "surprise to hold, bits a token", 0, 1000)
    mirostat_eta: float = about(0.1, "float", "how fast mirostat corrects", 0, 1000)
    adaptive_target: float = about(
        -1.0, "float", "draw tokens of about this probability (adaptive-p); -1 is off", -1, 1
    )
    adaptive_decay: float = about(0.9, "float", "how long adaptive-p remembers what it drew", 0, 0.99)
    repetition_penalty: float = about(1.0, "float", "above 1: tokens of the text become less likely", 0.001, 1000)
    repetition_penalty_range: int = about(-1, "int", "tokens back that penalties see; -1: prompt and output", -1)
    repetition_decay: int = about(0, "int", "beyond the range, penalties fade over this many tokens", 0)
    repetition_slope: float = about(
        1.0, "float", "share of the penalty in the older half of the range", 0, 1, above=True
    )
    presence_penalty: float = about(0.0, "float", "subtracted once from the logit of every token in the output", -2, 2)
    frequency_penalty: float = about(0.0, "float", "subtracted for each time a token is in the output", -2, 2)
    no_repeat_ngram_size: int = about(0, "int", "no n tokens in a row occur twice; 0 is off", 0)
    dry_multiplier: float = about(0.0, "float", "strength of DRY, against repeating sequences; 0 is off", 0, 1000)
    dry_base: float = about(1.75, "float", "DRY: growth with each token of a repetition", 1, 1000)
    dry_allowed_length: int = about(2, "int", "DRY: longest repetition that costs nothing more", 0)
    dry_range: int = about(0, "int", "DRY: tokens back to look; 0: prompt and output", 0)
    dry_sequence_breakers: tuple[str, ...] = about(
        ("\n", ":", '"', "*"), "strings", "DRY: no match reaches across these"
    )
    logit_bias: dict[int, float] | None = about(
        None, "bias", 'added to the logits of single tokens, as JSON: {"token id": bias}', -100, 100, optional=True
    )
    allowed_token_ids: tuple[int, ...] = about((), "ints", "no tokens but these (may be repeated)", 0)
    banned_tokens: tuple[int, ...] = about((), "ints", "never this token id (may be repeated)", 0)
    bad_words: tuple[str, ...] = about((), "strings", "never the token that completes this text (may be repeated)")
    banned_strings: tuple[str, ...] = about(
        (), "strings", "go back and choose again when this text appears, in any case (may be repeated)"
    )
    guidance_scale: float = about(1.0, "float", "above 1: away from the negative prompt (two sequences run)", 0, 1000)
    negative_prompt: str = about("", "text", "what guidance_scale steers away from; empty: no prompt at all")
    token_healing: bool = about(False, "bool", "let the model finish the prompt's last token its own way")
    thinking_token_budget: int | None = about(
        None, "int", "end the model's thought after so many tokens", 0, optional=True
    )
    repetition_detection: dict[str, int] | None = about(
        None,
        "detection",
        "end a text that loops, as JSON: max_pattern_size, min_pattern_size, min_count",
        optional=True,
    )
    sampler_priority: tuple[str, ...] = about((), "order", "samplers in the order to run them, names or Kobold's ids")
    sampler_trace: bool = about(False, "bool", "tell what each sampler removed and moved")
    seed: int | None = about(
        None, "int", "the same seed gives the same tokens, whatever else runs", -(2**63), 2**63 - 1, optional=True
    )
    stop: tuple[str, ...] = about((), "strings", "end the output before this text (may be repeated)")
    stop_token_ids: tuple[int, ...] = about((), "ints", "end the output at this token id (may be repeated)", 0)
    ignore_eos: bool = about(False, "bool", "go on after the end-of-sequence token")
    ban_eos_token: bool = about(False, "bool", "never choose the end-of-sequence token")
    max_tokens: int | None = about(
        16, "int", "most tokens to generate; -1 or null: as many as the context holds", 1, optional=True
    )
    min_tokens: int = about(0, "int", "no end-of-sequence and no stop token before this many tokens", 0)
    logprobs: int | None = about(
        None, "int", "report each token's log-probability and those of this many alternatives", 0, optional=True
    )
    skip_special_tokens: bool = about(True, "bool", "leave special tokens out of the text")
    include_stop_str_in_output: bool = about(False, "bool", "keep the stop string at the end of the text")

    def __post_init__(self) -> None:
        for name, spellings in SPELLINGS.items():
            object.__setattr__(self, name, spellings(getattr(self, name)))
        for each in fields(self):
            CHECKS[each.metadata["kind"]](each.name, getattr(self, each.name), each.metadata)
        if self.mirostat_mode and self.adaptive_target >= 0:
            raise UserError("mirostat_mode and adaptive_target both steer the text: switch one of them off (0, -1)")
        if self.dynatemp_max < self.dynatemp_min:
            raise UserError(
                f"dynatemp_min is {self.dynatemp_min}, above dynatemp_max ({self.dynatemp_max}): lower the first or "
                "raise the second"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(
                f"min_tokens is {self.min_tokens}, above max_tokens ({self.max_tokens}): lower the first or raise the "
                "second"
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken without drawing."""
        return self.temperature < GREEDY_BELOW

    def is_neutral(self, *names: str) -> bool:
        """Whether all these fields are at their defaults, so that a sampler reading them changes nothing."""
        # A dataclass keeps each default as a class attribute.
        return all(getattr(self, name) == getattr(type(self), name) for name in names)

    def check_vocab(self, vocab_size: int) -> None:
        """UserError if a parameter names a token the model does not have."""
        for name in ("logit_bias", "stop_token_ids", "allowed_token_ids", "banned_tokens"):
            for token in getattr(self, name) or ():
                if token >= vocab_size:
                    raise UserError(
                        f"{name} names token {token}, but the model has tokens 0 to {vocab_size - 1}: remove it"
                    )

    @classmethod
    def from_request(cls, request: Mapping[str, Any]) -> "SamplingParams":
        """From names as any client sends them: aliases are translated, None counts as absent.

        UserError for a name nobody knows.
        """
        return cls(**translate(request, {each.name: each.default for each in fields(cls)}))


@dataclass(frozen=True)
class CliField:
    """What the command line needs for one flag; the values it collects go to `SamplingParams.from_request`."""

    name: str
    flag: str  # "--top-k"
    help: str
    parse: Callable[[str], Any] | None  # text to value; None for a switch that takes no text
    repeat: bool  # may be given several times, collected in a list
    default: Any


def cli_fields() -> tuple[CliField, ...]:
    """One flag per sampling parameter, in the order of the dataclass.

    A switch that is on by default becomes `--no-...`; giving a switch stands for the opposite of its default.
    """
    parsers: dict[str, Callable[[str], Any] | None] = {
        "float": float,
        "int": int,
        "bias": json.loads,
        "strings": str,
        "ints": int,
        "detection": json.loads,
        "order": str,
        "text": str,
        "bool": None,
    }
    made = []
    for each in fields(SamplingParams):
        kind = each.metadata["kind"]
        negated = kind == "bool" and each.default
        flag = ("--no-" if negated else "--") + each.name.replace("_", "-")
        text = f"do not: {each.metadata['help']}" if negated else each.metadata["help"]
        made.append(CliField(each.name, flag, text, parsers[kind], kind in ("strings", "ints"), each.default))
    return tuple(made)
