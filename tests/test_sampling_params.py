"""SamplingParams: what is accepted, every message, other servers' names, and the flags made from the fields."""

import logging
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from bitsmith.errors import UserError
from bitsmith.samplers.names import ALIASES, IGNORED, PENALTY_RANGES, UNSUPPORTED, _warn_once
from bitsmith.samplers.params import SamplingParams, cli_fields

NAMES = {each.name for each in fields(SamplingParams)}


def test_defaults_are_neutral_and_spellings_of_one_meaning_are_equal() -> None:
    assert SamplingParams().is_neutral(*NAMES)
    spelled = SamplingParams(top_k=-1, seed=-1, max_tokens=-1, stop="x", stop_token_ids=[2], logit_bias={"7": 1})  # type: ignore[arg-type, dict-item]
    assert spelled == SamplingParams(max_tokens=None, stop=("x",), stop_token_ids=(2,), logit_bias={7: 1})
    assert SamplingParams(logit_bias={}) == SamplingParams()
    assert SamplingParams(temperature=np.float64(0.5)).temperature == 0.5
    assert SamplingParams(temperature=1e-6).greedy and not SamplingParams(temperature=1e-5).greedy


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", "hot", "temperature must be a number between 0 and 1000, not 'hot'"),
        ("temperature", -0.1, "temperature must be a number between 0 and 1000, not -0.1"),
        ("temperature", math.nan, "temperature must be a number between 0 and 1000, not nan"),
        ("temperature", 10**400, "temperature must be a number between 0 and 1000, not 1000"),
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
    tables = (NAMES, set(ALIASES), set(UNSUPPORTED), PENALTY_RANGES, IGNORED)
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


@pytest.mark.parametrize("name", sorted(PENALTY_RANGES))
def test_penalty_ranges_matter_only_with_a_penalty(name: str) -> None:
    assert SamplingParams.from_request({name: 64}) == SamplingParams()
    assert SamplingParams.from_request({name: -1, "rep_pen": 1.1}) == SamplingParams(repetition_penalty=1.1)
    for penalty in ("repeat_penalty", "presence_penalty", "frequency_penalty"):
        with pytest.raises(UserError) as error:
            SamplingParams.from_request({name: 64, penalty: 1.5})
        assert str(error.value) == f"{name} is not supported (got 64), penalties see all of the text: remove it"


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
    ],
)
def test_unknown_names_suggest_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError) as error:
        SamplingParams.from_request({name: 1})
    assert str(error.value) == f"unknown parameter {name}: did you mean {near}?"


def test_a_name_like_no_other_lists_the_parameters() -> None:
    with pytest.raises(UserError, match="unknown parameter zzz: the sampling parameters are temperature, top_k, top_p"):
        SamplingParams.from_request({"zzz": 1})


def test_every_field_is_a_flag() -> None:
    flags = {each.name: each for each in cli_fields()}
    assert set(flags) == NAMES and all(each.help for each in flags.values())
    assert flags["top_k"].flag == "--top-k" and flags["skip_special_tokens"].flag == "--no-skip-special-tokens"
    texts: dict[str, Any] = {"logit_bias": '{"5": 2}', "temperature": "0.5", "top_k": "4", "stop_token_ids": "7"}
    parsed = {name: flags[name].parse(text) for name, text in texts.items()}  # type: ignore[misc]
    wanted = SamplingParams(logit_bias={5: 2}, temperature=0.5, top_k=4, stop_token_ids=(7,))
    assert SamplingParams.from_request(parsed) == wanted
    assert [each.name for each in cli_fields() if each.repeat] == ["stop", "stop_token_ids"]
    assert [each.name for each in cli_fields() if each.parse is None] == [
        "ignore_eos",
        "skip_special_tokens",
        "include_stop_str_in_output",
    ]
