"""Sampling parameters a server sets for its clients: `bitsmith serve --sampler-preset FILE`.

The file is YAML or JSON in the layout of TabbyAPI's sampler overrides: `name: {override: value, force: true}`, or
`name: value`. A value is used where a request sends none; with `force` it replaces what a request sends; with
`additive` a list begins with it and goes on with what the request sends (`force` wins). Names are those a request may
use.
"""

from dataclasses import dataclass, field
from typing import Any

import yaml

from ..errors import UserError
from ..samplers.names import ALIASES
from ..samplers.params import SamplingParams

_KEYS = frozenset({"override", "force", "additive"})


def _ours(name: str) -> str:
    return ALIASES.get(name, name)


@dataclass(frozen=True)
class Preset:
    """What to do with each parameter, by our name for it."""

    defaults: dict[str, Any] = field(default_factory=dict)
    forced: dict[str, Any] = field(default_factory=dict)
    added: dict[str, list[Any]] = field(default_factory=dict)

    def apply(self, request: dict[str, Any]) -> dict[str, Any]:
        """The body of a request with the preset in it."""
        kept = {name: value for name, value in request.items() if value is not None and _ours(name) not in self.forced}
        sent = {_ours(name): name for name in kept}
        for name, values in self.added.items():
            if name in sent:
                asked = kept[sent[name]]
                kept[sent[name]] = [*values, *(asked if isinstance(asked, list) else [asked])]
        return {name: value for name, value in self.defaults.items() if name not in sent} | kept | self.forced


def read_preset(text: str, source: str) -> Preset:
    """The preset in a file's `text`; `source` names the file in the UserError for anything it must not hold."""
    try:
        found = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{source}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{source} must hold a mapping of parameters to values, such as `min_p: 0.05`")
    preset = Preset()
    for name, given in found.items():
        _add(preset, str(name), given, source)
    try:
        SamplingParams.from_request(preset.defaults | preset.forced)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return preset


def _add(preset: Preset, name: str, given: Any, source: str) -> None:
    # logit_bias and repetition_detection are objects themselves.
    rule = given if isinstance(given, dict) and "override" in given else {"override": given}
    if unknown := sorted(set(rule) - _KEYS):
        raise UserError(f"{source}: {name} has {unknown[0]!r}; known are override, force and additive")
    value, force, additive = rule["override"], rule.get("force", False), rule.get("additive", False)
    if not isinstance(force, bool) or not isinstance(additive, bool):
        raise UserError(f"{source}: force and additive of {name} must be true or false")
    if additive and not isinstance(value, list):
        raise UserError(f"{source}: {name} is additive, but its override is no list: make it one, or leave that out")
    if _ours(name) == "logprobs":
        raise UserError(f"{source}: logprobs does not shape the text and differs by API: remove it")
    if value is None:
        return
    (preset.forced if force else preset.defaults)[_ours(name)] = value
    if additive and not force:
        preset.added[_ours(name)] = value
