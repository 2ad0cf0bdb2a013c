"""Sampling parameters as flags, one for every field of `SamplingParams`: a new sampler needs no line here.

Values are checked by `SamplingParams` itself, so the messages are those of the HTTP server.
"""

import argparse
from typing import Any

from ..samplers.params import CliField, SamplingParams, cli_fields


def _how(field: CliField) -> dict[str, Any]:
    """The keyword arguments of `add_argument` for one field."""
    if field.parse is None:
        return {"action": "store_false" if field.default else "store_true"}
    return {
        "action": "append" if field.repeat else "store",
        "type": field.parse,
        "metavar": {str: "TEXT", int: "N", float: "X"}.get(field.parse, "JSON"),  # type: ignore[call-overload]
    }


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; those not given stay out of the namespace."""
    group = parser.add_argument_group("sampling")
    for field in cli_fields():
        text = field.help.replace("%", "%%")
        group.add_argument(field.flag, dest=field.name, default=argparse.SUPPRESS, help=text, **_how(field))


def params(args: argparse.Namespace, **defaults: Any) -> SamplingParams:
    """The sampling parameters among `args`, over `defaults`. UserError for a value out of range."""
    given = {field.name: getattr(args, field.name) for field in cli_fields() if hasattr(args, field.name)}
    return SamplingParams.from_request(defaults | given)
