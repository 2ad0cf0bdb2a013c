"""What a quantization is to end in: a model directory of some format, or one file (gguf_goal.py)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ..models.checkpoint import AnyCheckpoint
from ..quant_formats import base
from .plan import check_patterns, file_rules, head_rules
from .run import Run
from .stats import Squares
from .store import Store


@dataclass(frozen=True)
class Goal:
    """What the driver needs to know of it; made by `directory_goal` and `gguf_goal`."""

    fmt: base.Format
    recipe: base.Recipe
    # (run, its finished parts, its summary): puts the result where it belongs; what the summary says otherwise now.
    finish: Callable[[Run, Store, dict[str, Any]], dict[str, Any]]
    # What is known of the inputs of modules, by path.
    importance: Mapping[str, Squares] = field(default_factory=dict)
    # What else a run to be continued must have in common with this one (JSON).
    plan: Mapping[str, Any] = field(default_factory=dict)


def directory_goal(
    ckpt: AnyCheckpoint,
    model: PreTrainedModel,
    wanted: base.Options,
    recipe: str | None,
    head_bits: int | None,
    skip: Sequence[str],
) -> Goal:
    """A model directory in a format with a config.json. UserError for options and patterns that do not fit."""
    fmt = base.format_by_name(wanted.format)
    chosen = fmt.recipe(wanted)
    user_rules: tuple[base.Rule, ...] = tuple((pattern, "skip") for pattern in skip)
    user_rules += file_rules(recipe, chosen.default) if recipe else ()
    check_patterns(user_rules, [w.removesuffix(".weight") for w in ckpt.weights])
    chosen = chosen.with_rules((*user_rules, *head_rules(model, chosen, fmt, head_bits)))

    def finish(run: Run, store: Store, summary: dict[str, Any]) -> dict[str, Any]:
        sidecars = {fmt.SIDECAR: fmt.config(chosen)} if fmt.SIDECAR else {}
        store.finish(run.parts, run.config(summary), sidecars, ckpt.path, base.pickled(fmt, run.recipe))
        return {}

    return Goal(fmt, chosen, finish)
