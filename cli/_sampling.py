"""Sampling parameters as flags, one for every field of `SamplingParams`: a new sampler needs no line here.

A field `min_p: float` is the flag `--min-p 0.05`; a sequence is a flag that may be repeated; a mapping takes
`KEY=VALUE` and may be repeated. Values are checked by `SamplingParams` itself, so the messages are those of the HTTP
server.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ..samplers.params import SamplingParams


def _kinds(hint: Any) -> list[Any]:
    """The types a field accepts, None aside."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _kinds(part)]
    return [] if hint is type(None) else [hint]


def _pair(key: Callable[[str], Any], value: Callable[[str], Any]) -> Callable[[str], tuple[Any, Any]]:
    def pair(text: str) -> tuple[Any, Any]:
        left, _, right = text.partition("=")
        return key(left), value(right)

    return pair


def _arguments(hint: Any) -> dict[str, Any]:
    """How argparse reads a field of type `hint`."""
    kinds = _kinds(hint)
    for kind in kinds:
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if origin in (dict, Mapping):
            return {"action": "append", "type": _pair(*inner), "metavar": "KEY=VALUE"}
        if origin is not None and origin is not typing.Literal:
            return {"action": "append", "type": inner[0], "metavar": inner[0].__name__.upper()}
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    kind = float if float in kinds else int if int in kinds else str
    return {"type": kind, "metavar": kind.__name__.upper()}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare one flag per field of `SamplingParams`."""
    group = parser.add_argument_group("sampling")
    hints = typing.get_type_hints(SamplingParams)
    for field in dataclasses.fields(SamplingParams):
        group.add_argument(_flag(field.name), default=argparse.SUPPRESS, **_arguments(hints[field.name]))


def params(args: argparse.Namespace) -> SamplingParams:
    """The sampling parameters among `args`. UserError for a value out of range."""
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    hints = typing.get_type_hints(SamplingParams)
    given = {name: value for name, value in vars(args).items() if name in names}
    for name, value in given.items():
        if "KEY=VALUE" in _arguments(hints[name]).values():
            given[name] = dict(value)
    return SamplingParams.from_request(given)
