"""Names other servers' clients send, and what becomes of them here.

ALIASES translate to our name, STEP_NAMES those of samplers in an order. UNSUPPORTED names are accepted at their neutral
value and refused, by name, at any other: silently ignoring a sampler is worse than an error. IGNORED never influence
the text. Anything else is a UserError that suggests the nearest known name.

Sources: the public request schemas of OpenAI, vLLM, Aphrodite, llama.cpp, TabbyAPI, KoboldCpp, Ollama and
text-generation-webui.
"""

import difflib
import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from ..errors import UserError

logger = logging.getLogger(__name__)

ALIASES: dict[str, str] = {
    "temp": "temperature",
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "min_length": "min_tokens",
    "min_new_tokens": "min_tokens",
    "repeat_penalty": "repetition_penalty",
    "rep_pen": "repetition_penalty",
    "penalty_last_n": "repetition_penalty_range",
    "penalty_range": "repetition_penalty_range",
    "rep_pen_range": "repetition_penalty_range",
    "repeat_last_n": "repetition_penalty_range",
    "repetition_range": "repetition_penalty_range",
    "rep_pen_slope": "repetition_slope",
    "freq_pen": "frequency_penalty",
    "pres_pen": "presence_penalty",
    "stop_sequence": "stop",
    "stop_sequences": "stop",
    "stopping_strings": "stop",
    "custom_stopping_strings": "stop",
    "sampler_seed": "seed",
    "n_probs": "logprobs",
    "typ_p": "typical_p",
    "typical": "typical_p",
    "tfs_z": "tfs",
    "top_n_sigma": "nsigma",
    "mirostat": "mirostat_mode",
    "min_temp": "dynatemp_min",
    "max_temp": "dynatemp_max",
    "dynatemp_low": "dynatemp_min",
    "dynatemp_high": "dynatemp_max",
    "temp_exponent": "dynatemp_exponent",
    "dry_penalty_last_n": "dry_range",
    "allowed_tokens": "allowed_token_ids",
    "custom_token_bans": "banned_tokens",
    "banned_phrases": "banned_strings",
    "cfg_scale": "guidance_scale",
    "samplers": "sampler_priority",
    "sampler_order": "sampler_priority",
    "thinking_budget": "thinking_token_budget",
}

# name: its neutral values. None and empty strings, lists and objects are neutral for all of them.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_bos_token": (True,),
    "auto_max_new_tokens": (False,),
    "best_of": (1,),
    "do_sample": (True,),
    "early_stopping": (False,),
    "encoder_repetition_penalty": (1,),
    "grammar": (),
    "grammar_string": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "length_penalty": (1,),
    "n": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "post_sampling_probs": (False,),
    "prompt_logprobs": (),
    "regex_pattern": (),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "token_ban_ranges": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
# Of text-generation-webui and TabbyAPI, where dynamic temperature is off by limits of 1 and 1.
_LIMITS = frozenset({"min_temp", "max_temp", "dynatemp_low", "dynatemp_high"})

IGNORED = frozenset(
    {
        # Bookkeeping.
        "cache_prompt",
        "generate_window",
        "id_slot",
        "metadata",
        "max_tokens_second",
        "parallel_tool_calls",
        "priority",
        "prompt_cache_key",
        "prompt_lookup_num_tokens",
        "request_id",
        "return_progress",
        "safety_identifier",
        "service_tier",
        "slot_id",
        "speculative_ngram",
        "store",
        "timings_per_token",
        "truncation_length",
        "user",
        # Bounds on a scan that ours does not need, and on a cut that always leaves one token.
        "dry_early_exit_match_len",
        "dry_max_ngram",
        "dry_max_occurrences",
        "min_keep",
    }
)

