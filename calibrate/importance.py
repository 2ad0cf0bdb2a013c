"""The calibration run behind an importance matrix: block by block, and nothing is quantized."""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ..errors import UserError
from ..models.checkpoint import AnyCheckpoint, open_checkpoint
from ..models.gguf_archs import arch_of_model
from ..models.gguf_names import links
from ..models.linear import EXPERTS, is_experts, is_linear
from ..models.load import build, source_shapes, tie
from .blocks import Blocks, by_block, find_blocks, load_weights, unload_weights
from .data import calibration_rows
from .imatrix import Imatrix, from_stats
from .plan import input_keys
from .stats import Squares, gather

_OUTPUT = "output.weight"


def measure(
    src: str | Path,
    *,
    calib: str,
    calib_samples: int = 128,
    calib_seqlen: int = 512,
    process_output: bool = False,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> tuple[Imatrix, list[str]]:
    """The importance matrix of the checkpoint `src` on the text `calib` (a file or hub:NAME), and a line for each
    weight that the text did not, or not wholly, reach.

    One decoder block is in memory at a time. Like llama-imatrix, the output is left out unless `process_output`.
    Raises UserError for what the arguments or the checkpoint are to blame for; nothing is run before.
    """
    ckpt = open_checkpoint(src)
    # Not sdpa: Gemma 2's soft caps and gpt-oss' sinks are only computed by the plain one.
    model = build(ckpt, torch.float32, "eager")
    named = links(model, arch_of_model(model.config.model_type, str(ckpt.config_file)))
    if process_output and all(link.tensor != _OUTPUT for link in named):
        raise UserError(f"{src}: --process-output, but the output is the embeddings' weight. Fix: leave it out")
    ids = calibration_rows(ckpt, calib, calib_samples, calib_seqlen, seed)
    run = Walk(model, ckpt, ids.to(device))
    keys = {
        link.tensor: tuple(key for weight in link.weights for key in run.keys.get(weight, ()))
        for link in named
        if process_output or link.tensor != _OUTPUT
    }
    found = run.blocks(progress)
    if process_output:
        found |= run.output()
    return from_stats(found, {name: group for name, group in keys.items() if group}, Path(calib).name, *ids.shape)


class Walk:
    """The model on the meta device, and where its weights and inputs are."""

    def __init__(self, model: PreTrainedModel, ckpt: AnyCheckpoint, ids: Tensor) -> None:
        self.model, self.ckpt, self.device = model, ckpt, ids.device
        self.path = find_blocks(model)
        self.places = by_block(model, self.path, ckpt.weights)
        everything = [placement for part in self.places for placement in part]
        # Checkpoint weight -> keys of its inputs.
        self.keys = {weight: keys for p in everything for weight, keys in input_keys(model, p).items()}
        self.shapes: dict[str, tuple[int, int]] = {}
        for placement in everything:
            if any(ckpt.weights[source] for source in placement.sources):
                self.shapes |= source_shapes(model, placement)
        self.runs = Blocks(model, self.path, ids)

    def load(self, part: int) -> None:
        """Give the model the weights of a block, or (the last part) of everything outside them."""
        load_weights(
            self.model, self.places[part], lambda s: self.ckpt.dense(s, self.shapes.get(s)), self.device, self.ckpt.path
        )

    def blocks(self, progress: bool) -> dict[str, Squares]:
        """Squares of the inputs of every linear and expert of the blocks, by key."""
        if any(is_experts(m) for m in self.model.modules()):
            self.model.set_experts_implementation(EXPERTS)
        self.load(len(self.places) - 1)
        tie(self.model)
        self.runs.begin()
        found: dict[str, Squares] = {}
        for index in tqdm(range(len(self.places) - 1), unit="block", disable=not progress, desc="imatrix"):
            self.load(index)
            inside = {f"{self.path}.{index}.{n}": m for n, m in self.runs.list[index].named_modules()}
            linears = {path: module for path, module in inside.items() if is_linear(module)}
            experts = {path: module for path, module in inside.items() if is_experts(module)}
            with gather(linears, experts, None, Squares) as stats:
                self.runs.run(index, keep=True)
            found |= stats
            unload_weights(self.model, self.places[index])
        return found

    def output(self) -> dict[str, Squares]:
        """The same of the output, after `blocks`."""
        head = self.model.get_output_embeddings()
        path = next(name for name, module in self.model.named_modules() if module is head)
        with gather({path: head}, {}, None, Squares) as stats:
            self.runs.finish()
        return stats
