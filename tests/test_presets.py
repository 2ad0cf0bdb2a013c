"""Server presets: what a request gets, what it may change, and what a file must not hold."""

import re
from typing import Any

import pytest
from bitsmith.errors import UserError
from bitsmith.serve.presets import read_preset

FILE = """
temperature: 0.6
min_p: {override: 0.05}
top_k: {override: 40, force: true}
stop: {override: ["###"], additive: true}
banned_strings: {override: ["as an AI"], additive: true, force: false}
logit_bias: {"5": -1.0}
"""


def applied(text: str = FILE, **request: Any) -> dict[str, Any]:
    return read_preset(text, "file").apply(request)


def test_defaults_fill_what_is_absent() -> None:
    found = applied(prompt="a", stream=True, n=None)
    assert found == {
        "prompt": "a",
        "stream": True,
        "temperature": 0.6,
        "min_p": 0.05,
        "top_k": 40,
        "stop": ["###"],
        "banned_strings": ["as an AI"],
        "logit_bias": {"5": -1.0},
    }
    # null is absent, an alias is not.
    found = applied(temp=1.5, min_p=0.1, temperature=None)
    assert (found["temp"], found["min_p"]) == (1.5, 0.1) and "temperature" not in found


def test_force_replaces_whatever_name_it_was_sent_under() -> None:
    assert applied(top_k=5)["top_k"] == 40
    found = applied("temperature: {override: 0.5, force: true}", temp=2.0, temperature=1.0)
    assert found == {"temperature": 0.5}


def test_additive_lists_begin_with_the_preset() -> None:
    assert applied(stop=["x"])["stop"] == ["###", "x"]
    assert applied(stop="x")["stop"] == ["###", "x"]
    found = applied(stop_sequences=["x"])
    assert found["stop_sequences"] == ["###", "x"] and "stop" not in found


def test_json_is_yaml_and_aliases_are_known() -> None:
    assert applied('{"rep_pen": {"override": 1.1}, "dynatemp_range": 0.2}') == {
        "repetition_penalty": 1.1,
        "dynatemp_range": 0.2,
    }
    assert applied("") == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("temprature: 1", "file: unknown parameter temprature: did you mean temperature?"),
        ("top_p: {override: 2}", "file: top_p must be a number above 0 and at most 1, not 2"),
        ("top_p: {override: 0.5, froce: true}", "file: top_p has 'froce'; known are override, force and additive"),
        ("top_p: {override: 0.5, force: 1}", "file: force and additive of top_p must be true or false"),
        ("top_p: {override: 0.5, additive: true}", "file: top_p is additive, but its override is no list"),
        ("{sampler_priority: [top_q]}", "file: sampler_priority: unknown sampler 'top_q': did you mean top_"),
        ("logprobs: 5", "file: logprobs does not shape the text"),
        ("- a", "file must hold a mapping of parameters to values"),
        ("a: [", "file: while parsing"),
    ],
)
def test_files_with_mistakes_are_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        read_preset(text, "file")
