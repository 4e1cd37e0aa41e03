"""Rendering HIP: one planned kernel becomes the text of one translation unit. A pure function.

Templates hold the C++; what they are given are constants, names and steps (`hip_values`). The text
begins with the prelude of its platform, and below it is the same for AMD, NVIDIA and the host.
"""

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import jinja2

from q4jit.frontend import elementary
from q4jit.frontend.graph import Node
from q4jit.frontend.specs import WeightSpec
from q4jit.hip.kernel import (
    BOUNDED_THREADS,
    MAX_GRID_Y,
    ROWS,
    TILE_HALVES,
    HipKernel,
    HipPlan,
)
from q4jit.hip.values import (
    Step,
    Sum,
    Values,
    buffer_name,
    c_names,
    literal,
    parameters,
    store_index,
)
from q4jit.plan.kernels import Source
from q4jit.targets import Target
from q4jit.weights.formats import Format
from q4jit.weights.layouts import GGUF, LANES, PLANAR, TILES16, Planar, fields

SUFFIX: Final = ".hip"
_FRAME: Final = "kernel.hip.j2"
_MARK: Final = re.compile("\x01(.*?)\x02")
_OPERATORS: Final = {"and": "logical_and", "or": "logical_or", "not": "logical_not"}


def render(plan: HipPlan, kernel: HipKernel, platform: str | None = None) -> Source:
    """The text of a kernel: the same for the same plan, whenever and wherever.

    platform: whose prelude it gets, `amd`, `nvidia` or `host` (None: the target's own).
    """
    arch = plan.target.hip
    context = _Context(plan, kernel).variables()
    context["platform"] = platform or ("nvidia" if arch.is_nvidia else "amd")
    text = environment().get_template(_FRAME).render(context)
    return Source(kernel.work.symbol, plan.target, text, SUFFIX, lambda: _origins(context))


def render_generic(
    fmt: Format, target: Target, block_size: int, platform: str | None = None
) -> Source:
    """The text of `<format>_matmul_kernel`, a product on GGUF rows with M, N, K as arguments.

    platform: as for `render`.
    """
    name = fmt.name.lower()
    weight = _Weight(WeightSpec(fmt.name, fmt.block_elements, 1), GGUF)  # one block
    context = {
        "platform": platform or ("nvidia" if target.hip.is_nvidia else "amd"),
        "arch": target.hip,
        "symbol": f"{name}_matmul_kernel",
        "argument": f"weights_{name}",
        "weight": weight,
        "block_bytes": fmt.block_bytes,
        "block_size": block_size,
        "max_grid_y": MAX_GRID_Y,
        "kernel": {"lanes": 1, "schedule": "generic"},
        "needs": {
            "block_sum": True,
            "block_largest": False,
            "fours": False,
            "unaligned": not weight.float_bytes,
        },
    }
    text = environment().get_template("generic.hip.j2").render(context)
    return Source(f"{name}_matmul_kernel", target, text, SUFFIX)


def render_read(target: Target, block_size: int, ahead: int, platform: str | None = None) -> Source:
    """The text of `q4jit_read`, which reads units of 16 bytes and does nothing else.

    ahead: loads of a thread on their way at a time. platform: as for `render`.
    """
    symbol = "q4jit_read"
    context = {
        "platform": platform or ("nvidia" if target.hip.is_nvidia else "amd"),
        "arch": target.hip,
        "symbol": symbol,
        "block_size": block_size,
        "ahead": ahead,
    }
    text = environment().get_template("read.hip.j2").render(context)
    return Source(symbol, target, text, SUFFIX)


