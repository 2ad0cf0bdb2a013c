"""Where each weight of a checkpoint goes in a transformers model.

transformers 5 builds some modules differently from the files: names change (block_sparse_moe -> mlp) and a layer's
experts are one stacked parameter. Its conversion mapping says how; this module turns it into a list of placements, one
per model tensor, so that the loader and the quantization driver read the same plan.
"""

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


@dataclass(frozen=True)
class Placement:
    """One model tensor and the checkpoint weights it is made of."""

    # Name in model.state_dict(); with a converter that has several targets, the first of them.
    target: str
    # Checkpoint names, in the order the converter wants them.
    sources: tuple[str, ...]
    # The source pattern each of them matched; empty without a converter.
    patterns: tuple[str, ...] = ()
    converter: WeightConverter | None = None

    def convert(self, tensors: Iterable[Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """Source tensors (same order) -> {target name: tensor}."""
        if self.converter is None:
            (only,) = tensors
            return {self.target: only}
        work = copy.deepcopy(self.converter)
        for source, pattern, tensor in zip(self.sources, self.patterns, tensors, strict=True):
            work.add_tensor(self.target, source, pattern, tensor)  # type: ignore[arg-type]
        made: dict[str, Any] = work.convert(self.target, model=model, config=model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    @property
    def stack(self) -> list[list[str]] | None:
        """Per expert, the sources stacked along output rows: for a converter that only merges experts (and joins gate
        with up).

        None where the conversion does anything else.
        """
        if self.converter is None:
            return None
        kinds = [type(op).__name__ for op in self.converter.operations]
        joins = [getattr(op, "dim", None) for op in self.converter.operations]
        if (kinds, joins) not in ((["MergeModulelist"], [0]), (["MergeModulelist", "Concatenate"], [0, 1])):
            return None
        by_pattern: dict[str, list[str]] = {p: [] for p in self.converter.source_patterns}
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            by_pattern[pattern].append(source)
        return [list(expert) for expert in zip(*by_pattern.values(), strict=True)]


def natural(name: str) -> list[Any]:
    """Sort key that puts experts.10 after experts.9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def placements(model: PreTrainedModel, weights: Iterable[str]) -> list[Placement]:
    """The plan for `weights` (checkpoint names), in checkpoint order of their first source."""
    rename = renamer(model)
    plain: dict[str, Placement] = {}
    gathered: dict[str, list[tuple[str, str]]] = {}
    owner: dict[str, WeightConverter] = {}
    for name in sorted(weights, key=natural):
        target, pattern, converter = rename(name)
        if pattern is None or converter is None:
            plain[target] = Placement(target, (name,))
        else:
            gathered.setdefault(target, []).append((name, pattern))
            owner[target] = converter
    made = [
        Placement(target, tuple(n for n, _ in found), tuple(p for _, p in found), owner[target])
        for target, found in gathered.items()
    ]
    return [*plain.values(), *made]


def renamer(model: PreTrainedModel) -> Callable[[str], tuple[str, str | None, WeightConverter | None]]:
    """A function: checkpoint name -> (model name, source pattern, converter); the last two None for a plain rename."""
    mapping = get_model_conversion_mapping(model)
    renames = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = dict.fromkeys(model.state_dict().keys(), 1)

    def rename(name: str) -> tuple[str, str | None, WeightConverter | None]:
        target, pattern = rename_source_key(name, renames, converters, model.base_model_prefix, state)
        return target, pattern, by_pattern[pattern] if pattern is not None else None

    return rename
