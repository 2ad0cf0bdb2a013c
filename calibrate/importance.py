"""The calibration run behind an importance matrix: block by block, and nothing is quantized."""

from pathlib import Path

import torch
from tqdm import tqdm

from ..errors import UserError
from ..models.checkpoint import open_checkpoint
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
    run = BlockRun(src, calib, calib_samples, calib_seqlen, device, seed)
    if process_output and all(link.tensor != _OUTPUT for link in run.links):
        raise UserError(f"{src}: --process-output, but the output is the embeddings' weight. Fix: leave it out")
    keys = {
        link.tensor: tuple(key for weight in link.weights for key in run.keys.get(weight, ()))
        for link in run.links
        if process_output or link.tensor != _OUTPUT
    }
    found = run.blocks(progress)
    if process_output:
        found |= run.output()
    groups = {name: group for name, group in keys.items() if group}
    return from_stats(found, groups, Path(calib).name, *run.runs.ids.shape)


class BlockRun:
    """A model run over calibration text one block at a time, in float32, for what is measured by GGUF tensor."""

    def __init__(self, src: str | Path, calib: str, samples: int, seqlen: int, device: str, seed: int) -> None:
        """UserError for a checkpoint that cannot be read, an architecture GGUF does not know, and unusable text."""
        self.ckpt = open_checkpoint(src)
        # Not sdpa: Gemma 2's soft caps and gpt-oss' sinks are only computed by the plain one.
        self.model = build(self.ckpt, torch.float32, "eager")
        arch = arch_of_model(self.model.config.model_type, str(self.ckpt.config_file))
        self.links = links(self.model, arch)
        ids = calibration_rows(self.ckpt, calib, samples, seqlen, seed)
        self.device = torch.device(device)
        self.path = find_blocks(self.model)
        self.places = by_block(self.model, self.path, self.ckpt.weights)
        everything = [placement for part in self.places for placement in part]
        # Checkpoint weight -> keys of its inputs.
        self.keys = {weight: keys for p in everything for weight, keys in input_keys(self.model, p).items()}
        self.shapes: dict[str, tuple[int, int]] = {}
        for placement in everything:
            if any(self.ckpt.weights[source] for source in placement.sources):
                self.shapes |= source_shapes(self.model, placement)
        self.runs = Blocks(self.model, self.path, ids.to(self.device))

    def load(self, part: int) -> None:
        """Give the model the weights of a block, or (the last part) of everything outside them."""
        load_weights(
            self.model, self.places[part], lambda s: self.ckpt.dense(s, self.shapes.get(s)), self.device, self.ckpt.path
        )

    def begin(self) -> None:
        """Load what is outside the blocks and embed every row: all is set for the first block."""
        if any(is_experts(m) for m in self.model.modules()):
            self.model.set_experts_implementation(EXPERTS)
        self.load(len(self.places) - 1)
        tie(self.model)
        self.runs.begin()

    def blocks(self, progress: bool) -> dict[str, Squares]:
        """Squares of the inputs of every linear and expert of the blocks, by key."""
        self.begin()
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