def template_directory() -> Path:
    """Where the templates are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "templates"
    return installed if installed.is_dir() else package.parent / "templates"


@functools.cache
def environment(marked: bool = False) -> jinja2.Environment:
    """Jinja with the templates; `marked` ones say at the end of each line where it stands."""
    kind = _MarkedLoader if marked else jinja2.FileSystemLoader
    return jinja2.Environment(
        loader=kind(template_directory()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the text is C++; names in it are checked by `hip_values`
    )


class _MarkedLoader(jinja2.FileSystemLoader):
    """Loads templates with a mark at the end of every line that reaches the text."""

    def get_source(
        self, environment: jinja2.Environment, template: str
    ) -> tuple[str, str, Callable[[], bool]]:
        source, path, is_fresh = super().get_source(environment, template)
        lines = source.split("\n")
        for number, line in enumerate(lines, 1):
            if line and not line.endswith(("%}", "#}")):  # trim_blocks wants a tag's own line end
                lines[number - 1] = f"{line}\x01{template}:{number}\x02"
        return "\n".join(lines), path, is_fresh


def _origins(context: dict[str, Any]) -> dict[int, str]:
    """For each line of a text the template and the line there that it was written by."""
    marked = environment(marked=True).get_template(_FRAME).render(context)
    found = {}
    for number, line in enumerate(marked.split("\n"), 1):
        mark = _MARK.search(line)
        if mark:
            found[number] = mark[1]
    return found


# --- weights ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Field:
    name: str
    start_bytes: int
    stride_bytes: int


@dataclass(frozen=True)
class _Plane:
    """first, words: where its 16-byte words of a unit stand among those of all planes."""

    field: str
    bits: int
    width_bytes: int
    run_elements: int
    lshift: int
    first: int

    @property
    def words(self) -> int:
        return 1 if self.width_bytes == 16 else 2

    @property
    def is_split(self) -> bool:
        """Whether the units of a block share its bytes."""
        return self.width_bytes != 16 and self.bits != 8

    @property
    def mask(self) -> str:
        return f"{((1 << self.bits) - 1) * 0x01010101:#010x}u"


@dataclass(frozen=True)
class _Weight:
    """What `weight.hip.j2` needs to know of a weight."""

    spec: WeightSpec
    layout: str

    @property
    def _fmt(self) -> Format:
        return self.spec.block_format

    @property
    def name(self) -> str:
        return f"{self.format}_{self.k}x{self.n}"

    @property
    def format(self) -> str:
        return self.spec.format

    @property
    def k(self) -> int:
        return self.spec.k

    @property
    def n(self) -> int:
        return self.spec.n

    @property
    def is_planar(self) -> bool:
        return self.layout in {PLANAR, TILES16}

    @property
    def is_quads(self) -> bool:
        """Whether four blocks stand together, transposed for the lanes that share them."""
        return self.layout == TILES16

    @property
    def offset_type(self) -> str:
        """What counts a weight's bytes: with 32 bits a GPU needs half of the additions."""
        total = Planar(self._fmt, self.k, self.n, tiled=self.is_quads).size_bytes
        return "u32" if total < 1 << 32 else "u64"

    @property
    def load(self) -> str:
        return "stream_16" if self.is_planar else "load_16_by_2"

    @property
    def float_bytes(self) -> int:
        return self._fmt.block_bytes if self._fmt.float_dtype else 0

    @property
    def column_bytes(self) -> int:
        shape = Planar(self._fmt, self.k, self.n)
        return (
            shape.blocks * shape.block_elements if self.is_planar else self.k
        ) * self.float_bytes

    @property
    def block_elements(self) -> int:
        return self._fmt.block_elements

    @property
    def zero(self) -> str:
        # signed quants are read as bytes counted from −128
        return literal(self._fmt.zero + (128 if self._fmt.signed else 0))

    @property
    def byte_zero(self) -> int:
        """The quant of the value 0, where quants are signed bytes."""
        return self._fmt.zero

    @property
    def largest(self) -> str:
        """The largest quant."""
        return literal((1 << self._fmt.quant_bits) - 1)

    @property
    def signed(self) -> bool:
        return self._fmt.signed

    @property
    def has_m(self) -> bool:
        return self._fmt.m_offset_bytes is not None

    @property
    def has_scales(self) -> bool:
        return self._fmt.scales_offset_bytes is not None

    @property
    def fields(self) -> list[_Field]:
        if self.is_planar:
            regions = Planar(self._fmt, self.k, self.n, tiled=self.is_quads).regions
            return [_Field(name, start, size) for name, (start, size) in regions.items()]
        stride = self._fmt.block_bytes
        return [_Field(f.name, f.source_bytes, stride) for f in fields(self._fmt)]

    @property
    def planes(self) -> list[_Plane]:
        found: list[_Plane] = []
        for i, p in enumerate(self._fmt.planes):
            shape = p.bits, p.width_bytes, p.run_elements, p.lshift
            found.append(_Plane(f"QUANTS{i}", *shape, sum(q.words for q in found)))
        return found

    @property
    def words(self) -> int:
        """Loads of 16 bytes for the quants of a unit."""
        return sum(plane.words for plane in self.planes)


@dataclass(frozen=True)
class _Product:
    node: Node
    name: str
    argument: str
    weight: _Weight

    @property
    def from_start(self) -> str:
        return f" + {self.node.start}" if self.node.start else ""

    @property
    def is_of_tiles(self) -> bool:
        """Whether the 16 columns of a wave are stored beside each other."""
        return self.node.start % LANES == 0


# --- the variables of the templates ---------------------------------------------------------------


