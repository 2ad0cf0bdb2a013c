"""SamplingParams: what is accepted, every message, other servers' names, and the flags made from the fields."""

import logging
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from bitsmith.errors import UserError
from bitsmith.samplers.names import ALIASES, IGNORED, UNSUPPORTED, _warn_once
from bitsmith.samplers.params import SamplingParams, cli_fields

NAMES = {each.name for each in fields(SamplingParams)}


def test_defaults_are_neutral_and_spellings_of_one_meaning_are_equal() -> None:
    assert SamplingParams().is_neutral(*NAMES)
    spelled = SamplingParams(top_k=-1, seed=-1, max_tokens=-1, stop="x", stop_token_ids=[2], logit_bias={"7": 1})  # type: ignore[arg-type, dict-item]
    assert spelled == SamplingParams(max_tokens=None, stop=("x",), stop_token_ids=(2,), logit_bias={7: 1})
    assert SamplingParams(logit_bias={}) == SamplingParams()
    assert SamplingParams(temperature=np.float64(0.5)).temperature == 0.5
    neutral = {
        "nsigma": -1, "dry_range": -1, "thinking_token_budget": -1, "repetition_detection": {}, "repetition_slope": 0,
        "negative_prompt": None, "adaptive_target": -0.3, "mirostat_mode": False, "banned_tokens": [], "bad_words": [],
        "allowed_token_ids": "", "sampler_priority": [],
    }  # fmt: skip
    assert SamplingParams(**neutral) == SamplingParams()
    assert SamplingParams(banned_tokens="5, 6").banned_tokens == (5, 6)  # type: ignore[arg-type]
    assert SamplingParams(banned_strings='["a", "b"]').banned_strings == ("a", "b")  # type: ignore[arg-type]
    # No list after all.
    assert SamplingParams(banned_strings="[a").banned_strings == ("[a",)  # type: ignore[arg-type]
    breakers = ('["\\n", ":"]', '"\\n", ":"', ["\n", ":"])
    assert {SamplingParams(dry_sequence_breakers=each).dry_sequence_breakers for each in breakers} == {("\n", ":")}  # type: ignore[arg-type]
    assert SamplingParams(dry_sequence_breakers='"').dry_sequence_breakers == ('"',)  # type: ignore[arg-type]
    assert SamplingParams(logit_bias=[[3, 1.5], ["4", -2]]).logit_bias == {3: 1.5, 4: -2}  # type: ignore[arg-type]
    assert SamplingParams(temperature=1e-6).greedy and not SamplingParams(temperature=1e-5).greedy


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", "hot", "temperature must be a number between 0 and 1000, not 'hot'"),
        ("temperature", -0.1, "temperature must be a number between 0 and 1000, not -0.1"),
        ("temperature", math.nan, "temperature must be a number between 0 and 1000, not nan"),
        ("temperature", 10**400, "temperature must be a number between 0 and 1000, not 1000"),
        ("dry_range", 10**400, "dry_range must be an integer between 0 and 9007199254740992, not 1000"),
        ("top_a", math.inf, "top_a must be a number between 0 and 9007199254740992, not inf"),
        ("top_a", math.nan, "top_a must be a number of at least 0, not nan"),
        ("temperature", None, "temperature must be a number between 0 and 1000, not None"),
        ("top_k", 1.5, "top_k must be an integer between 0 and 2147483647, not 1.5"),
        ("top_k", True, "top_k must be an integer between 0 and 2147483647, not True"),
        ("top_k", -2, "top_k must be an integer between 0 and 2147483647, not -2"),
        ("top_p", 0, "top_p must be a number above 0 and at most 1, not 0"),
        ("top_p", 1.01, "top_p must be a number above 0 and at most 1, not 1.01"),
        ("min_p", -1, "min_p must be a number between 0 and 1, not -1"),
        ("repetition_penalty", 0, "repetition_penalty must be a number between 0.001 and 1000, not 0"),
        ("presence_penalty", 2.5, "presence_penalty must be a number between -2 and 2, not 2.5"),
        ("frequency_penalty", -3, "frequency_penalty must be a number between -2 and 2, not -3"),
        ("logit_bias", [1], "logit_bias must be an object of token id -> bias between -100 and 100, or null, not [1]"),
        ("logit_bias", {"a": 1}, "logit_bias: the key must be a token id (an integer of at least 0), not 'a'"),
        ("logit_bias", {-1: 1}, "logit_bias: the key must be a token id (an integer of at least 0), not -1"),
        ("logit_bias", {3: 101}, "logit_bias[3] must be a number between -100 and 100, not 101"),
        ("logit_bias", {3: None}, "logit_bias[3] must be a number between -100 and 100, not None"),
        ("seed", 2**63, "seed must be an integer between -9223372036854775808 and 9223372036854775807 or null"),
        ("stop", 5.0, "stop must be a list, each item a string that is not empty, not 5.0"),
        ("stop", ["a", ""], "stop[1] must be a string that is not empty, not ''"),
        ("stop", [5], "stop[0] must be a string that is not empty, not 5"),
        ("stop_token_ids", [-1], "stop_token_ids[0] must be a token id (an integer of at least 0), not -1"),
        ("stop_token_ids", [1.0], "stop_token_ids[0] must be a token id (an integer of at least 0), not 1.0"),
        ("ignore_eos", 1, "ignore_eos must be true or false, not 1"),
        ("max_tokens", 0, "max_tokens must be an integer of at least 1 or null, not 0"),
        ("min_tokens", -1, "min_tokens must be an integer of at least 0, not -1"),
        ("min_tokens", 17, "min_tokens is 17, above max_tokens (16): lower the first or raise the second"),
        ("top_a", -1, "top_a must be a number of at least 0, not -1"),
        ("tfs", 0, "tfs must be a number above 0 and at most 1, not 0"),
        ("typical_p", 1.5, "typical_p must be a number between 0 and 1, not 1.5"),
        ("mirostat_mode", 3, "mirostat_mode must be an integer between 0 and 2, not 3"),
        ("mirostat_mode", True, "mirostat_mode must be an integer between 0 and 2, not True"),
        ("adaptive_target", 1.5, "adaptive_target must be a number between -1 and 1, not 1.5"),
        ("adaptive_target", -2, "adaptive_target must be a number between -1 and 1, not -2"),
        ("dynatemp_exponent", 0, "dynatemp_exponent must be a number above 0 and at most 100, not 0"),
        ("dynatemp_min", 1, "dynatemp_min is 1, above dynatemp_max (0.0): lower the first or raise the second"),
        ("repetition_slope", 1.5, "repetition_slope must be a number above 0 and at most 1, not 1.5"),
        ("dry_base", 0.5, "dry_base must be a number between 1 and 1000, not 0.5"),
        ("dry_sequence_breakers", [1], "dry_sequence_breakers[0] must be a string that is not empty, not 1"),
        ("banned_tokens", "5, x", "banned_tokens[1] must be a token id (an integer of at least 0), not 'x'"),
        ("allowed_token_ids", 2.5, "allowed_token_ids must be a list, each item a token id (an integer of at least 0)"),
        (
            "logit_bias",
            [[1]],
            "logit_bias must be an object of token id -> bias between -100 and 100, or null, not [[1]]",
        ),
        ("logit_bias", [[1, False]], "logit_bias[1] must be a number between -100 and 100, not False"),
        ("negative_prompt", 5, "negative_prompt must be a string, not 5"),
        ("token_healing", "yes", "token_healing must be true or false, not 'yes'"),
        ("thinking_token_budget", -2, "thinking_token_budget must be an integer of at least 0 or null, not -2"),
        ("repetition_detection", {"size": 2}, "repetition_detection must be an object with max_pattern_size, min_patt"),
        (
            "repetition_detection",
            {"min_count": 1},
            "repetition_detection.min_count must be an integer of at least 2, not 1",
        ),
        ("repetition_detection", {"min_count": 2}, "repetition_detection: max_pattern_size must be given and at least"),
        (
            "repetition_detection",
            {"max_pattern_size": 2, "min_pattern_size": 3},
            "repetition_detection: max_pattern_size",
        ),
        ("logprobs", -1, "logprobs must be an integer of at least 0 or null, not -1"),
        ("skip_special_tokens", "no", "skip_special_tokens must be true or false, not 'no'"),
        ("include_stop_str_in_output", None, "include_stop_str_in_output must be true or false, not None"),
    ],
)
def test_messages(name: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        SamplingParams(**{name: value})
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 200


def test_two_samplers_that_steer_are_refused() -> None:
    with pytest.raises(
        UserError, match="mirostat_mode and adaptive_target both steer the text: switch one of them off"
    ):
        SamplingParams(mirostat_mode=2, adaptive_target=0.5)


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "bad_words", "allowed_token_ids", "dry_sequence_breakers"])
def test_none_is_an_empty_list(name: str) -> None:
    assert getattr(SamplingParams(**{name: None}), name) == ()


