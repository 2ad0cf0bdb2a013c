"""The loop over the blocks of one quantization; calibrate/driver.py says what is quantized into what.

For each block: load its weights, group its linears by the input they share, and in the order they run gather that
input's statistics (earlier linears already quantized, as in GPTQ's "true sequential"), quantize, put the result back.
The block is written as one part, read again from it, and run once more to give the next block its inputs, so a resumed
run goes through the same numbers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from .. import __version__
from ..errors import UserError
from ..kernels.qtensor import QTensor
from ..models.checkpoint import AnyCheckpoint
from ..models.linear import EXPERTS, is_experts
from ..models.load import owner, source_shapes, tie
from ..models.names import Placement, natural
from ..quant_formats import base
from .awq import search_scale
from .blocks import Blocks, by_block, find_blocks, load_weights, unload_weights
from .fold import InputGroup, fold, input_groups
from .method import Method, Settings
from .plan import Item, items_of
from .stats import Reached, Squares, Stats, gather, unseen
from .store import Part, Store


class Run:
    """One quantization: the meta model, the plan of its weights, and the loop over blocks."""

    def __init__(
        self,
        model: PreTrainedModel,
        ckpt: AnyCheckpoint,
        fmt: base.Format,
        recipe: base.Recipe,
        method: Method,
        settings: Settings,
        device: torch.device,
        importance: Mapping[str, Squares] | None = None,
    ) -> None:
        """importance: what is known of the inputs of a module that calibration has no Stats for."""
        self.model, self.ckpt, self.fmt, self.recipe = model, ckpt, fmt, recipe
        self.importance = importance or {}
        self.method, self.settings, self.device = method, settings, device
        self.path = find_blocks(model)
        self.count = len(model.get_submodule(self.path))  # type: ignore[arg-type]
        # One part per block, and a last one for everything else.
        self.parts = self.count + 1
        self.places = by_block(model, self.path, ckpt.weights)
        self.alias = self._untie_head()
        self.part_items = [[i for p in places for i in items_of(model, p, recipe, fmt)] for places in self.places]
        self.items = [item for part in self.part_items for item in part]
        self.modules = {item.module for item in self.items}
        # [N, K] of every weight that is quantized, here or in the source.
        self.shapes = {f"{item.module}.weight": item.shape for item in self.items}
        for placement in (p for places in self.places for p in places):
            if any(ckpt.weights.get(s) for s in placement.sources):
                self.shapes |= source_shapes(model, placement)

    def _untie_head(self) -> dict[str, str]:
        """A head that is tied to the embeddings but to be quantized gets a weight of its own: {its name: the weight it
        copies}. So does every tied head in a pickled layout (HQQ's own), whose library ties nothing.
        """
        pickled = base.pickled(self.fmt, self.recipe) is not None
        sources = {p.target: p.sources[0] for p in self.places[self.count]}
        found = {}
        for target, other in getattr(self.model, "all_tied_weights_keys", {}).items():
            wanted = pickled or self.recipe.spec(target.removesuffix(".weight"))
            if target not in sources and other in sources and wanted:
                self.places[self.count].append(Placement(target, (target,)))
                found[target] = sources[other]
        return found

    def all_parts(self, store: Store, ids: Tensor | None, progress: bool) -> dict[str, float]:
        """Quantize every part that is not finished; returns relative output errors by module."""
        errors: dict[str, float] = {}
        if any(is_experts(m) for m in self.model.modules()):
            self.model.set_experts_implementation(EXPERTS)
        blocks = None
        if ids is not None:
            self._load(self.count, None)
            tie(self.model)
            blocks = Blocks(self.model, self.path, ids.to(self.device))
            blocks.begin()
        with tqdm(total=len(self.items), unit="weight", disable=not progress, desc="quantize") as bar:
            for index in range(self.count):
                self._block(index, store, blocks, bar)
                errors |= store.get(index).facts["errors"]
            self._rest(store, blocks, bar)
        return errors | store.get(self.count).facts["errors"]

    def _block(self, index: int, store: Store, blocks: Blocks | None, bar: Any) -> None:
        items = self.part_items[index]
        if not store.has(index):
            self._load(index, None)
            errors: dict[str, float] = {}
            done = self._with_data(index, items, blocks, errors, bar) if blocks else self._without(items, errors, bar)
            store.put(index, self._tensors(index, done, blocks is not None), _facts(done, errors))
        else:
            bar.update(len(items))
        if blocks:
            self._load(index, store.get(index))
            blocks.run(index, keep=True)
        unload_weights(self.model, self.places[index])

    def _rest(self, store: Store, blocks: Blocks | None, bar: Any) -> None:
        """Everything outside the blocks; the head, where it is quantized, sees the last block's outputs."""
        items = self.part_items[self.count]
        if store.has(self.count):
            bar.update(len(items))
            return
        errors: dict[str, float] = {}
        done: dict[str, QTensor] = {}
        if items and blocks:
            with gather({i.key: self.model.get_submodule(i.key) for i in items}, {}, None, Stats) as stats:
                blocks.finish()
            for item in items:
                self._one(item, stats.get(item.key), done, errors, bar)
        elif items:
            self._load(self.count, None)
            tie(self.model)
            done = self._without(items, errors, bar)
        store.put(self.count, self._tensors(self.count, done, False), _facts(done, errors))

    def _load(self, part: int, stored: Part | None) -> None:
        """Give the model the dense weights of a part: the source's, or (`stored`) what was written for it."""
        load_weights(self.model, self.places[part], lambda s: self._dense(s, stored), self.device, self.ckpt.path)

    def _dense(self, source: str, stored: Part | None) -> Tensor:
        module = source.removesuffix(".weight")
        if stored is None:
            return self.ckpt.dense(self.alias.get(source, source), self.shapes.get(source))
        if module not in self.modules:
            return stored(source)
        return self.fmt.load(stored, module, self.shapes[source], self.recipe).dequantize()

    def _without(self, items: list[Item], errors: dict[str, float], bar: Any) -> dict[str, QTensor]:
        done: dict[str, QTensor] = {}
        for item in items:
            self._one(item, None, done, errors, bar)
        return done

    def _with_data(
        self, index: int, items: list[Item], blocks: Blocks, errors: dict[str, float], bar: Any
    ) -> dict[str, QTensor]:
        prefix = f"{self.path}.{index}"
        block = self.model.get_submodule(prefix)
        linears = {i.key: self.model.get_submodule(i.key) for i in items if i.expert is None}
        groups = input_groups(block, prefix, linears, lambda: self._sample(blocks, index))
        if self.recipe.method == "awq":
            self._rescale(index, groups, linears, items, blocks)
        done: dict[str, QTensor] = {}
        by_key = {i.key: i for i in items if i.expert is None}
        for group in groups:
            first = group.linears[0]
            stats = self._gather(blocks, index, {first: linears[first]}, {}, first)
            for path in group.linears:
                self._one(by_key[path], stats[first], done, errors, bar)
        self._expert_items(index, items, blocks, done, errors, bar)
        for item in items:
            if item.module not in done:
                raise UserError(
                    f"{item.module} was not called by its block, so it cannot be calibrated. Fix: --skip "
                    f"'{item.module}'"
                )
        return done

    def _sample(self, blocks: Blocks, index: int) -> None:
        blocks.sample(index)

    def _expert_items(
        self,
        index: int,
        items: list[Item],
        blocks: Blocks,
        done: dict[str, QTensor],
        errors: dict[str, float],
        bar: Any,
    ) -> None:
        """Experts, projection by projection: the second sees the first one quantized."""
        wanted = [i for i in items if i.expert is not None]
        for target in dict.fromkeys(i.target for i in wanted):
            path = target.rpartition(".")[0]
            stats = self._gather(blocks, index, {}, {path: self.model.get_submodule(path)}, None)
            for item in wanted:
                if item.target == target:
                    self._one(item, stats.get(item.key) or unseen(item.shape[1]), done, errors, bar)

    def _gather(
        self, blocks: Blocks, index: int, modules: dict[str, nn.Module], experts: dict[str, nn.Module], stop: str | None
    ) -> dict[str, Stats]:
        args, kwargs = blocks.calls[index]
        with torch.no_grad(), gather(modules, experts, stop, Stats) as found:
            for hidden in blocks.hidden:
                try:
                    blocks.list[index](hidden, *args, **kwargs)
                except Reached:
                    continue
        return found

    def _rescale(
        self, index: int, groups: list[InputGroup], linears: dict[str, nn.Module], items: list[Item], blocks: Blocks
    ) -> None:
        """AWQ's scales, folded into the block while it is still unquantized."""
        specs = {i.key: i.spec for i in items}
        firsts = {g.linears[0]: linears[g.linears[0]] for g in groups}
        stats = self._gather(blocks, index, firsts, {}, None)
        for group in groups:
            weights = [self.model.get_parameter(f"{p}.weight").data for p in group.linears]
            scale = search_scale(weights, [specs[p] for p in group.linears], stats[group.linears[0]], self.settings)
            fold(self.model, group, scale, lambda: blocks.sample(index))

    def _one(
        self, item: Item, stats: Stats | Squares | None, done: dict[str, QTensor], errors: dict[str, float], bar: Any
    ) -> None:
        live = item.live(self.model)
        stats = stats or self.importance.get(item.module)
        q = self.method.quantize(live.float(), item.spec, stats, self.settings)
        w_hat = q.dequantize()
        if stats is not None:
            errors[item.module] = stats.relative_error(live, w_hat)
        else:
            errors[item.module] = float((w_hat - live).square().sum() / live.square().sum().clamp(min=1e-30))
        live.copy_(w_hat)
        done[item.module] = q
        bar.set_postfix_str(f"{item.module} error {errors[item.module]:.2e}", refresh=False)
        bar.update()

    def _tensors(self, part: int, done: dict[str, QTensor], changed: bool) -> dict[str, Tensor]:
        """What is written for a part. `changed`: dense weights of the block may have been rescaled, so the live ones
        are written.
        """
        found: dict[str, Tensor] = {}
        for placement in self.places[part]:
            for source in placement.sources:
                module = source.removesuffix(".weight")
                if module in done:
                    found |= {f"{module}.{k}": t for k, t in self.fmt.save(done[module].to("cpu"), self.recipe).items()}
                else:
                    found[source] = self._written(placement, source, changed)
        return found

    def _written(self, placement: Placement, source: str, changed: bool) -> Tensor:
        """A dense tensor as it is written: the source's bytes, unless the method rescaled it."""
        module, leaf = owner(self.model, placement.target)
        name = self.alias.get(source, source)
        original = self.ckpt(name) if not self.ckpt.weights[name] else None
        if changed and self.recipe.method == "awq" and placement.converter is None and module is not None:
            live = module._parameters.get(leaf)
            if live is not None and not live.is_meta:
                return live.data.to(self._dtype(original))
        if original is not None:
            # safetensors refuses two names for the same memory.
            return original if name == source else original.clone()
        return self.ckpt.dense(name, self.shapes[name]).to(self._dtype(None))

    def _dtype(self, original: Tensor | None) -> torch.dtype:
        if original is not None:
            return original.dtype
        return getattr(torch, str(self.ckpt.config.get("dtype") or self.ckpt.config.get("torch_dtype") or "float16"))

    def summary(self, store: Store, errors: dict[str, float]) -> dict[str, Any]:
        """bits per weight over the quantized weights (scales and zero points counted), and the errors."""
        if not errors:
            return {"errors": errors}
        weights = sum(i.shape[0] * i.shape[1] for i in self.items)
        size = sum(store.get(index).facts["bytes"] for index in range(self.parts))
        mean = sum(errors.values()) / len(errors)
        return {"bpw": round(8 * size / weights, 4), "mean_relative_error": mean, "errors": errors}

    def config(self, summary: dict[str, Any]) -> dict[str, Any]:
        """config.json of the result: the source's, with the dialect's quantization_config and the resolved map."""
        specs = {i.module: str(i.spec) for i in sorted(self.items, key=lambda i: natural(i.module))}
        original = {k: v for k, v in self.ckpt.config.items() if k != "quantization_config"}
        if self.alias:
            original["tie_word_embeddings"] = False
        note = {
            "version": __version__,
            "source": self.ckpt.path.resolve().name,
            "method": self.recipe.method,
            "calib": Path(self.recipe.calib).name,
            "specs": specs,
        }
        note |= {"bpw": summary["bpw"], "errors": {k: float(f"{v:.6g}") for k, v in summary["errors"].items()}}
        quantization = self.fmt.config(self.recipe)
        found = {"quantization_config": quantization} if quantization else {}
        return {**original, **found, "bitsmith": note}


def _facts(done: dict[str, QTensor], errors: dict[str, float]) -> dict[str, Any]:
    """What is remembered of a finished part besides its tensors."""
    return {"errors": errors, "bytes": sum(q.nbytes for q in done.values())}
