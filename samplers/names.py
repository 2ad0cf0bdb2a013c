"""Names other servers' clients send, and what becomes of them here.

ALIASES translate to our name. UNSUPPORTED names are accepted at their neutral value and refused, by name, at any other:
silently ignoring a sampler is worse than an error. PENALTY_RANGES have no effect while no penalty is on. IGNORED never
influence the text. Anything else is a UserError that suggests the nearest known name.

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

# How far back penalties look. Ours see the whole prompt and output, which -1 asks for.
PENALTY_RANGES = frozenset(
    {
        "penalty_last_n",
        "penalty_range",
        "rep_pen_range",
        "rep_pen_slope",
        "repeat_last_n",
        "repetition_decay",
        "repetition_penalty_range",
        "repetition_range",
    }
)
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")

IGNORED = frozenset(
    {
        # Bookkeeping.
        "cache_prompt",
        "id_slot",
        "metadata",
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
        # These only tune a sampler of UNSUPPORTED, which is off if the request gets this far.
        "adaptive_decay",
        "dry_allowed_length",
        "dry_base",
        "dry_penalty_last_n",
        "dry_range",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "min_keep",
        "mirostat_eta",
        "mirostat_tau",
        "smoothing_curve",
        "xtc_threshold",
    }
)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def translate(request: Mapping[str, Any], neutral: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for SamplingParams from a client's `request`; `neutral` maps each of its fields to the default.

    None counts as absent. UserError for an unknown name, an unsupported parameter that would change the text, or two
    names of one parameter with different values.
    """
    params: dict[str, Any] = {}
    sources: dict[str, str] = {}
    foreign: dict[str, Any] = {}
    for name, value in request.items():
        target = ALIASES.get(name, name)
        if value is None:
            continue
        if target not in neutral:
            foreign[name] = value
        elif target in params and params[target] != value:
            raise UserError(f"{sources[target]} and {name} are one parameter with two values: send one of them")
        else:
            params[target], sources[target] = value, name
    penalised = any(params.get(name, neutral[name]) != neutral[name] for name in _PENALTIES)
    for name, value in foreign.items():
        if name in UNSUPPORTED:
            _check_unsupported(name, value)
        elif name in PENALTY_RANGES:
            if penalised and value != -1:
                raise UserError(f"{name} is not supported (got {value!r}), penalties see all of the text: remove it")
        elif name not in IGNORED:
            raise UserError(f"unknown parameter {name}: {_suggestion(name, neutral)}")
    return params


def _check_unsupported(name: str, value: Any) -> None:
    """UserError unless `value` leaves the text as it is without the parameter."""
    values = UNSUPPORTED[name]
    if value not in ("", [], {}) and value not in values:
        otherwise = f" or set it to {values[0]!r}" if values else ""
        raise UserError(f"{name} is not supported (got {value!r}): remove it{otherwise}")
    _warn_once(f"{name} is not supported; its neutral value was accepted and has no effect")


def _suggestion(name: str, neutral: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, [*neutral, *ALIASES, *UNSUPPORTED, *PENALTY_RANGES], n=1)
    return f"did you mean {near[0]}?" if near else f"the sampling parameters are {', '.join(neutral)}"