def test_aliases() -> None:
    assert set(ALIASES.values()) <= NAMES and not NAMES & set(ALIASES)
    request = {
        "temp": 0.5,
        "n_predict": 7,
        "repeat_penalty": 1.2,
        "stop_sequence": ["x"],
        "sampler_seed": 3,
        "n_probs": 2,
    }
    wanted = SamplingParams(temperature=0.5, max_tokens=7, repetition_penalty=1.2, stop=("x",), seed=3, logprobs=2)
    assert SamplingParams.from_request(request) == wanted
    assert SamplingParams.from_request({"max_completion_tokens": 9, "max_tokens": 9}).max_tokens == 9
    assert SamplingParams.from_request({"top_k": None, "dry_multiplier": None, "anything": None}) == SamplingParams()
    with pytest.raises(UserError, match="n_predict and max_tokens are one parameter with two values: send one of them"):
        SamplingParams.from_request({"n_predict": 5, "max_tokens": 6})


def test_tables_do_not_overlap() -> None:
    tables = (NAMES, set(ALIASES), set(UNSUPPORTED), IGNORED, {"dynatemp_range", "dynamic_temperature"})
    assert sum(map(len, tables)) == len(set().union(*tables))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_parameters_pass_when_neutral_and_are_named_otherwise(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_once.cache_clear()
    for value in (*UNSUPPORTED[name], "", [], {}, None):
        assert SamplingParams.from_request({name: value, "top_k": 3}) == SamplingParams(top_k=3)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{name} is not supported; its neutral value was accepted" in caplog.text
    with pytest.raises(UserError) as error:
        SamplingParams.from_request({name: 0.123})
    assert str(error.value).startswith(f"{name} is not supported (got 0.123): remove it")
    if UNSUPPORTED[name]:
        assert str(error.value).endswith(f" or set it to {UNSUPPORTED[name][0]!r}")


# What clients of each server send when nothing was chosen: their schemas' defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "OpenAI": {"temperature": 1, "top_p": 1, "n": 1, "logit_bias": None, "presence_penalty": 0, "frequency_penalty": 0, "user": "x",
               "stop": None, "seed": None, "parallel_tool_calls": True, "service_tier": "auto"},
    "vLLM": {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "stop_token_ids": [], "ignore_eos": False,
             "min_tokens": 0, "skip_special_tokens": True, "spaces_between_special_tokens": True, "use_beam_search": False,
             "include_stop_str_in_output": False, "bad_words": [], "allowed_token_ids": None, "truncate_prompt_tokens": None,
             "prompt_logprobs": None, "guided_json": None, "structured_outputs": None, "priority": 0, "best_of": 1},
    "Aphrodite": {"temperature_last": False, "dynatemp_min": 0, "dynatemp_max": 0, "dynatemp_exponent": 1, "top_a": 0, "tfs": 1,
                  "eta_cutoff": 0, "epsilon_cutoff": 0, "typical_p": 1, "nsigma": 0, "smoothing_factor": 0, "smoothing_curve": 1,
                  "xtc_threshold": 0.1, "xtc_probability": 0, "skew": 0, "no_repeat_ngram_size": 0, "dry_multiplier": 0,
                  "dry_base": 1.75, "dry_allowed_length": 2, "dry_range": 0, "dry_max_ngram": 12, "dry_max_occurrences": 8,
                  "dry_early_exit_match_len": 8, "mirostat_mode": 0, "seed": -1, "thinking_token_budget": None, "token_ban_ranges": None},
    "llama.cpp": {"dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "typical_p": 1.0, "repeat_penalty": 1.0, "repeat_last_n": -1,
                  "mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "dry_penalty_last_n": -1, "top_n_sigma": -1.0,
                  "adaptive_target": -1.0, "adaptive_decay": 0.9, "min_keep": 0, "n_probs": 0, "n_predict": -1, "id_slot": -1,
                  "cache_prompt": True, "post_sampling_probs": False, "timings_per_token": False, "grammar": "", "logit_bias": []},
    "TabbyAPI": {"min_temp": 1.0, "max_temp": 1.0, "temp_exponent": 1.0, "typical": 1.0, "penalty_range": -1, "repetition_decay": 0,
                 "cfg_scale": 1.0, "banned_strings": [], "banned_tokens": [], "allowed_tokens": [], "token_healing": False,
                 "mirostat": False, "mirostat_mode": 0, "add_bos_token": True, "ban_eos_token": False, "negative_prompt": None,
                 "speculative_ngram": None, "generate_window": 512, "json_schema": None, "regex_pattern": None, "stop": []},
    "KoboldCpp": {"rep_pen": 1.0, "rep_pen_range": -1, "rep_pen_slope": 1.0, "tfs": 1, "typical": 1, "top_a": 0, "sampler_seed": -1,
                  "sampler_order": [], "stop_sequence": [], "dynatemp_range": 0, "grammar": "", "max_length": -1},
    "text-generation-webui": {"dynamic_temperature": False, "dynatemp_low": 1, "dynatemp_high": 1, "encoder_repetition_penalty": 1,
                              "penalty_alpha": 0, "guidance_scale": 1, "do_sample": True, "custom_token_bans": "", "num_beams": 1,
                              "early_stopping": False, "truncation_length": 4096, "prompt_lookup_num_tokens": 0, "grammar_string": "",
                              "max_tokens_second": 0, "auto_max_new_tokens": False, "seed": -1, "sampler_priority": None,
                              "dry_sequence_breakers": '"\\n", ":", "\\"", "*"', "max_new_tokens": -1, "min_length": 0},
}  # fmt: skip


