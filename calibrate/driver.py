"""Quantize a checkpoint: arguments -> goal, plan and calibration rows -> the loop over blocks -> a model directory or a
GGUF file.

One decoder block in memory at a time, resumable, whatever the format and the method.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import UserError
from ..models.checkpoint import open_checkpoint
from ..models.load import build
from ..quant_formats import base
from .data import calibration_rows
from .gguf_goal import GGUFOptions, gguf_goal, is_gguf, refuse_modules
from .goal import directory_goal
from .method import Settings, method_by_name
from .plan import check_shapes, source_name
from .run import Run
from .store import Store

# What a format is quantized with unless --method says otherwise.
_USUAL = {"gptq": "gptq", "awq": "awq", "hqq": "hqq"}


def quantize(
    src: str | Path,
    out: str | Path,
    *,
    format: str = "gptq",
    bits: int | None = None,
    group_size: int | None = None,
    method: str | None = None,
    calib: str | None = None,
    calib_samples: int = 128,
    calib_seqlen: int = 512,
    recipe: str | None = None,
    head_bits: int | None = None,
    skip: tuple[str, ...] | list[str] = (),
    sym: bool | None = None,
    desc_act: bool | None = None,
    gguf: GGUFOptions | None = None,
    settings: Settings | None = None,
    device: str = "cpu",
    seed: int = 0,
    resume: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Quantize the checkpoint `src` into the directory (`gguf:TYPE`: the file) `out`; returns a summary (bpw, seconds,
    mean relative error).

    `format` is a --format value ("rtn" is GPTQ's layout by plain rounding). `calib` is a text file, .jsonl or
    hub:NAME, needed by the methods that look at data and for a
    target size; for `gguf:TYPE` by rtn an importance matrix is made of it.
    `recipe` is a YAML file of per-module rules, `skip` globs of modules to leave alone, `gguf` what only GGUF knows. A
    run that was killed goes on where it stopped when called again with the same arguments.

    Raises UserError for anything the arguments or the checkpoint are to blame for, before any weight is touched.
    """
    started = time.monotonic()
    method = method or ("rtn" if format == "rtn" else _USUAL.get(format.split("-")[0], "rtn"))
    how = method_by_name(method)
    ckpt = open_checkpoint(src)
    if how.NEEDS_CALIBRATION and calib is None:
        raise UserError(
            f"--method {method} looks at data. Fix: --calib FILE (.txt, .jsonl) or hub:NAME, or --method rtn or hqq"
        )
    rows = {"samples": calib_samples, "seqlen": calib_seqlen, "seed": seed}
    model = build(ckpt, torch.float32)
    wanted = base.Options("gptq" if format == "rtn" else format, bits, group_size, sym, desc_act)
    if is_gguf(format):
        refuse_modules(recipe, head_bits, skip)
        asked = gguf or GGUFOptions()
        goal = gguf_goal(ckpt, Path(out), wanted, asked, calib, rows, not how.NEEDS_CALIBRATION, progress)
    elif gguf is not None:
        raise UserError(f"--format {format}: imatrix, tensor types and target sizes are for --format gguf:TYPE")
    else:
        goal = directory_goal(ckpt, model, wanted, recipe, head_bits, skip)
    chosen = replace(goal.recipe, method=method, calib=calib or "")
    plan = {
        "source": source_name(ckpt),
        "rules": [(pattern, str(spec)) for pattern, spec in (*chosen.modules.items(), *chosen.rules)],
        "format": wanted.format,
        "method": method,
        "calib": calib,
        **rows,
        "settings": str(settings or Settings()),
        "version": __version__,
        **goal.plan,
    }
    run = Run(model, ckpt, goal.fmt, chosen, how, settings or Settings(), torch.device(device), goal.importance)
    if not run.items and not is_gguf(format):
        raise UserError(f"{ckpt.path}: the recipe leaves no weight to quantize. Fix: fewer --skip patterns")
    check_shapes(run.items, goal.fmt)
    ids = calibration_rows(ckpt, calib, **rows) if how.NEEDS_CALIBRATION and calib is not None else None
    store = Store(Path(out), plan, resume=resume, overwrite=overwrite)
    errors = run.all_parts(store, ids, progress) if run.items else {}
    summary = run.summary(store, errors)
    summary |= goal.finish(run, store, summary)
    return {**summary, "seconds": round(time.monotonic() - started, 2)}
