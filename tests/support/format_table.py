"""The table of docs/formats.md: which kernel multiplies which format."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from q4jit.backends import find_backend
from q4jit.cpu.schedule import CpuKernel
from q4jit.frontend.specs import WeightSpec
from q4jit.frontend.trace import trace
from q4jit.plan.options import PlanOptions
from q4jit.targets import find_target
from q4jit.weights.formats import FORMATS
from tests.support.kernels import specs_of

TARGETS: Final = (
    "cpu:x86-64-v4+avx512vnni",
    "cpu:x86-64-v3",
    "cpu:aarch64+dotprod",
    "hip:sm_90",
    "hip:gfx942",
    "hip:gfx1201",
    "hip:gfx1030",
)
PRECISIONS: Final = ("f32", "f16", "i8")
ROWS: Final = (1, 4, 16, 512)
TRANSPOSED_ROWS: Final = (1, 512)
SIZE: Final = 4096
"""K and N: large enough for the kernels that large weights get."""


def product(x: Any, w: Any) -> Any:
    return x @ w


def transposed(x: Any, w: Any) -> Any:
    return x @ w.T


def kernel_name(
    name: str, target: str, precision: str, m: int, function: Callable[..., Any] = product
) -> str:
    """Return what multiplies m rows by a weight of a format: a schedule, or digits of x."""
    weight = WeightSpec(name, SIZE, SIZE)
    graph = trace(function, specs_of([np.zeros((m, SIZE), np.float32), weight]))
    where = find_target(target)
    plan = find_backend(where).plan(graph, where, m, PlanOptions(precision=precision), None)
    kernel = next(each for each in plan.kernels if each.work.sections)
    if not isinstance(kernel, CpuKernel):
        return str(kernel.schedule)
    if kernel.dot is None:
        return "floats"
    return "1 digit" if kernel.digits == 1 else f"{kernel.digits} digits"


def kernel_names(name: str, target: str, precision: str) -> tuple[str, ...]:
    """Return the kernels of `x @ w` for each M of `ROWS`, and of `x @ w.T`."""
    straight = [kernel_name(name, target, precision, m) for m in ROWS]
    across = [kernel_name(name, target, precision, m, transposed) for m in TRANSPOSED_ROWS]
    return *straight, *across


def groups_of(target: str, precision: str) -> dict[tuple[str, ...], list[str]]:
    """Return the formats that share their kernels, by these."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in FORMATS:
        groups.setdefault(kernel_names(name, target, precision), []).append(name)
    return groups


def in_words(names: list[str]) -> str:
    """Return a list of formats, shortened if it is all of them or all of one kind."""
    blocks = [name for name, fmt in FORMATS.items() if fmt.float_type is None]
    others = [name for name in blocks if name not in names]
    if len(names) == len(FORMATS):
        return "all"
    if names == blocks:
        return "all in blocks"
    if len(others) < len(names) and set(names) <= set(blocks):
        return f"all in blocks but {', '.join(others)}"
    return ", ".join(names)


def format_table() -> str:
    """Return the table in Markdown. Formats and precisions with the same kernels share a row."""
    heads = [f"M = {m}" for m in ROWS] + [f"`w.T`, M = {m}" for m in TRANSPOSED_ROWS]
    heads = ["target", "precision", "formats", *heads]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for target in TARGETS:
        by_groups: dict[str, list[str]] = {}
        for precision in PRECISIONS:
            rows = [
                f"{in_words(names)} | {' | '.join(kernels)}"
                for kernels, names in groups_of(target, precision).items()
            ]
            by_groups.setdefault("\n".join(rows), []).append(f"`{precision}`")
        for rows_text, precisions in by_groups.items():
            first = f"| `{target}` | {', '.join(precisions)} | "
            lines += [first + row + " |" for row in rows_text.split("\n")]
    return "\n".join(lines) + "\n"