@pytest.mark.parametrize("server", DEFAULTS)
def test_the_defaults_of_every_server_are_neutral(server: str) -> None:
    params = SamplingParams.from_request({"max_tokens": None, **DEFAULTS[server]})
    engine = {"max_tokens", "logprobs", "repetition_penalty_range", "sampler_priority"}
    assert [name for name in sorted(NAMES - engine) if not params.is_neutral(name)] == []


CHOSEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama.cpp": (
        {"temperature": 0.8, "dynatemp_range": 0.5, "typ_p": 0.9, "top_n_sigma": 1.5, "repeat_penalty": 1.1, "repeat_last_n": 64,
         "samplers": ["top_k", "min_p", "temperature"], "mirostat": 2, "dry_penalty_last_n": 128, "thinking_budget": 9},
        {"temperature": 0.8, "dynatemp_min": 0.8 - 0.5, "dynatemp_max": 1.3, "nsigma": 1.5, "repetition_penalty": 1.1, "typical_p": 0.9,
         "repetition_penalty_range": 64, "sampler_priority": ("top_k", "min_p", "temperature"), "mirostat_mode": 2,
         "dry_range": 128, "thinking_token_budget": 9},
    ),
    "TabbyAPI": (
        {"min_temp": 0.5, "max_temp": 2, "temp_exponent": 1.5, "typical": 0.8, "penalty_range": 512, "repetition_decay": 128,
         "cfg_scale": 2, "allowed_tokens": "5,6", "custom_token_bans": "7"},
        {"dynatemp_min": 0.5, "dynatemp_max": 2, "dynatemp_exponent": 1.5, "typical_p": 0.8, "repetition_penalty_range": 512,
         "repetition_decay": 128, "guidance_scale": 2, "allowed_token_ids": (5, 6), "banned_tokens": (7,)},
    ),
    "KoboldCpp": (
        {"max_length": 80, "rep_pen": 1.1, "rep_pen_range": 320, "rep_pen_slope": 0.7, "typical": 0.9, "tfs": 0.95, "sampler_seed": 4,
         "stop_sequence": ["x"], "sampler_order": [6, 5]},
        {"max_tokens": 80, "repetition_penalty": 1.1, "repetition_penalty_range": 320, "repetition_slope": 0.7, "typical_p": 0.9,
         "tfs": 0.95, "seed": 4, "stop": ("x",), "sampler_priority": ("repetition_penalty", "presence_frequency_penalty", "temperature")},
    ),
    "SillyTavern": (
        {"dynamic_temperature": True, "dynatemp_low": 0.1, "dynatemp_high": 0.7, "dynatemp_range": 0.3, "temperature": 0.4,
         "typical_p": 0.9, "typical": 0.9, "max_tokens": 50, "max_new_tokens": 50, "stop": ["a"], "stopping_strings": ["a"],
         "banned_phrases": ["tapestry"]},
        {"dynatemp_min": 0.1, "dynatemp_max": 0.7, "temperature": 0.4, "typical_p": 0.9, "max_tokens": 50, "stop": ("a",),
         "banned_strings": ("tapestry",)},
    ),
    "text-generation-webui": (
        {"dynamic_temperature": False, "dynatemp_low": 0.1, "dynatemp_high": 0.7, "min_new_tokens": 3, "custom_stopping_strings": "a"},
        {"min_tokens": 3, "stop": ("a",)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("client", CHOSEN)
def test_what_clients_choose_is_translated(client: str) -> None:
    request, wanted = CHOSEN[client]
    assert SamplingParams.from_request(request) == SamplingParams(**wanted)


@pytest.mark.parametrize(
    ("request_", "low", "high"),
    [
        ({"dynatemp_range": 2, "temp": 0.5}, 0.0, 2.5),
        ({"dynamic_temperature": True, "dynatemp_low": 1, "dynatemp_high": 1}, 1, 1),
        ({"dynatemp_min": 1, "dynatemp_max": 1}, 1, 1),
        ({"dynamic_temperature": False, "dynatemp_range": 0.4}, 0, 0),
        ({"max_temp": 1.5}, 0, 1.5),
        ({"min_temp": 1, "max_temp": 1, "dynatemp_range": 0.5}, 0.5, 1.5),
    ],
)
def test_limits_of_dynamic_temperature(request_: Mapping[str, Any], low: float, high: float) -> None:
    params = SamplingParams.from_request(request_)
    assert (params.dynatemp_min, params.dynatemp_max) == (low, high)


def test_a_range_that_is_no_number_is_named() -> None:
    with pytest.raises(UserError, match="dynatemp_range must be a number, as temperature must, not 'x'"):
        SamplingParams.from_request({"dynatemp_range": "x"})


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_names_that_never_change_the_text_are_ignored(name: str) -> None:
    assert SamplingParams.from_request({name: "anything"}) == SamplingParams()


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("temprature", "temperature"),
        ("top-k", "top_k"),
        ("repeat_penality", "repeat_penalty"),
        ("xtc_prob", "xtc_probability"),
        ("dry_multipler", "dry_multiplier"),
        ("typical_q", "typical_p"),
    ],
)
def test_unknown_names_suggest_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError) as error:
        SamplingParams.from_request({name: 1})
    assert str(error.value) == f"unknown parameter {name}: did you mean {near}?"