@dataclass
class _Context:
    plan: HipPlan
    kernel: HipKernel

    def variables(self) -> dict[str, Any]:
        """Everything that the templates are given."""
        plan, kernel = self.plan, self.kernel
        products = [self._product(p) for s in kernel.work.sections for p in s.products]
        weights = {p.weight.name: p.weight for p in products}
        decoded = self._decoded()
        if decoded:
            weights[decoded["weight"].name] = decoded["weight"]
        x = self._x() if kernel.work.sections else None
        found: dict[str, Any] = {
            "kernel": kernel,
            "arch": plan.target.hip,
            "schedule": kernel.schedule,
            "max_grid_y": MAX_GRID_Y,
            "bounded_threads": BOUNDED_THREADS,
            # dot products of f16 take denormals for 0, and so do the matrix units of some archs
            "flushes_halves": kernel.pairs or plan.target.hip.flushes_halves,
            "comment": self._comment(),
            "products": products,
            "weight_structs": list(weights.values()),
            "parameters": parameters(plan, kernel),
            "x": x,
            "epilogue": self._epilogue(products) if kernel.work.sections else None,
            "width": kernel.section.width if kernel.work.sections else 0,
            "k": kernel.work.x.width if kernel.work.x is not None else 0,
        }
        steps: list[Step | Sum] = list(x["row_steps"] if x else ())
        if kernel.schedule == ROWS:
            found |= self._rows()
            steps += found["row_steps"]
        found |= decoded
        found["needs"] = {
            "block_sum": kernel.schedule == "element"
            or (kernel.schedule == ROWS and bool(kernel.int8 or kernel.terms or kernel.halves))
            or any(isinstance(s, Sum) for s in steps),
            "unaligned": any(not w.is_planar and not w.float_bytes for w in weights.values()),
            "minimum": any(w.has_m for w in weights.values()),
            "block_largest": kernel.schedule == ROWS and bool(kernel.halves),
            "fours": bool(kernel.halves) and kernel.schedule != TILE_HALVES,
        }
        found["elementary"] = _elementary(_operations(found))
        return found

    def _decoded(self) -> dict[str, Any]:
        """The weight that a kernel only decodes, and for which ids."""
        store = self.kernel.work.decoded
        if store is None:
            return {}
        names = c_names(self.plan.graph.names)
        return {
            "weight": _Weight(self.plan.weight(store.node.arg), self.kernel.layout),
            "argument": names[store.node.arg],
            "ids": [names[n.arg] for n in store.node.operands],
            "buffer": buffer_name(store.buffer.kind, store.buffer.index),
        }

    def _comment(self) -> list[str]:
        kernel = self.kernel
        title = f"{kernel.work.name} for {self.plan.target}, {kernel.rows_class}, made by q4jit"
        return [title, *self.plan.describe(self.kernel)]

    def _product(self, node: Node) -> _Product:
        argument = c_names(self.plan.graph.names)[node.arg]
        weight = _Weight(self.plan.weight(node.arg), self.kernel.layout)
        return _Product(node, f"v{node.id}", argument, weight)

    @property
    def _values(self) -> Values:
        return Values(self.plan.graph, self.kernel)

    def _x(self) -> dict[str, Any]:
        """The prologue: steps for the row, where sums make them worth sharing, and at a column."""
        x = self.kernel.work.x
        assert x is not None
        rows = _operators(self._values.row_steps([x], {}))
        if not any(isinstance(step, Sum) for step in rows):
            rows = ()
        known = {int(step.name[1:]): f"s.{step.name}" for step in rows if not _is_bool(step)}
        steps, (expression,) = self._values.at([x], known)
        used = {text for step in steps for text in step.operands} | {expression}
        return {
            "row_steps": rows,
            "row_fields": [step.name for step in rows if f"s.{step.name}" in used],
            "steps": _operators(steps),
            "expression": expression,
        }

    def _epilogue(self, products: list[_Product]) -> dict[str, Any]:
        stores = self.kernel.section.stores
        known = {p.node.id: p.name for p in products}
        steps, expressions = self._values.at([s.node for s in stores], known)
        return {
            "steps": _operators(steps),
            "stores": [
                _store(s.buffer.kind, s.buffer.index, s.node, s.buffer.width, e)
                for s, e in zip(stores, expressions, strict=True)
            ],
        }

    def _rows(self) -> dict[str, Any]:
        """The steps of a `rows` kernel: of the row, then of every value that is stored."""
        kernel = self.kernel
        roots = [s.node for s in kernel.work.rows] + (
            [kernel.work.x] if kernel.work.x is not None else []
        )
        row_steps = self._values.row_steps(roots, {})
        known = {int(step.name[1:]): step.name for step in row_steps}
        scalars, wide = [], []
        for store in kernel.work.rows:
            steps, (expression,) = self._values.at([store.node], known)
            stored = _store(
                store.buffer.kind, store.buffer.index, store.node, store.buffer.width, expression
            )
            if store.node.width == 1:
                scalars.append(stored)
            else:
                wide.append(stored | {"steps": _operators(steps), "width": store.node.width})
        x_steps: tuple[Step, ...] = ()
        x_expression = ""
        if (kernel.terms or kernel.int8 or kernel.halves) and kernel.work.x is not None:
            x_steps, (x_expression,) = self._values.at([kernel.work.x], known)
        return {
            "row_steps": _operators(row_steps),
            "row_stores": scalars,
            "wide_stores": wide,
            "x_steps": _operators(x_steps),
            "x_expression": x_expression,
        }


