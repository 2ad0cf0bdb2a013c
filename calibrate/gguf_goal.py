"""GGUF as the goal of a quantization: types by mixture or size, importance, and the file that the parts become."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..models.checkpoint import AnyCheckpoint
from ..models.gguf_export import export, header
from ..models.load import load_tokenizer
from ..quant_formats import base
from ..quant_formats import gguf as dialect
from ..quant_formats.gguf_mixture import Overrides
from .gguf import importances, layout, rows
from .gguf_size import Target, targeted
from .goal import Goal
from .imatrix import Imatrix
from .imatrix import read as read_imatrix
from .importance import measure
from .run import Run
from .store import Store

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class GGUFOptions:
    """What only a GGUF file can be asked for."""

    # An importance matrix of bitsmith or llama.cpp, .gguf or .dat.
    imatrix: str | None = None
    overrides: Overrides = field(default_factory=Overrides)
    # Size of the file; types are then chosen tensor by tensor (--format gguf).
    target: Target | None = None


def is_gguf(name: str) -> bool:
    """Whether a --format value asks for a GGUF file: "gguf:q4_k_m", or "gguf" with a target size."""
    return name.partition(":")[0] == "gguf"


def refuse_modules(recipe: str | None, head_bits: int | None, skip: Sequence[str]) -> None:
    """UserError where modules are singled out in the other formats' way."""
    for flag, given in (("--recipe", recipe), ("--head-bits", head_bits), ("--skip", skip)):
        if given:
            raise UserError(f"{flag} is not for --format gguf. Fix: --tensor-type REGEX=TYPE, f16 being unquantized")


def gguf_goal(
    ckpt: AnyCheckpoint,
    out: Path,
    wanted: base.Options,
    options: GGUFOptions,
    calib: str | None,
    rows_of: Mapping[str, int],
    makes_imatrix: bool,
    progress: bool,
) -> Goal:
    """The file `out` of the type that `wanted` names. `calib` is the text that a target size is measured on and, with
    `makes_imatrix`, what an importance matrix is made of where there is none; `rows_of` says how much of it (samples,
    seqlen, seed).

    UserError, before any weight is touched, for whatever cannot be written.
    """
    if out.suffix != ".gguf" or out.is_dir():
        raise UserError(f"{out}: --format {wanted.format} writes one file. Fix: an OUT that ends in .gguf")
    base.fixed(wanted, "the type says them", bits=None, group_size=None, sym=None, desc_act=None)
    imatrix = _imatrix(ckpt, options.imatrix, calib if makes_imatrix else None, rows_of, progress)
    kind = wanted.format.partition(":")[2]
    if bool(kind) == bool(options.target):
        raise UserError(
            f"--format {wanted.format}: expected a file type (gguf:q4_k_m; `bitsmith formats` lists them), or gguf "
            "alone with --target-size or --target-bpw"
        )
    notes = out.with_name(out.name + ".losses.json")
    if options.target:
        if calib is None:
            raise UserError("a target size needs text to measure what each tensor loses. Fix: --calib FILE or hub:NAME")
        found = targeted(ckpt, options.target, imatrix, notes, calib, rows_of, progress)
    else:
        found = layout(ckpt, kind, options.overrides, imatrix)
    known = {} if imatrix is None else importances(found.tensors, imatrix)
    head = header(ckpt, _tokenizer(ckpt), found.types, found.number)

    def finish(run: Run, store: Store, summary: dict[str, Any]) -> dict[str, Any]:
        source = _Finished(run, store) if run.items else ckpt
        packed = source.packed if isinstance(source, _Finished) else lambda module: None
        size = export(head, source, out, lambda each, kind: rows(each, kind, source, packed, known))
        store.discard()
        if options.target:
            notes.unlink()
        weights = sum(math.prod(each.shape) for each in found.tensors)
        return {"bpw": round(8 * size / weights, 4), "bytes": size}

    plan = {"types": dict(found.types), "imatrix": options.imatrix}
    return Goal(dialect, found.recipe(), finish, known, plan)


def _imatrix(
    ckpt: AnyCheckpoint, path: str | None, calib: str | None, rows_of: Mapping[str, int], progress: bool
) -> Imatrix | None:
    if path is not None:
        return read_imatrix(Path(path))
    if calib is None:
        return None
    found, said = measure(
        ckpt.path,
        calib=calib,
        calib_samples=rows_of["samples"],
        calib_seqlen=rows_of["seqlen"],
        seed=rows_of["seed"],
        progress=progress,
    )
    for line in said:
        _LOG.warning("%s", line)
    return found


def _tokenizer(ckpt: AnyCheckpoint) -> Any:
    try:
        return load_tokenizer(ckpt.path)
    except UserError as error:
        _LOG.warning("the file will have no tokenizer: %s", error)
        return None


class _Finished:
    """The source as a finished run leaves it: a checkpoint whose weights are those of the parts."""

    def __init__(self, run: Run, store: Store) -> None:
        self._run, self._ckpt = run, run.ckpt
        parts = [store.get(index) for index in range(run.parts)]
        self._where = {name: part for part in parts for name in part}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ckpt, name)

    def packed(self, module: str) -> Tensor | None:
        """uint8 [N, bytes of a row] of a module that was quantized, else None."""
        name = f"{module}.{dialect.MARK}"
        return self._where[name](name) if name in self._where else None

    def dense(self, weight: str, shape: tuple[int, int] | None = None) -> Tensor:
        return self._where[weight](weight)
