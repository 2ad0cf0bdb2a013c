"""Quantize a checkpoint: arguments -> recipe, plan and calibration rows -> the loop over blocks -> a model directory.

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
from .method import Settings, method_by_name
from .plan import check_patterns, check_shapes, file_rules, head_rules, source_name
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
    settings: Settings | None = None,
    device: str = "cpu",
    seed: int = 0,
    resume: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Quantize the checkpoint `src` into the directory `out`; returns a summary (bpw, seconds, mean relative error).

    `format` is a --format value ("rtn" is GPTQ's layout by plain rounding). `calib` is a text file, .jsonl or
    hub:NAME, needed by the methods that look at data. `recipe` is a YAML file of per-module rules, `skip` globs of
    modules to leave alone. A run that was killed goes on where it stopped when called again with the same arguments.

    Raises UserError for anything the arguments or the checkpoint are to blame for, before any weight is touched.
    """
    started = time.monotonic()
    method = method or ("rtn" if format == "rtn" else _USUAL.get(format.split("-")[0], "rtn"))
    wanted = base.Options("gptq" if format == "rtn" else format, bits, group_size, sym, desc_act)
    fmt = base.format_by_name(wanted.format)
    chosen = replace(fmt.recipe(wanted), method=method, calib=calib or "")
    how = method_by_name(method)
    ckpt = open_checkpoint(src)
    if how.NEEDS_CALIBRATION and calib is None:
        raise UserError(
            f"--method {method} looks at data. Fix: --calib FILE (.txt, .jsonl) or hub:NAME, or --method rtn or hqq"
        )
    model = build(ckpt, torch.float32)
    rules = head_rules(model, chosen, fmt, head_bits)
    user_rules: tuple[base.Rule, ...] = tuple((pattern, "skip") for pattern in skip)
    user_rules += file_rules(recipe, chosen.default) if recipe else ()
    chosen = chosen.with_rules((*user_rules, *rules))
    run = Run(model, ckpt, fmt, chosen, how, settings or Settings(), torch.device(device))
    check_patterns(user_rules, [w.removesuffix(".weight") for w in ckpt.weights])
    check_shapes(run.items, fmt)
    ids = None
    if how.NEEDS_CALIBRATION and calib is not None:
        ids = calibration_rows(ckpt, calib, calib_samples, calib_seqlen, seed)
    plan = {
        "source": source_name(ckpt),
        "rules": [(pattern, str(spec)) for pattern, spec in chosen.rules],
        "format": wanted.format,
        "method": method,
        "calib": calib,
        "samples": calib_samples,
        "seqlen": calib_seqlen,
        "seed": seed,
        "settings": str(run.settings),
        "version": __version__,
    }
    store = Store(Path(out), plan, resume=resume, overwrite=overwrite)
    errors = run.all_parts(store, ids, progress)
    summary = run.summary(store, errors)
    sidecars = {fmt.SIDECAR: fmt.config(chosen)} if fmt.SIDECAR else {}
    store.finish(run.parts, run.config(summary), sidecars, ckpt.path, base.pickled(fmt, chosen))
    return {**summary, "seconds": round(time.monotonic() - started, 2)}
