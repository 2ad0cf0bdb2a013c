"""Every sampling parameter, declared once: the Python API, the command line's flags and the server read this dataclass.

A field's default is its neutral value: a sampler whose fields are all at their defaults changes nothing and is skipped
(samplers/pipeline.py). `metadata` holds what a field accepts and its help text. A new sampler adds one field here, one
function in steps.py and its place in pipeline.ORDER. Names of other servers are translated in samplers/names.py.

Left out: `n` (the server asks n times) and beam search (deterministic decoding that no chat client uses). No torch
here: the scheduler imports this file and must stay free of it.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import UserError
from .names import translate

# Below this, dividing by the temperature could overflow float32, and nobody can tell the result from greedy. vLLM draws
# the same line.
GREEDY_BELOW = 1e-5


def about(kind: str, help: str, low: float | None = None, high: float | None = None, **more: bool) -> dict[str, Any]:
    """Metadata of a field whose value is a `kind` (a key of _CHECKS) within [low, high].

    `above`: low itself is refused; `optional`: None is allowed.
    """
    return {"kind": kind, "help": help, "low": low, "high": high, **more}


_TEMPERATURE = about("float", "divides the logits; 0 picks the most likely token (greedy)", 0, 1000)
_TOP_K = about("int", "keep the k most likely tokens; 0 or -1 keeps all", 0, 2**31 - 1)
_TOP_P = about("float", "keep the smallest set of tokens with at least this probability", 0, 1, above=True)
_MIN_P = about("float", "keep tokens at least this fraction as likely as the most likely one", 0, 1)
_REPETITION = about("float", "above 1 makes tokens of the prompt and the output less likely", 0.001, 1000)
_PRESENCE = about("float", "subtracted once from the logit of every token in the output", -2, 2)
_FREQUENCY = about("float", "subtracted from a token's logit for each time it is in the output", -2, 2)
_BIAS = about("bias", 'added to the logits of single tokens, as JSON: {"token id": bias}', -100, 100, optional=True)
_SEED = about("int", "the same seed gives the same tokens, whatever else runs", -(2**63), 2**63 - 1, optional=True)
_STOP = about("strings", "end the output before this text (may be repeated)")
_STOP_IDS = about("ints", "end the output at this token id (may be repeated)", 0)
_IGNORE_EOS = about("bool", "go on after the end-of-sequence token")
_MAX_TOKENS = about("int", "most tokens to generate; -1 or null: as many as the context holds", 1, optional=True)
_MIN_TOKENS = about("int", "no end-of-sequence and no stop token before this many tokens", 0)
_LOGPROBS = about("int", "report each token's log-probability and those of this many alternatives", 0, optional=True)
_SKIP_SPECIAL = about("bool", "leave special tokens out of the text")
_INCLUDE_STOP = about("bool", "keep the stop string at the end of the text")


@dataclass(frozen=True)
class SamplingParams:
    """How to turn logits into tokens and when to stop. UserError for a value out of range.

    Spellings of one meaning are made equal at construction: `stop="x"` is `("x",)`, lists become tuples, top_k -1 is 0,
    seed -1 and max_tokens -1 are None, and JSON's string keys of logit_bias become ints.
    """

    temperature: float = field(default=1.0, metadata=_TEMPERATURE)
    top_k: int = field(default=0, metadata=_TOP_K)
    top_p: float = field(default=1.0, metadata=_TOP_P)
    min_p: float = field(default=0.0, metadata=_MIN_P)
    repetition_penalty: float = field(default=1.0, metadata=_REPETITION)
    presence_penalty: float = field(default=0.0, metadata=_PRESENCE)
    frequency_penalty: float = field(default=0.0, metadata=_FREQUENCY)
    logit_bias: dict[int, float] | None = field(default=None, metadata=_BIAS)
    seed: int | None = field(default=None, metadata=_SEED)
    stop: tuple[str, ...] = field(default=(), metadata=_STOP)
    stop_token_ids: tuple[int, ...] = field(default=(), metadata=_STOP_IDS)
    ignore_eos: bool = field(default=False, metadata=_IGNORE_EOS)
    max_tokens: int | None = field(default=16, metadata=_MAX_TOKENS)
    min_tokens: int = field(default=0, metadata=_MIN_TOKENS)
    logprobs: int | None = field(default=None, metadata=_LOGPROBS)
    skip_special_tokens: bool = field(default=True, metadata=_SKIP_SPECIAL)
    include_stop_str_in_output: bool = field(default=False, metadata=_INCLUDE_STOP)

    def __post_init__(self) -> None:
        for name, spellings in _SPELLINGS.items():
            object.__setattr__(self, name, spellings(getattr(self, name)))
        for each in fields(self):
            _CHECKS[each.metadata["kind"]](each.name, getattr(self, each.name), each.metadata)
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
        """UserError if logit_bias or stop_token_ids names a token the model does not have."""
        for name, ids in (("logit_bias", self.logit_bias or {}), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
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


def _as_tuple(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _int_keys(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {int(key) if isinstance(key, str) and key.strip().isdecimal() else key: bias for key, bias in value.items()}


_SPELLINGS: dict[str, Callable[[Any], Any]] = {
    "top_k": lambda value: 0 if value == -1 else value,
    "seed": lambda value: None if value == -1 else value,
    "max_tokens": lambda value: None if value == -1 else value,
    "stop": _as_tuple,
    "stop_token_ids": _as_tuple,
    "logit_bias": lambda value: _int_keys(value) or None if isinstance(value, dict) else value,
}


def _refuse(name: str, value: Any, accepted: str) -> None:
    shown = repr(value)
    raise UserError(f"{name} must be {accepted}, not {shown if len(shown) <= 60 else shown[:60] + '...'}")


def _accepted(noun: str, limits: Mapping[str, Any]) -> str:
    """ "a number between 0 and 1", as the error message names a range."""
    low, high, above = limits["low"], limits["high"], limits.get("above")
    if low is not None and high is not None:
        noun += f" above {low} and at most {high}" if above else f" between {low} and {high}"
    elif low is not None:
        noun += f" above {low}" if above else f" of at least {low}"
    return noun + (" or null" if limits.get("optional") else "")


def _check_number(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if value is None and limits.get("optional"):
        return
    whole = limits["kind"] == "int"
    low = -math.inf if limits["low"] is None else limits["low"]
    high = math.inf if limits["high"] is None else limits["high"]
    # A bool is an int to Python; to a caller, `top_k=True` is a mistake. NaN fails every comparison.
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not (good and low <= value <= high and not (limits.get("above") and value == low)):
        _refuse(name, value, _accepted("an integer" if whole else "a number", limits))


def _check_bias(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if value is None:
        return
    accepted = "an object of token id -> bias between -100 and 100, or null"
    if not isinstance(value, dict):
        _refuse(name, value, accepted)
    for token, bias in value.items():
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            _refuse(f"{name}: the key", token, "a token id (an integer of at least 0)")
        _check_number(f"{name}[{token}]", bias, {**limits, "optional": False})


def _check_items(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    item = "a string that is not empty" if limits["kind"] == "strings" else "a token id (an integer of at least 0)"
    if not isinstance(value, tuple):
        _refuse(name, value, f"a list, each item {item}")
    for i, each in enumerate(value):
        if limits["kind"] == "strings" and not (isinstance(each, str) and each):
            _refuse(f"{name}[{i}]", each, item)
        if limits["kind"] == "ints" and (not isinstance(each, int) or isinstance(each, bool) or each < 0):
            _refuse(f"{name}[{i}]", each, item)


def _check_bool(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if not isinstance(value, bool):
        _refuse(name, value, "true or false")


_CHECKS: dict[str, Callable[[str, Any, Mapping[str, Any]], None]] = {
    "float": _check_number,
    "int": _check_number,
    "bias": _check_bias,
    "strings": _check_items,
    "ints": _check_items,
    "bool": _check_bool,
}
