"""Keep the scratch memory of CPU calls: temporaries, and x as the prologue leaves it.

Fresh pages from the operating system cost more time than a small kernel. Each call takes memory of
its own, so there are as many pieces as calls ran at the same time, up to a total size. Large pieces
are freed after the call.
"""

import contextlib
from typing import Final, NamedTuple

import numpy as np

from q4jit.cpu.schedule import CpuPlan, digits_bytes, padded_k
from q4jit.plan.kernels import Slot
from q4jit.runtime.cpu import data_pointer
from q4jit.weights.layouts import CACHE_LINE_BYTES

_KEPT_BYTES: Final = 16 << 20  # of one piece
_ALL_KEPT_BYTES: Final = 64 << 20  # of all pieces, however many threads call


class Scratch(NamedTuple):
    """Memory for temporaries.

    Attributes:
        start: its first address that begins a cache line.
        size_bytes: its size from there.
        owner: the array that it belongs to.
    """

    start: int
    size_bytes: int
    owner: object


_kept: list[Scratch] = []


def lay_out_scratch(plan: CpuPlan, rows: int) -> tuple[dict[Slot, int], int]:
    """Return the offset of each slot in a call's scratch memory, and the size of that memory.

    Each slot begins on a cache line. Kernels run one after the other, so they share the slots of
    the prologue's results.
    """
    sizes = {Slot("temp", i): 4 * floats * max(1, rows) for i, floats in enumerate(plan.temps)}
    for kernel in plan.kernels:
        k = padded_k(plan, kernel)
        row_bytes = {
            Slot("x"): 4 * k,
            Slot("row_factors"): 4,
            Slot("digits"): digits_bytes(k, kernel.digits) if kernel.digits else 0,
        }
        for slot, size in row_bytes.items():
            sizes[slot] = max(sizes.get(slot, 0), size * kernel.work.rows_of(rows))
    offsets, total = {}, 0
    for slot, size in sizes.items():
        offsets[slot] = total
        total += -(-size // CACHE_LINE_BYTES) * CACHE_LINE_BYTES
    return offsets, total


def take_scratch(size_bytes: int) -> Scratch:
    """Return memory that no other call uses, not even one in a signal handler or a finaliser."""
    try:
        scratch = _kept.pop()
    except IndexError:
        scratch = None
    if scratch is not None and scratch.size_bytes >= size_bytes:
        return scratch
    return new_scratch(size_bytes)


def new_scratch(size_bytes: int) -> Scratch:
    """Return fresh memory."""
    memory = np.empty(size_bytes + CACHE_LINE_BYTES, np.uint8)
    start = data_pointer(memory)
    return Scratch(start + -start % CACHE_LINE_BYTES, size_bytes, memory)


def keep_scratch(scratch: Scratch) -> None:
    """Keep memory for a later call, unless it is large or much is kept already."""
    if scratch.size_bytes <= _KEPT_BYTES:
        _kept.append(scratch)
        if len(_kept) > 1:  # only after calls at the same time
            _trim()


def _trim() -> None:
    # no lock: the last of several threads that keep memory at the same time sees all of it
    while sum(piece.size_bytes for piece in _kept) > _ALL_KEPT_BYTES:
        with contextlib.suppress(IndexError):
            _kept.pop(0)
