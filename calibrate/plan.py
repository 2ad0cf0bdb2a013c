"""What is to be quantized: every weight of a model that the recipe gives a spec, checked before any work is done."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..kernels.spec import Spec
from ..models.checkpoint import AnyCheckpoint
from ..models.linear import is_experts, is_linear
from ..models.load import owner
from ..models.names import Placement
from ..quant_formats.base import Format, Recipe, Rule, matches


@dataclass(frozen=True)
class Item:
    """One weight to quantize: a linear's, or one expert's share of a stacked parameter."""

    # Checkpoint name of the module ("X" of X.weight) and of its spec.
    module: str
    spec: Spec
    # Model parameter that holds it, and the stats key of its input.
    target: str
    key: str
    shape: tuple[int, int]
    # Expert and first row within the stacked parameter; None for a linear.
    expert: tuple[int, int] | None = None

    def live(self, model: nn.Module) -> Tensor:
        """The weight as it sits in the model, [N, K]: writing to it changes the model."""
        module, leaf = owner(model, self.target)
        assert module is not None
        parameter: Tensor = module._parameters[leaf]  # type: ignore[assignment]
        if self.expert is None:
            return parameter.data
        index, row = self.expert
        return parameter.data[index, row : row + self.shape[0]]


def items_of(model: PreTrainedModel, placement: Placement, recipe: Recipe, fmt: Format) -> list[Item]:
    """The weights of one placement that the recipe quantizes, each with its spec as the layout takes it for that
    shape.
    """
    module, leaf = owner(model, placement.target)
    if module is None:
        return []
    path = placement.target.removesuffix(f".{leaf}")
    if placement.converter is None and is_linear(module) and leaf == "weight":
        name = placement.sources[0].removesuffix(".weight")
        spec = recipe.spec(name)
        shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
        return [] if spec is None else [Item(name, fmt.shaped(spec, shape), placement.target, path, shape)]
    if not is_experts(module) or placement.stack is None or module.is_transposed:
        return []
    parameter: Tensor = module._parameters[leaf]  # type: ignore[assignment]
    found = []
    for expert, sources in enumerate(placement.stack):
        rows = parameter.shape[1] // len(sources)
        for position, source in enumerate(sources):
            name = source.removesuffix(".weight")
            spec = recipe.spec(name)
            if spec is not None:
                shape = (rows, parameter.shape[2])
                key, place = f"{path}/{leaf}/{expert}", (expert, position * rows)
                found.append(Item(name, fmt.shaped(spec, shape), placement.target, key, shape, place))
    return found


def input_keys(model: PreTrainedModel, placement: Placement) -> dict[str, tuple[str, ...]]:
    """Checkpoint weight -> the stats keys of the inputs it is multiplied with, for each weight of a placement that is
    one of a linear or of experts: one key, or one an expert where the checkpoint, too, stacks them.
    """
    module, leaf = owner(model, placement.target)
    path = placement.target.removesuffix(f".{leaf}")
    if module is not None and is_linear(module) and leaf == "weight" and placement.converter is None:
        return {placement.sources[0]: (path,)}
    parameter = None if module is None else module._parameters.get(leaf)
    if module is None or parameter is None or not is_experts(module) or parameter.dim() != 3:
        return {}
    keys = [f"{path}/{leaf}/{expert}" for expert in range(parameter.shape[0])]
    if placement.converter is None:
        return {placement.sources[0]: tuple(keys)}
    if placement.stack is None:
        return {}
    return {source: (key,) for key, sources in zip(keys, placement.stack, strict=True) for source in sources}


def check_shapes(items: list[Item], fmt: Format) -> None:
    """One UserError for all weights the layout cannot hold, before anything is computed."""
    problems = {(item.module, why) for item in items if (why := fmt.check(item.spec, item.shape))}
    if problems:
        module, why = min(problems)
        others = f" ({len(problems)} modules have such a problem)" if len(problems) > 1 else ""
        raise UserError(f"{module}.weight{others}: {why}")


def head_rules(model: PreTrainedModel, recipe: Recipe, fmt: Format, head_bits: int | None) -> tuple[Rule, ...]:
    """The output head stays as it is unless `head_bits` asks for a width."""
    head = next((name for name, m in model.named_modules() if m is model.get_output_embeddings()), "lm_head")
    if head_bits is None:
        return ((head, "skip"),)
    return ((head, replace(recipe.default, bits=head_bits)),)


def file_rules(path: str, default: Spec) -> tuple[Rule, ...]:
    """Rules of a recipe file:

        rules:
          - {match: "*.down_proj", bits: 8}
          - {match: "*.layers.0.*", skip: true}

    `match` is a shell glob over module paths (or "re:" and a regex), first match wins; bits and group_size override
    the default.
    """
    content = _read_yaml(path)
    if not isinstance(content, dict) or set(content) != {"rules"} or not isinstance(content["rules"], list):
        raise UserError(f"{path}: expected one key `rules` with a list under it")
    return tuple(_file_rule(rule, f"{path}: rule {i}", default) for i, rule in enumerate(content["rules"], 1))


def _read_yaml(path: str) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML ({error})") from error


def _file_rule(rule: Any, where: str, default: Spec) -> Rule:
    if not isinstance(rule, dict) or not isinstance(rule.get("match"), str):
        raise UserError(f"{where} needs a `match` pattern, found {rule!r}")
    unknown = set(rule) - {"match", "skip", "bits", "group_size"}
    if unknown:
        raise UserError(f"{where} has unknown keys {sorted(unknown)}; accepted: match, skip, bits, group_size")
    if rule.get("skip"):
        return rule["match"], "skip"
    change = {new: rule[old] for old, new in (("bits", "bits"), ("group_size", "group")) if old in rule}
    return rule["match"], replace(default, **change)


def check_patterns(rules: tuple[Rule, ...], modules: list[str]) -> None:
    """A pattern that matches nothing is a typing mistake: UserError naming it."""
    for pattern, _ in rules:
        if not any(matches(pattern, m) for m in modules):
            raise UserError(
                f"pattern {pattern!r} matches no module. Fix: `bitsmith inspect` lists them; the first is {modules[0]}"
            )


def source_name(ckpt: AnyCheckpoint) -> str:
    """What a plan remembers of its source: path and the size and time of its weight files."""
    files = (f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in sorted(ckpt.files))
    return " ".join([str(ckpt.path.resolve()), *files])
