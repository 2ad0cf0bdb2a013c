"""`bitsmith kernels`: every kernel, weight spec and GPU target: does it compile, and what does it use."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ._output import note, print_json

TABLE = Path(__file__).resolve().parents[1] / "results" / "aot.json"


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "kernels", help="what the GPU kernels compile to, per target"
    )
    parser.add_argument(
        "--aot", action="store_true", help="compile now, ahead of time and without a GPU (needs triton)"
    )
    parser.add_argument(
        "--save", action="store_true", help=f"with --aot: keep the table as {TABLE.parent.name}/{TABLE.name}"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    if args.save and not args.aot:
        raise UserError("--save writes what --aot compiled: give both")
    found = _compile() if args.aot else _read()
    if args.save:
        _save(found)
    if args.json:
        print_json(found)
    else:
        _print(found)
    return 0


def _compile() -> dict[str, Any]:
    from ..kernels import aot

    rows = []
    for row in aot.table():
        rows.append(row)
        note(f"{row['target']} {row['spec']} {row['kernel']}: {'ok' if row['ok'] else row['reason']}")
    return {"triton": aot.triton_version(), "rows": rows}


def _read() -> dict[str, Any]:
    if not TABLE.is_file():
        raise UserError(
            f"{TABLE} is absent (it is part of a checkout, not of a wheel): compile now with `bitsmith kernels --aot`"
        )
    found: dict[str, Any] = json.loads(TABLE.read_text())
    return found


def _save(found: dict[str, Any]) -> None:
    """One row a line, so that a change reads as one."""
    rows = ",\n".join(json.dumps(row) for row in found["rows"])
    TABLE.write_text(f'{{"triton": {json.dumps(found["triton"])}, "rows": [\n{rows}\n]}}\n')


def _print(found: dict[str, Any]) -> None:
    columns = (
        "target",
        "kernel",
        "rows",
        "spec",
        "dtype",
        "shared_bytes",
        "registers",
        "spills",
        "global_loads",
        "async_copies",
    )
    table = [columns] + [tuple(_cell(row[c]) for c in columns) for row in found["rows"]]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for i, line in enumerate(table):
        reason = "" if i == 0 or found["rows"][i - 1]["ok"] else f"  {found['rows'][i - 1]['reason']}"
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + reason)
    failed = sum(not row["ok"] for row in found["rows"])
    print(f"{len(found['rows'])} compilations with triton {found['triton']}, {failed} refused; no GPU was used")


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)