def test_a_name_like_no_other_lists_the_parameters() -> None:
    with pytest.raises(
        UserError, match="unknown parameter zzz: the sampling parameters are temperature, temperature_last"
    ):
        SamplingParams.from_request({"zzz": 1})


def test_every_field_is_a_flag() -> None:
    flags = {each.name: each for each in cli_fields()}
    assert set(flags) == NAMES and all(each.help for each in flags.values())
    assert flags["top_k"].flag == "--top-k" and flags["skip_special_tokens"].flag == "--no-skip-special-tokens"
    texts: dict[str, Any] = {"logit_bias": '{"5": 2}', "temperature": "0.5", "top_k": "4", "stop_token_ids": "7"}
    parsed = {name: flags[name].parse(text) for name, text in texts.items()}  # type: ignore[misc]
    wanted = SamplingParams(logit_bias={5: 2}, temperature=0.5, top_k=4, stop_token_ids=(7,))
    assert SamplingParams.from_request(parsed) == wanted
    lists = {each.name for each in cli_fields() if each.repeat}
    assert lists == {each.name for each in fields(SamplingParams) if isinstance(each.default, tuple)} - {
        "sampler_priority"
    }
    switches = {each.name for each in cli_fields() if each.parse is None}
    assert switches == {each.name for each in fields(SamplingParams) if isinstance(each.default, bool)}


def test_every_field_says_what_it_accepts() -> None:
    for each in fields(SamplingParams):
        assert {"kind", "help"} <= set(each.metadata) and each.metadata["help"]
        with pytest.raises(UserError, match=each.name):
            SamplingParams(**{each.name: object()})
