"""The products of a build: the text of each kernel, and how to launch it.

A product has one launch or two. With two, the first prepares the rows of x and leaves them in
scratch buffers for the second.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from q4jit.frontend.specs import WeightSpec, array_spec
from q4jit.frontend.trace import trace
from q4jit.hip.classes import MANY_ROWS, m_class
from q4jit.hip.kernel import Grid, HipKernel, HipPlan, grid
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

_GENERIC_BLOCK_SIZE: Final = 256
_ROLES: Final = {
    "array": "x",
    "weight": "weights",
    "output": "y",
    "m": "M",
}  # by the kind of a slot
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
    """One argument of a kernel.

    Attributes:
        name: its name in the kernel's text.
        role: what the launcher passes: x, weights, y, M, N, K or the name of a scratch buffer.
        type: its C type.
    """

    name: str
    role: str
    type: str

    @property
    def direction(self) -> str:
        """`out` for a pointer that the kernel writes to, else `in`."""
        return "out" if self.type.endswith("*") and not self.type.startswith("const ") else "in"


@dataclass(frozen=True)
class BuiltLaunch:
    """One launch of a kernel.

    Attributes:
        name: the kernel's name, without the arch.
        source: the kernel's text.
        block_size: threads per thread block.
        grid_x: thread blocks along x; None for N of them.
        rows_per_block: rows of y that a thread block computes.
        arguments: the kernel's arguments in order.
    """

    name: str
    source: Source
    block_size: int
    grid_x: int | None
    rows_per_block: int
    arguments: tuple[BuiltArgument, ...]

    @property
    def stem(self) -> str:
        """The name of the launch's files, without suffixes."""
        return f"{self.name}_{self.source.target.arch}"


@dataclass(frozen=True)
class BuiltProduct:
    """The product y = x @ w for one arch and one class of M.

    Attributes:
        name: a unique name.
        target: the GPU.
        fmt: the format of w.
        shape: (K, N); None if the kernels take them at each launch.
        m_range: the first and the last M; None for no limit.
        precision: the upper bound of the error.
        layout: the layout of w.
        requires_finite_scales: whether a scale that is Inf or NaN makes results wrong.
        tensors: names of the tensors of the request that have this shape and format.
        launches: the launches in order.
        scratch: bytes per row of x of each scratch buffer.
    """

    name: str
    target: Target
    fmt: Format
    shape: tuple[int, int] | None
    m_range: tuple[int, int | None]
    precision: str
    layout: str
    requires_finite_scales: bool
    tensors: tuple[str, ...]
    launches: tuple[BuiltLaunch, ...]
    scratch: Mapping[str, int]


def products_of(request: BuildRequest) -> list[BuiltProduct]:
    """Return a product for each arch, weight and class of M of a request."""
    if request.generic:
        formats = dict.fromkeys(spec.block_format for spec in request.weights)
        return [
            _generic_product(request, fmt, target) for target in request.targets for fmt in formats
        ]
    return [
        _product(request, spec, target, m_range)
        for target in request.targets
        for spec in request.weights
        for m_range in _requested_classes(request, target)
    ]


def m_classes(target: Target, plan_options: PlanOptions) -> tuple[tuple[int, int | None], ...]:
    """Return the first and last M (None: no limit) of each class of M of a target."""
    plan_options, firsts = _with_layout(plan_options), dict[int, int]()
    for m in range(1, MANY_ROWS + 1):
        firsts.setdefault(m_class(target, m, plan_options), m)
    starts = list(firsts.values())
    return tuple(zip(starts, [*(s - 1 for s in starts[1:]), None], strict=True))


def _requested_classes(request: BuildRequest, target: Target) -> list[tuple[int, int | None]]:
    plan_options = _with_layout(request.plan_options)
    wanted = {m_class(target, m, plan_options) for m in request.rows}
    classes = m_classes(target, plan_options)
    return [c for c in classes if not wanted or m_class(target, c[0], plan_options) in wanted]


def _with_layout(plan_options: PlanOptions) -> PlanOptions:
    """Return the options with a fixed layout: a program packs a weight once, for every M."""
    return replace(plan_options, layout=plan_options.layout or PLANAR)


def _product(
    request: BuildRequest, spec: WeightSpec, target: Target, m_range: tuple[int, int | None]
) -> BuiltProduct:
    plan_options = _with_layout(request.plan_options)
    infinite = "" if spec.finite else "_inf"
    name = f"{spec.format.lower()}_k{spec.k}_n{spec.n}{infinite}_{plan_options.precision}"
    name += f"_{plan_options.layout}_{_range_name(m_range)}"

    def product(x: Any, w: Any) -> Any:
        return x @ w

    product.__name__ = name
    free_m = 2  # any M except 1, which tracing would take for a broadcast
    graph = trace(product, (array_spec((free_m, spec.k)), spec))
    plan = make_plan(graph, target, m_range[0], plan_options)
    scratch_bytes: dict[str, int] = {}
    for kernel in plan.kernels:
        scratch_bytes |= _bytes_per_row(kernel)
    return BuiltProduct(
        name=f"{name}_{target.arch}",
        target=target,
        fmt=spec.block_format,
        shape=(spec.k, spec.n),
        m_range=m_range,
        precision=plan_options.precision,
        layout=plan_options.layout or PLANAR,
        requires_finite_scales=spec.finite,
        tensors=request.weights[spec],
        launches=tuple(_launch(plan, kernel) for kernel in plan.kernels),
        scratch=scratch_bytes,
    )


def _range_name(m_range: tuple[int, int | None]) -> str:
    first, last = m_range
    if last is None:
        return f"m{first}_up"
    return f"m{first}" if first == last else f"m{first}_{last}"


def _bytes_per_row(kernel: HipKernel) -> dict[str, int]:
    one, two = (scratch(kernel, m) for m in (1, 2))
    assert all(two[slot] == 2 * size for slot, size in one.items()), (
        "scratch memory is proportional to M"
    )
    return {str(slot): size for slot, size in one.items()}


def _launch(plan: HipPlan, kernel: HipKernel) -> BuiltLaunch:
    launch_grid: Grid = grid(plan, kernel)
    assert launch_grid.rows_per_block is not None, "a product's grid depends on M"
    arguments = tuple(
        BuiltArgument(p.name, _ROLES.get(p.slot.kind, str(p.slot)), _c_type(p.type))
        for p in parameters(plan, kernel)
    )
    return BuiltLaunch(
        name=kernel.work.name,
        source=render(plan, kernel),
        block_size=kernel.block_size,
        grid_x=launch_grid.x,
        rows_per_block=launch_grid.rows_per_block,
        arguments=arguments,
    )


def _c_type(text: str) -> str:
    return re.sub(r"\b[iu]\d+\b", lambda match: _C_TYPES[match[0]], text)


def _generic_product(request: BuildRequest, fmt: Format, target: Target) -> BuiltProduct:
    check_block_size(target, request.plan_options.block_size)
    block_size = request.plan_options.block_size or _GENERIC_BLOCK_SIZE
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
        name=f"{source.symbol}_{target.arch}",
        target=target,
        fmt=fmt,
        shape=None,
        m_range=(1, None),
        precision="f32",
        layout=GGUF,
        requires_finite_scales=False,
        tensors=tensors,
        launches=(launch,),
        scratch={},
    )