# The samplers whose place a request may choose, by the parameter that names them, in no order.
STEPS = (
    "no_repeat_ngram", "repetition_penalty", "presence_frequency_penalty", "dry", "temperature", "smoothing", "nsigma",
    "min_p", "top_k", "top_p", "top_a", "tfs", "eta_cutoff", "epsilon_cutoff", "typical_p", "xtc", "skew",
)  # fmt: skip
STEP_NAMES: dict[str, str | tuple[str, ...]] = {
    "penalties": ("repetition_penalty", "presence_frequency_penalty"),
    "rep_pen": ("repetition_penalty", "presence_frequency_penalty"),
    "presence_penalty": "presence_frequency_penalty",
    "frequency_penalty": "presence_frequency_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "temp": "temperature",
    "dynatemp": "temperature",
    "dynamic_temperature": "temperature",
    "quadratic": "smoothing",
    "quadratic_sampling": "smoothing",
    "smoothing_factor": "smoothing",
    "top_n_sigma": "nsigma",
    "top_nsigma": "nsigma",
    "tfs_z": "tfs",
    "tail_free": "tfs",
    "eta": "eta_cutoff",
    "epsilon": "epsilon_cutoff",
    "typical": "typical_p",
    "typ_p": "typical_p",
    "top_p_top_k": ("top_k", "top_p"),
    # They have no place to choose: feedback samplers come last; the other is off.
    "mirostat": (),
    "adaptive_p": (),
    "encoder_repetition_penalty": (),
}
# https://github.com/LostRuins/koboldcpp, `sampler_order`. Aphrodite numbered its own samplers otherwise.
KOBOLD_IDS: tuple[str, ...] = ("top_k", "top_a", "top_p", "tfs", "typical_p", "temperature", "rep_pen")


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def step_names(name: Any) -> tuple[str, ...]:
    """Our steps for one entry of a sampler order: a name of any server, or one of Kobold's ids. UserError otherwise."""
    if isinstance(name, int) and not isinstance(name, bool):
        if not 0 <= name < len(KOBOLD_IDS):
            known = ", ".join(f"{i} {each}" for i, each in enumerate(KOBOLD_IDS))
            raise UserError(f"sampler_priority: there is no sampler {name}; Kobold's ids are {known}; give names else")
        name = KOBOLD_IDS[name]
    key = str(name).strip().lower().replace("-", "_")
    if key in STEPS:
        return (key,)
    if key not in STEP_NAMES:
        near = difflib.get_close_matches(key, [*STEPS, *STEP_NAMES], n=1)
        hint = f"did you mean {near[0]}?" if near else f"the samplers are {', '.join(STEPS)}"
        raise UserError(f"sampler_priority: unknown sampler {name!r}: {hint}")
    found = STEP_NAMES[key]
    return (found,) if isinstance(found, str) else found


def translate(request: Mapping[str, Any], neutral: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for SamplingParams from a client's `request`; `neutral` maps each of its fields to the default.

    None counts as absent. UserError for an unknown name, an unsupported parameter that would change the text, or two
    names of one parameter with different values.
    """
    request = _dynamic_temperature({name: value for name, value in request.items() if value is not None})
    params: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, value in request.items():
        target = ALIASES.get(name, name)
        if target in neutral:
            if target in params and params[target] != value:
                raise UserError(f"{sources[target]} and {name} are one parameter with two values: send one of them")
            params[target], sources[target] = value, name
        elif name in UNSUPPORTED:
            _check_unsupported(name, value)
        elif name not in IGNORED:
            raise UserError(f"unknown parameter {name}: {_suggestion(name, neutral)}")
    return params


def _dynamic_temperature(request: dict[str, Any]) -> dict[str, Any]:
    """dynatemp_range (temperature +- range: llama.cpp, Kobold) and the switch `dynamic_temperature` as min and max.

    Limits, where a client sends them, win over the range: SillyTavern sends both. Two that are equal under the names of
    _LIMITS stand for off.
    """
    spread = request.pop("dynatemp_range", 0)
    switch = request.pop("dynamic_temperature", None)
    limits = [name for name in request if ALIASES.get(name, name) in ("dynatemp_min", "dynatemp_max")]
    equal = len(limits) > 1 and all(request[name] == request[limits[0]] for name in limits)
    if switch is False or (switch is None and equal and _LIMITS.issuperset(limits)):
        request = {name: value for name, value in request.items() if name not in limits}
        limits = []
    if limits or not spread or switch is False:
        return request
    middle = request.get("temperature", request.get("temp", 1.0))
    if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in (spread, middle)):
        raise UserError(f"dynatemp_range must be a number, as temperature must, not {spread!r} and {middle!r}")
    return {**request, "dynatemp_min": max(0.0, middle - spread), "dynatemp_max": middle + spread}


def _check_unsupported(name: str, value: Any) -> None:
    """UserError unless `value` leaves the text as it is without the parameter."""
    values = UNSUPPORTED[name]
    if value not in ("", [], {}) and value not in values:
        otherwise = f" or set it to {values[0]!r}" if values else ""
        raise UserError(f"{name} is not supported (got {value!r}): remove it{otherwise}")
    _warn_once(f"{name} is not supported; its neutral value was accepted and has no effect")


def _suggestion(name: str, neutral: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, [*neutral, *ALIASES, *UNSUPPORTED], n=1)
    return f"did you mean {near[0]}?" if near else f"the sampling parameters are {', '.join(neutral)}"
