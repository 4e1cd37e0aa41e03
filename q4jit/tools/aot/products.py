"""Products and the launches that they are made of: kernels as text, with what a launch must know.

A product is one launch or two: where its schedule wants to know the rows of x first, a kernel goes
before it and hands scratch buffers on.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from q4jit.frontend.specs import WeightSpec, array_spec
from q4jit.frontend.trace import trace
from q4jit.hip.classes import MANY_ROWS, m_class
from q4jit.hip.kernel import (
    Grid,
    HipKernel,
    HipPlan,
    grid,
)
from q4jit.hip.limits import check_block_size
from q4jit.hip.memory import scratch
from q4jit.hip.render import render, render_generic
from q4jit.hip.schedule import make_plan
from q4jit.hip.values import parameters
from q4jit.plan.kernels import Source
from q4jit.plan.options import PlanOptions
from q4jit.targets import Target
from q4jit.tools.aot.request import BuildRequest
from q4jit.weights.formats import Format
from q4jit.weights.layouts import GGUF, PLANAR

_BLOCK_SIZE: Final = 256  # of the generic kernels
_ROLES: Final = {"array": "x", "weight": "weights", "output": "y", "m": "M"}  # by a slot's kind
_C_TYPES: Final = {
    "i8": "signed char",
    "i16": "short",
    "i32": "int",
    "i64": "long long",
    "u8": "unsigned char",
    "u16": "unsigned short",
    "u32": "unsigned int",
    "u64": "unsigned long long",
}


@dataclass(frozen=True)
class BuiltArgument:
    """One argument of a kernel: its name in the text, what the launcher puts there, its C type."""

    name: str
    role: str
    type: str

    @property
    def direction(self) -> str:
        """`in`, or `out` for what the kernel writes."""
        return "out" if self.type.endswith("*") and not self.type.startswith("const ") else "in"


@dataclass(frozen=True)
class BuiltLaunch:
    """One kernel; `grid_x` is None where the grid is as wide as the result."""

    name: str
    source: Source
    block_size: int
    grid_x: int | None
    rows_per_block: int
    arguments: tuple[BuiltArgument, ...]

    @property
    def stem(self) -> str:
        """The name of its files, without suffixes."""
        return f"{self.name}_{self.source.target.arch}"


@dataclass(frozen=True)
class BuiltProduct:
    """y = x @ w for one arch and one class of M: launches in order, scratch in bytes per row."""

    name: str
    target: Target
    fmt: Format
    shape: tuple[int, int] | None
    rows: tuple[int, int | None]
    precision: str
    layout: str
    finite: bool
    tensors: tuple[str, ...]
    launches: tuple[BuiltLaunch, ...]
    scratch: Mapping[str, int]


def products_of(request: BuildRequest) -> list[BuiltProduct]:
    """Return the products of a build, for each arch, weight and class of M that is asked for."""
    if request.generic:
        formats = dict.fromkeys(spec.block_format for spec in request.weights)
        return [
            _generic_product(request, fmt, target) for target in request.targets for fmt in formats
        ]
    return [
        _product(request, spec, target, rows)
        for target in request.targets
        for spec in request.weights
        for rows in _asked_classes(request, target)
    ]


def row_classes(target: Target, plan_options: PlanOptions) -> tuple[tuple[int, int | None], ...]:
    """The classes of M with kernels of their own: first and last M (None: no limit)."""
    plan_options, firsts = _laid_out(plan_options), dict[int, int]()
    for m in range(1, MANY_ROWS + 1):
        firsts.setdefault(m_class(target, m, plan_options), m)
    starts = list(firsts.values())
    return tuple(zip(starts, [*(s - 1 for s in starts[1:]), None], strict=True))


def _asked_classes(request: BuildRequest, target: Target) -> list[tuple[int, int | None]]:
    plan_options = _laid_out(request.plan_options)
    wanted = {m_class(target, m, plan_options) for m in request.rows}
    classes = row_classes(target, plan_options)
    return [c for c in classes if not wanted or m_class(target, c[0], plan_options) in wanted]


def _laid_out(plan_options: PlanOptions) -> PlanOptions:
    """A program packs its weights in one layout for every M."""
    return replace(plan_options, layout=plan_options.layout or PLANAR)


def _product(
    request: BuildRequest, spec: WeightSpec, target: Target, rows: tuple[int, int | None]
) -> BuiltProduct:
    plan_options = _laid_out(request.plan_options)
    infinite = "" if spec.finite else "_inf"
    name = f"{spec.format.lower()}_k{spec.k}_n{spec.n}{infinite}_{plan_options.precision}"
    name += f"_{plan_options.layout}_{_rows_name(rows)}"

    def product(x: Any, w: Any) -> Any:
        return x @ w

    product.__name__ = name
    free_m = 2  # any number but 1, which would be traced as a broadcast
    graph = trace(product, (array_spec((free_m, spec.k)), spec))
    plan = make_plan(graph, target, rows[0], plan_options)
    found: dict[str, int] = {}
    for kernel in plan.kernels:
        found |= _bytes_per_row(kernel)
    return BuiltProduct(
        f"{name}_{target.arch}",
        target,
        spec.block_format,
        (spec.k, spec.n),
        rows,
        plan_options.precision,
        plan_options.layout or PLANAR,
        spec.finite,
        request.weights[spec],
        tuple(_launch(plan, kernel) for kernel in plan.kernels),
        found,
    )


def _rows_name(rows: tuple[int, int | None]) -> str:
    first, last = rows
    if last is None:
        return f"m{first}_up"
    return f"m{first}" if first == last else f"m{first}_{last}"


def _bytes_per_row(kernel: HipKernel) -> dict[str, int]:
    one, two = (scratch(kernel, m) for m in (1, 2))
    assert all(two[slot] == 2 * size for slot, size in one.items()), "scratch counts rows"
    return {str(slot): size for slot, size in one.items()}


def _launch(plan: HipPlan, kernel: HipKernel) -> BuiltLaunch:
    blocks: Grid = grid(plan, kernel)
    assert blocks.rows_per_block is not None, "a product's grid depends on M"
    arguments = tuple(
        BuiltArgument(p.name, _ROLES.get(p.slot.kind, str(p.slot)), _c_type(p.type))
        for p in parameters(plan, kernel)
    )
    return BuiltLaunch(
        kernel.work.name,
        render(plan, kernel),
        kernel.block_size,
        blocks.x,
        blocks.rows_per_block,
        arguments,
    )


def _c_type(text: str) -> str:
    return re.sub(r"\b[iu]\d+\b", lambda found: _C_TYPES[found[0]], text)


def _generic_product(request: BuildRequest, fmt: Format, target: Target) -> BuiltProduct:
    check_block_size(target, request.plan_options.block_size)
    block_size = request.plan_options.block_size or _BLOCK_SIZE
    source = render_generic(fmt, target, block_size)
    arguments = (
        BuiltArgument("activations", "x", "const float*"),
        BuiltArgument(f"weights_{fmt.name.lower()}", "weights", "const unsigned char*"),
        BuiltArgument("output", "y", "float*"),
        *(BuiltArgument(name.lower(), name, "int") for name in ("M", "N", "K")),
    )
    launch = BuiltLaunch(source.symbol, source, block_size, None, 1, arguments)
    tensors = tuple(
        name for spec, names in request.weights.items() if spec.format == fmt.name for name in names
    )
    return BuiltProduct(
        f"{source.symbol}_{target.arch}",
        target,
        fmt,
        None,
        (1, None),
        "f32",
        GGUF,
        False,
        tensors,
        (launch,),
        {},
    )