def _store(kind: str, index: int, node: Node, width: int, expression: str) -> dict[str, Any]:
    return {
        "buffer": buffer_name(kind, index),
        "index": store_index(node, width),
        "expression": expression,
    }


def _is_bool(step: Step | Sum) -> bool:
    return isinstance(step, Step) and step.is_bool


def _operators(steps: Iterable[Any]) -> tuple[Any, ...]:
    """The steps with the operations called as the macros are: Jinja keeps `and` for itself."""
    found: list[Step | Sum] = []
    for step in steps:
        if isinstance(step, Sum):
            found.append(Sum(step.name, step.width, _operators(step.steps), step.value))
        else:
            op = _OPERATORS.get(step.op, step.op)
            found.append(replace(step, op=op))
    return tuple(found)


def _operations(variables: dict[str, Any]) -> set[str]:
    """The operations of all steps among the variables."""
    found: set[str] = set()
    stack: list[Any] = [variables]
    while stack:
        value = stack.pop()
        if isinstance(value, Step):
            found.add(value.op)
        elif isinstance(value, Sum):
            stack += value.steps
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value
    return found


# --- exp, log and tanh -------------------------------------------------------------------------


class _CxxOps:
    """The operations of `elementary.Ops`, written as C++."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def f32(self, value: float) -> str:
        return literal(value)

    def i32(self, value: int) -> str:
        return f"(i32){value & 0xFFFFFFFF:#x}u" if value < 0 or value > 255 else str(value)

    def op(self, name: str, *v: str) -> str:
        kind, text = _CXX[name]
        result = f"t{len(self.lines)}"
        self.lines.append(f"    const {kind} {result} = {text.format(*v)};")
        return result


_CXX: Final = {
    "fadd": ("float", "{} + {}"),
    "fsub": ("float", "{} - {}"),
    "fmul": ("float", "{} * {}"),
    "fdiv": ("float", "{} / {}"),
    "fma": ("float", "fma_f32({}, {}, {})"),
    "fabs": ("float", "abs_f32({})"),
    # unsigned: what wraps around for NaN and numbers below 0 is not used, but must be defined
    "iadd": ("i32", "(i32)((u32){} + (u32){})"),
    "isub": ("i32", "(i32)((u32){} - (u32){})"),
    "shl": ("i32", "(i32)((u32){} << {})"),
    "ashr": ("i32", "{} >> {}"),
    "and": ("i32", "{} & {}"),
    "or": ("i32", "{} | {}"),
    "flt": ("bool", "{} < {}"),
    "feq": ("bool", "{} == {}"),
    "select": ("float", "{} ? {} : {}"),
    "as_int": ("i32", "as_i32({})"),
    "as_float": ("float", "as_f32({})"),
}
# data, because Python may drop docstrings and the text is a cache key
_ELEMENTARY: Final = {
    "exp": (elementary.exp, "e to the x within 2 ulp, denormal results included."),
    "log": (elementary.log, "ln x within 3 ulp, denormals included; -Inf at 0, NaN below."),
    "tanh": (elementary.tanh, "tanh x within 3 ulp: a polynomial up to 0.625, by exp beyond."),
}


def _elementary(operations: set[str]) -> list[str]:
    return [_elementary_function(name) for name in _ELEMENTARY if name in operations]


@functools.cache
def _elementary_function(name: str) -> str:
    function, comment = _ELEMENTARY[name]
    ops = _CxxOps()
    o: elementary.Ops[str] = ops
    result = function(o, "x")
    body = "\n".join([*ops.lines, f"    return {result};"])
    return f"// {comment}\nDEVICE float {name}_f32(float x) {{\n{body}\n}}"
