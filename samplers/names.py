"""Names other servers' clients send, and what becomes of them here.

Four tables, each checked by tests: ALIASES translate to our name; UNSUPPORTED names are accepted at their neutral value and refused, by
name, at any other, because silently ignoring a sampler is worse than an error; COMPANIONS tune another parameter and have no effect while
that one is neutral; IGNORED never influence the text. Anything else is a UserError that suggests the nearest known name.

Sources: the public request schemas of OpenAI, vLLM, Aphrodite, llama.cpp, TabbyAPI, KoboldCpp, Ollama, text-generation-webui.
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
    "freq_pen": "frequency_penalty",
    "pres_pen": "presence_penalty",
    "stop_sequence": "stop",
    "stop_sequences": "stop",
    "stopping_strings": "stop",
    "custom_stopping_strings": "stop",
    "sampler_seed": "seed",
    "n_probs": "logprobs",
}

# name: its neutral values. None and empty strings, lists and objects are neutral for all of them.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_bos_token": (True,),
    "adaptive_target": (-1,),
    "allowed_token_ids": (),
    "ban_eos_token": (False,),
    "bad_words": (),
    "banned_strings": (),
    "banned_tokens": (),
    "best_of": (1,),
    "cfg_scale": (1,),
    "custom_token_bans": (),
    "do_sample": (True,),
    "dry_multiplier": (0,),
    "dynamic_temperature": (False,),
    "dynatemp_max": (0,),
    "dynatemp_min": (0,),
    "dynatemp_range": (0,),
    "early_stopping": (False,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "grammar": (),
    "grammar_string": (),
    "guidance_scale": (1,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "length_penalty": (1,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "n": (1,),
    "negative_prompt": (),
    "no_repeat_ngram_size": (0,),
    "nsigma": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "post_sampling_probs": (False,),
    "prompt_logprobs": (),
    "regex_pattern": (),
    "repetition_detection": (),
    "return_tokens_as_token_ids": (False,),
    "sampler_order": (),
    "sampler_priority": (),
    "samplers": (),
    "skew": (0,),
    "smoothing_factor": (0,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "temperature_last": (False,),
    "tfs": (1,),
    "tfs_z": (1,),
    "thinking_token_budget": (),
    "token_ban_ranges": (),
    "token_healing": (False,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "truncate_prompt_tokens": (),
    "typical": (1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}

# name: the parameter it tunes. Any value is fine while that parameter is neutral.
COMPANIONS: dict[str, str] = {
    "adaptive_decay": "adaptive_target",
    "dry_allowed_length": "dry_multiplier",
    "dry_base": "dry_multiplier",
    "dry_penalty_last_n": "dry_multiplier",
    "dry_range": "dry_multiplier",
    "dry_sequence_breakers": "dry_multiplier",
    "dynatemp_exponent": "dynatemp_range",
    "mirostat_eta": "mirostat",
    "mirostat_tau": "mirostat",
    "penalty_last_n": "repetition_penalty",
    "penalty_range": "repetition_penalty",
    "rep_pen_range": "repetition_penalty",
    "rep_pen_slope": "repetition_penalty",
    "repeat_last_n": "repetition_penalty",
    "repetition_decay": "repetition_penalty",
    "repetition_penalty_range": "repetition_penalty",
    "repetition_range": "repetition_penalty",
    "smoothing_curve": "smoothing_factor",
    "xtc_threshold": "xtc_probability",
}

IGNORED = frozenset(
    {
        "cache_prompt",
        "id_slot",
        "metadata",
        "min_keep",
        "parallel_tool_calls",
        "priority",
        "prompt_cache_key",
        "request_id",
        "return_progress",
        "safety_identifier",
        "service_tier",
        "slot_id",
        "store",
        "timings_per_token",
        "user",
    }
)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def translate(request: Mapping[str, Any], neutral: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for SamplingParams from a client's `request`; `neutral` maps each of its fields to the default.

    None counts as absent. UserError for an unknown name, an unsupported parameter that would change the text, a companion of a parameter
    in use, or two names of one parameter with different values.
    """
    given = {name: value for name, value in request.items() if value is not None}
    params: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, value in given.items():
        target = ALIASES.get(name, name)
        if target in neutral:
            if target in params and params[target] != value:
                raise UserError(
                    f"{sources[target]} and {name} are the same parameter with different values: send one of them"
                )
            params[target], sources[target] = value, name
    for name, value in given.items():
        if ALIASES.get(name, name) not in neutral:
            _check_foreign(name, value, params, given, neutral)
    return params


def _check_foreign(
    name: str, value: Any, params: Mapping[str, Any], given: Mapping[str, Any], neutral: Mapping[str, Any]
) -> None:
    """UserError unless leaving `name` out cannot change the text."""
    if name in IGNORED:
        return
    if name in UNSUPPORTED:
        if not _is_neutral(name, value):
            raise UserError(f"{name} is not supported by this server (got {value!r}): remove it{_or_neutral(name)}")
        _warn_once(f"{name} is not supported; its neutral value was accepted and has no effect")
    elif name in COMPANIONS:
        tuned = COMPANIONS[name]
        in_use = params.get(tuned, neutral[tuned]) != neutral[tuned] if tuned in neutral else False
        if in_use:
            raise UserError(f"{name} is not supported by this server (got {value!r}): remove it; {tuned} works without")
        _warn_once(f"{name} is not supported; it has no effect while {tuned} is not in use")
    else:
        known = [*neutral, *ALIASES, *UNSUPPORTED, *COMPANIONS]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"the sampling parameters are {', '.join(neutral)}"
        raise UserError(f"unknown parameter {name}: {hint}")


def _is_neutral(name: str, value: Any) -> bool:
    return value in ("", [], {}) or value in UNSUPPORTED[name]


def _or_neutral(name: str) -> str:
    values = UNSUPPORTED[name]
    return f" or set it to {values[0]!r}" if values else ""
