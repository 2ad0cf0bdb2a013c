"""What a sampling parameter accepts: spellings of one meaning made equal, then one error that says what is expected."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ..errors import UserError
from .names import step_names

_TOKEN_ID = "a token id (an integer of at least 0)"
# Of numbers without a limit of their own: what int64 and float64 both hold.
_LARGEST = 2**53
_DETECTION = ("max_pattern_size", "min_pattern_size", "min_count")


def _as_tuple(value: Any) -> Any:
    """A tuple of one value or of a list; None, vLLM's default for lists, is an empty one."""
    if value is None:
        return ()
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _text_list(value: Any) -> Any:
    """A list, or the JSON text of one, which some clients send."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return (value,)
    return _as_tuple(value)


def _breakers(value: Any) -> Any:
    """As `_text_list`; text-generation-webui and TabbyAPI take the items of a JSON list without its brackets too."""
    if isinstance(value, str) and value.lstrip().startswith('"'):
        try:
            return tuple(json.loads(f"[{value}]"))
        except ValueError:
            return (value,)
    return _text_list(value)


def _id_list(value: Any) -> Any:
    """A list, or ids with commas between them, as text-generation-webui and TabbyAPI take them."""
    if isinstance(value, str):
        ids = [each.strip() for each in value.split(",") if each.strip()]
        value = [int(each) if each.isdecimal() else each for each in ids]
    return _as_tuple(value)


def _bias(value: Any) -> Any:
    """Ids as numbers; llama.cpp also takes a list of pairs."""
    if isinstance(value, list) and all(isinstance(each, list) and len(each) == 2 for each in value):
        value = {token if isinstance(token, int | str) else repr(token): bias for token, bias in value}
    if not isinstance(value, dict):
        return value
    value = {int(key) if isinstance(key, str) and key.strip().isdecimal() else key: bias for key, bias in value.items()}
    return value or None


def _order(value: Any) -> Any:
    """Names of steps from names, aliases and Kobold's ids; a text holds several, with ; or , or lines between."""
    if isinstance(value, str):
        value = [name for name in value.replace(",", ";").replace("\n", ";").split(";") if name.strip()]
    if not isinstance(value, list | tuple):
        return value
    return tuple(dict.fromkeys(step for each in value for step in step_names(each)))


def _none_if(*neutral: Any) -> Callable[[Any], Any]:
    return lambda value: None if value in neutral and not isinstance(value, bool) else value


SPELLINGS: dict[str, Callable[[Any], Any]] = {
    "top_k": lambda value: 0 if value == -1 else value,
    "nsigma": lambda value: 0.0 if value == -1 else value,
    "dry_range": lambda value: 0 if value == -1 else value,
    "adaptive_target": lambda value: -1.0 if isinstance(value, int | float) and -1 <= value < 0 else value,
    "mirostat_mode": lambda value: 0 if value is False else value,
    "seed": _none_if(-1),
    "max_tokens": _none_if(-1),
    "thinking_token_budget": _none_if(-1),
    "repetition_detection": _none_if({}),
    "repetition_slope": lambda value: 1.0 if value == 0 and not isinstance(value, bool) else value,
    "negative_prompt": lambda value: value or "",
    "stop": _as_tuple,
    "stop_token_ids": _as_tuple,
    "allowed_token_ids": _id_list,
    "banned_tokens": _id_list,
    "bad_words": _text_list,
    "banned_strings": _text_list,
    "dry_sequence_breakers": _breakers,
    "sampler_priority": _order,
    "logit_bias": _bias,
}


def _refuse(name: str, value: Any, accepted: str) -> NoReturn:
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
    # A bool is an int to Python; to a caller, `top_k=True` is a mistake.
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if good and limits["high"] is None and value > _LARGEST:
        limits = {**limits, "high": _LARGEST}
    low = -_LARGEST if limits["low"] is None else limits["low"]
    high = _LARGEST if limits["high"] is None else limits["high"]
    # NaN fails every comparison.
    if not (good and low <= value <= high and not (limits.get("above") and value == low)):
        _refuse(name, value, _accepted("an integer" if whole else "a number", limits))


def _check_bias(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        _refuse(name, value, "an object of token id -> bias between -100 and 100, or null")
    for token, bias in value.items():
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            _refuse(f"{name}: the key", token, _TOKEN_ID)
        _check_number(f"{name}[{token}]", bias, {**limits, "optional": False})


def _check_items(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    item = "a string that is not empty" if limits["kind"] == "strings" else _TOKEN_ID
    if not isinstance(value, tuple):
        _refuse(name, value, f"a list, each item {item}")
    for i, each in enumerate(value):
        if limits["kind"] == "strings" and not (isinstance(each, str) and each):
            _refuse(f"{name}[{i}]", each, item)
        if limits["kind"] == "ints" and (not isinstance(each, int) or isinstance(each, bool) or each < 0):
            _refuse(f"{name}[{i}]", each, item)


def _check_order(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if not isinstance(value, tuple):
        _refuse(name, value, "a list of sampler names or of Kobold's ids 0 to 6")


def _check_detection(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if value is None:
        return
    if not isinstance(value, dict) or set(value) - set(_DETECTION):
        _refuse(name, value, f"an object with {', '.join(_DETECTION)}, or null")
    least = {"max_pattern_size": 1, "min_pattern_size": 1, "min_count": 2}
    for key, each in value.items():
        _check_number(f"{name}.{key}", each, {"kind": "int", "low": least[key], "high": None})
    if value.get("min_pattern_size", 1) > value.get("max_pattern_size", 0):
        raise UserError(f"{name}: max_pattern_size must be given and at least min_pattern_size, not {value}")


def _check_bool(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if not isinstance(value, bool):
        _refuse(name, value, "true or false")


def _check_text(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if not isinstance(value, str):
        _refuse(name, value, "a string")


CHECKS: dict[str, Callable[[str, Any, Mapping[str, Any]], None]] = {
    "float": _check_number,
    "int": _check_number,
    "bias": _check_bias,
    "strings": _check_items,
    "ints": _check_items,
    "order": _check_order,
    "detection": _check_detection,
    "bool": _check_bool,
    "text": _check_text,
}
