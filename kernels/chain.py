"""Calls of the native library merged: one of Python's for as many of the library's as follow each other (cpp/chain.h).

A recorded decode step of one sequence makes three hundred; each costs 1.5 us through ctypes, and the interpreter's lock
changes hands. Merged they are one, and the lock is free for the whole step.
"""

import ctypes
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from .library import library
from .ops import Call


class _Call(ctypes.Structure):
    """`Call` of cpp/chain.h."""

    _fields_ = (("invoke", ctypes.c_void_p), ("slots", ctypes.c_void_p))


@dataclass(frozen=True, repr=False)
class Chain:
    """Functions of the library, called in order. Made by `merged`."""

    # What was merged: holds the structures that its arguments are addresses of.
    calls: tuple[partial[None], ...]
    _table: Any
    _slots: tuple[Any, ...]

    def __call__(self) -> None:
        _function("run")(self._table, len(self.calls))


def merged(calls: Sequence[Call]) -> Iterator[Call]:
    """The same calls in the same order, two or more of the library's in a row as one Chain."""
    for chained, group in groupby(calls, key=_can_chain):
        found = tuple(group)
        if chained and len(found) > 1:
            yield _chain(found)  # type: ignore[arg-type]
        else:
            yield from found


def _can_chain(call: Call) -> bool:
    return isinstance(call, partial) and _invoker(call.func) is not None and not call.keywords


def _invoker(function: Any) -> int | None:
    """Address of what calls a function of the library with arguments from slots; None for any other function."""
    if library() is None or getattr(function, "argtypes", None) is None:
        return None
    found: int | None = _function("invoker")(ctypes.cast(function, ctypes.c_void_p))
    return found


def _function(name: str) -> Any:
    return getattr(library(), f"bitsmith_{name}")


def _chain(calls: tuple[partial[None], ...]) -> Chain:
    slots = tuple(_slots(call) for call in calls)
    table = (_Call * len(calls))(
        *(_Call(_invoker(call.func), ctypes.addressof(own)) for call, own in zip(calls, slots, strict=True))
    )
    return Chain(calls, table, slots)


def _slots(call: partial[None]) -> Any:
    kinds = call.func.argtypes  # type: ignore[attr-defined]
    return (ctypes.c_int64 * len(kinds))(*map(_slot, kinds, call.args))


def _slot(kind: Any, value: Any) -> int:
    if kind is ctypes.c_float:
        return int.from_bytes(struct.pack("<f", value), "little")
    # What ctypes.byref gives.
    referred = getattr(value, "_obj", None)
    return ctypes.addressof(referred) if referred is not None else int(value or 0)
