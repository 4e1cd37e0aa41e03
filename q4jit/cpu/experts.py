"""Sort the vectors of a call by the experts that they are multiplied by.

The vectors of one expert then follow each other, and a tile of them shares its decoded weights.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4jit.cpu.schedule import BUCKET_WORDS, EXPERT_SLOTS, CpuKernel, CpuPlan
from q4jit.frontend.graph import Node
from q4jit.frontend.shapes import leading_axes
from q4jit.plan.kernels import Slot
from q4jit.runtime.cpu import data_pointer

_Ids = NDArray[np.int64]


class ChosenExperts:
    """What kernels with chosen experts need to know of a call's ids.

    Attributes:
        slots: the slots of their values, in order.
    """

    def __init__(self, plan: CpuPlan, m: int) -> None:
        """Prepare the calls of a plan with m rows."""
        self._chosen: dict[tuple[int, str], tuple[Node, int, int]] = {}
        for kernel in plan.kernels:
            work = kernel.work
            if work.chosen is not None:
                rows = 1 if work.uniform else m
                key = work.chosen.arg, _alone(kernel)
                self._chosen[key] = work.chosen, rows, work.copies
        self.slots = [Slot(kind, *key) for key in self._chosen for kind in EXPERT_SLOTS]

    def values(self, ids: Mapping[int, _Ids]) -> tuple[list[int], list[Any]]:
        """Return the values of `slots`, and the arrays that they point to.

        ids: of each argument of ids, with their leading axes as kernels read them.
        """
        values: list[int] = []
        arrays: list[Any] = []
        for chosen, rows, copies in self._chosen.values():
            inner = chosen.shape[-1] if leading_axes(chosen.shape) < len(chosen.shape) else 1
            assert isinstance(inner, int)
            own = np.broadcast_to(ids[chosen.arg].reshape(-1, inner), (rows, copies))
            order, buckets = grouped(own.reshape(-1))
            values += [data_pointer(order), len(buckets), data_pointer(buckets)]
            arrays += [order, buckets]
        return values, arrays


def grouped(ids: _Ids) -> tuple[_Ids, _Ids]:
    """Return the places of ids sorted by id, and the buckets of equal ids.

    The second array has a row for each bucket: its id, its first place, and the next one's.
    """
    order = ids.argsort(kind="stable")
    by_id = ids[order]
    is_first = np.ones(len(ids), np.bool_)
    np.not_equal(by_id[1:], by_id[:-1], out=is_first[1:])
    (firsts,) = is_first.nonzero()
    buckets = np.empty((len(firsts), BUCKET_WORDS), np.int64)
    buckets[:, 0], buckets[:, 1] = by_id[firsts], firsts
    buckets[:-1, 2], buckets[-1:, 2] = firsts[1:], len(ids)
    return order, buckets


def _alone(kernel: CpuKernel) -> str:
    return next(s.layout for s in kernel.slots() if s.kind == EXPERT_SLOTS[0])
