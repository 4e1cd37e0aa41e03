"""The graph of a traced function: nodes, symbolic shapes, and the rules that build them.

Everything is f32 (comparisons are bool). The last axis of a shape is a whole number known while
tracing; each leading axis is either 1 or the call's own length there, written as a `Lead`. Slices
are pushed down to the loads and products they end at, so a graph holds none.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from q4jit.errors import TraceError
from q4jit.weights.formats import FORMATS, Format

ELEMENTWISE: Final = frozenset(
    "neg exp log tanh sqrt abs add sub mul div maximum minimum "
    "lt le gt ge eq ne and or not where".split()
)
BOOLEAN: Final = frozenset("lt le gt ge eq ne and or not".split())
DECODED: Final = frozenset({"dequantize", "rows"})
"""Values of a weight itself: a kernel of their own writes them, and nothing computes with them."""
# what NumPy's arithmetic means where both operands are truth values
_ON_TRUTH: Final = {"add": "or", "maximum": "or", "mul": "and", "minimum": "and"}


@dataclass(frozen=True)
class Lead:
    """Leading axis number `axis`, counted from the last but one.

    `length` is given only where it disagrees with another argument's, so that an error can show it.
    """

    axis: int
    length: int | None = None

    def __str__(self) -> str:
        return (
            f"M{'' if self.axis == 1 else self.axis}" if self.length is None else f"{self.length}"
        )


Dim = int | Lead
Shape = tuple[Dim, ...]


def show_shape(shape: Shape) -> str:
    """A shape as people write it: [M, 576]."""
    return f"[{', '.join(map(str, shape))}]"


@dataclass(frozen=True)
class ArraySpec:
    """An f32 array argument: the last axis of `shape` is a number, leading ones a `Lead` or 1."""

    shape: Shape

    def __str__(self) -> str:
        return f"f32 {show_shape(self.shape)}"


@dataclass(frozen=True)
class WeightSpec:
    """A quantised weight argument [k, n].

    finite: no scale is Inf or NaN. suits_f16: values of Q4_0 may be rounded to f16 where two such
    roundings are allowed (`QuantizedTensor.suits_f16`).
    """

    format: str
    k: int
    n: int
    finite: bool = True
    suits_f16: bool = True

    @property
    def block_format(self) -> Format:
        """How the blocks of the weight are laid out and decoded."""
        return FORMATS[self.format]

    def __str__(self) -> str:
        return f"{self.format} [{self.k}, {self.n}]{'' if self.finite else ' with Inf or NaN'}"


@dataclass(frozen=True)
class IdsSpec:
    """An int32 or int64 array argument of row numbers: every axis is a leading one."""

    shape: Shape

    def __str__(self) -> str:
        return f"ids {show_shape(self.shape)}"


@dataclass(frozen=True)
class ScalarSpec:
    """A float argument: its value is read at every call."""

    def __str__(self) -> str:
        return "float"


@dataclass(frozen=True)
class StaticSpec:
    """An int, bool, str or None: its value is part of the signature."""

    kind: type
    value: int | bool | str | None

    def __str__(self) -> str:
        return repr(self.value)


Spec = ArraySpec | WeightSpec | IdsSpec | ScalarSpec | StaticSpec
Signature = tuple[Spec, ...]


@dataclass(frozen=True, eq=False)
class Node:
    """One value of a graph. `id` counts up in an order in which operands come first.

    op is one of `load` (array argument `arg`, from column `start`), `scalar` (argument `arg`),
    `const` (`value`), `matmul` (operand @ weight argument `arg`, columns from `start`), `sum`
    (over the last axis), `reshape` (the same numbers with one axis of 1 at the end more or fewer),
    `dequantize` (weight argument `arg`, as rows of K), `ids` (argument `arg`), `rows` (GGUF rows of
    weight argument `arg`, one for each of the operand's ids), or one of ELEMENTWISE.
    """

    id: int
    op: str
    operands: tuple["Node", ...]
    shape: Shape
    arg: int = -1
    start: int = 0
    value: float = 0.0

    @property
    def width(self) -> int:
        """Elements of a row: the last axis, or 1 for scalars and values whose axis was reduced."""
        last = self.shape[-1] if self.shape else 1
        return last if isinstance(last, int) else 1

    @property
    def varies(self) -> bool:
        """Whether the value differs from row to row (has a leading axis that is not 1)."""
        return any(isinstance(d, Lead) for d in self.shape)

    @property
    def is_bool(self) -> bool:
        """Whether the value is a truth value, not a number."""
        return self.op in BOOLEAN

    def __str__(self) -> str:
        detail = {
            "load": f" arg{self.arg}" + (f" from {self.start}" if self.start else ""),
            "scalar": f" arg{self.arg}",
            "const": f" {self.value!r}",
            "matmul": f" @ arg{self.arg}" + (f" from {self.start}" if self.start else ""),
            "dequantize": f" arg{self.arg}",
            "ids": f" arg{self.arg}",
            "rows": f" of arg{self.arg}",
        }.get(self.op, "")
        operands = "".join(f" v{n.id}" for n in self.operands)
        return f"v{self.id}: {show_shape(self.shape)} = {self.op}{operands}{detail}"


@dataclass(frozen=True)
class Graph:
    """A traced function: its name, its arguments' names and specs, and what it returns."""

    name: str
    names: tuple[str, ...]
    signature: Signature
    outputs: tuple[Node, ...]
    returns_tuple: bool

    def nodes(self) -> list[Node]:
        """Every node that an output needs, operands first."""
        return reachable(self.outputs)

    def __str__(self) -> str:
        pairs = zip(self.names, self.signature, strict=True)
        lines = [f"graph {self.name}({', '.join(f'{name}: {spec}' for name, spec in pairs)})"]
        lines += [f"  {node}" for node in self.nodes()]
        lines.append(f"  return {', '.join(f'v{n.id}' for n in self.outputs)}")
        return "\n".join(lines)


_OPERATORS: Final = {
    "add": ("+", 1),
    "sub": ("-", 1),
    "mul": ("*", 2),
    "div": ("/", 2),
    "lt": ("<", 0),
    "le": ("<=", 0),
    "gt": (">", 0),
    "ge": (">=", 0),
    "eq": ("==", 0),
    "ne": ("!=", 0),
    "and": ("&", -1),
    "or": ("|", -2),
}
_ATOM: Final = 4
_LONGEST_EXPRESSION: Final = 72


def statements(
    results: Sequence[tuple[str, Node]], names: Sequence[str], known: Mapping[int, str]
) -> list[str]:
    """Assignments, as a person would write them, that compute `results` (label, value).

    names: the arguments'; known: values, by id, that are there already under some name. A value
    that is used twice, and a long expression, get a line of their own.
    """
    uses: dict[int, int] = {}
    nodes = reachable(tuple(node for _, node in results), known)
    for node in (*(n for user in nodes for n in user.operands), *(n for _, n in results)):
        uses[node.id] = uses.get(node.id, 0) + 1
    texts = {i: (name, _ATOM) for i, name in known.items()}
    lines = []
    for node in nodes:
        text, binding = _expression(node, [texts[n.id] for n in node.operands], names)
        if binding < _ATOM and (uses[node.id] > 1 or len(text) > _LONGEST_EXPRESSION):
            lines.append(f"v{node.id} = {text}")
            text, binding = f"v{node.id}", _ATOM
        texts[node.id] = (text, binding)
    return lines + [f"{label} = {texts[node.id][0]}" for label, node in results]


def _expression(
    node: Node, operands: Sequence[tuple[str, int]], names: Sequence[str]
) -> tuple[str, int]:
    """The text of a node and how tightly its outermost operator binds."""
    if node.op in _OPERATORS:
        sign, binding = _OPERATORS[node.op]
        left, right = (
            text if inner >= binding + (i if sign in "-/" else 0) else f"({text})"
            for i, (text, inner) in enumerate(operands)
        )
        return f"{left} {sign} {right}", binding
    match node.op:
        case "const":
            return f"{node.value:.7g}", _ATOM
        case "scalar" | "ids":
            return names[node.arg], _ATOM
        case "load":
            stop = node.start + node.width
            cut = f"[..., {node.start}:{stop}]" if node.start else ""
            return f"{names[node.arg]}{cut}", _ATOM
        case "reshape":
            return operands[0]
        case "neg":
            text, inner = operands[0]
            return f"-{text}" if inner == _ATOM else f"-({text})", 3
        case "matmul":
            stop = node.start + node.width
            cut = f"[:, {node.start}:{stop}]" if node.start else ""
            return f"{operands[0][0]} @ {names[node.arg]}{cut}", 2
        case "dequantize":
            return f"{names[node.arg]}.dequantize()", 3
        case "rows":
            return f"{names[node.arg]}.rows({operands[0][0]})", 3
    return f"{node.op}({', '.join(text for text, _ in operands)})", 3


def reachable(roots: tuple[Node, ...], stop: Container[int] = ()) -> list[Node]:
    """The roots and all that they need, operands first; values in `stop` are not entered."""
    found: dict[int, Node] = {}
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node.id not in found and node.id not in stop:
            found[node.id] = node
            stack.extend(node.operands)
    return [found[i] for i in sorted(found)]


def broadcast(a: Shape, b: Shape) -> Shape:
    """NumPy's broadcasting, by symbol: an axis M never matches a number, whatever M is."""
    result: list[Dim] = []
    for da, db in _aligned(a, b):
        if da != db and 1 not in (da, db):
            hint = ""
            if (isinstance(da, Lead) and da.length is None) != (
                isinstance(db, Lead) and db.length is None
            ):
                hint = (
                    " (M stands for the rows of x and is never matched with a fixed length;"
                    " after a reduction use keepdims=True)"
                )
            raise TraceError(
                f"shapes {show_shape(a)} and {show_shape(b)} do not match{hint}: accepted are "
                "equal shapes, or a dimension of 1 to broadcast"
            )
        result.append(db if da == 1 else da)
    if _repeats(result):  # [M] + [M, 1] is an outer sum in NumPy
        raise TraceError(
            f"shapes {show_shape(a)} and {show_shape(b)} meet as {show_shape(tuple(result))}, "
            "every row with every other: accepted are values row by row; after a reduction use "
            "keepdims=True"
        )
    return tuple(result)


def _repeats(shape: list[Dim]) -> bool:
    leads = [d.axis for d in shape if isinstance(d, Lead)]
    return len(leads) != len(set(leads))


def _aligned(a: Shape, b: Shape) -> Iterator[tuple[Dim, Dim]]:
    rank = max(len(a), len(b))
    yield from zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True)


_ON_DECODED: Final = {
    "dequantize": "w.dequantize(): accepted is w.dequantize() as a result of the function; in a "
    "product write x @ w, which never makes a float copy of w",
    "rows": "w.rows(ids): accepted is w.rows(ids) as a result of the function; pass that result to "
    "another function",
}


@dataclass
class Builder:
    """Makes nodes; the same operation on the same operands is one node."""

    signature: Signature
    _known: dict[tuple[object, ...], Node] = field(default_factory=dict)

    def _node(
        self,
        op: str,
        operands: tuple[Node, ...],
        shape: Shape,
        *,
        arg: int = -1,
        start: int = 0,
        value: float = 0.0,
    ) -> Node:
        for n in operands:
            if n.op in DECODED:
                raise TraceError(f"found arithmetic on {_ON_DECODED[n.op]}")
        # the bits of `value`, so that 0.0 and −0.0 stay two constants and NaN is one
        key = (op, tuple(n.id for n in operands), shape, arg, start, np.float32(value).tobytes())
        if key not in self._known:
            self._known[key] = Node(len(self._known), op, operands, shape, arg, start, value)
        return self._known[key]

    def load(self, arg: int, shape: Shape, start: int = 0) -> Node:
        """Array argument number `arg`, `shape[-1]` columns from column `start`."""
        return self._node("load", (), shape, arg=arg, start=start)

    def scalar(self, arg: int) -> Node:
        """Float argument number `arg`."""
        return self._node("scalar", (), (), arg=arg)

    def const(self, value: float) -> Node:
        """A number, rounded to f32."""
        with np.errstate(over="ignore"):
            return self._node("const", (), (), value=float(np.float32(value)))

    def number(self, node: Node) -> Node:
        """A truth value as 1.0 or 0.0; numbers as they are."""
        if not node.is_bool:
            return node
        return self._node("where", (node, self.const(1.0), self.const(0.0)), node.shape)

    def apply(self, op: str, *operands: Node) -> Node:
        """An element-wise operation on broadcast operands; TraceError where they cannot be."""
        if all(n.is_bool for n in operands):
            op = _ON_TRUTH.get(op, op)
        values = operands if op in {"and", "or", "not"} else tuple(map(self.number, operands))
        if op == "where":
            values = (operands[0], *map(self.number, operands[1:]))
            if not values[0].is_bool:
                values = (self.apply("ne", values[0], self.const(0.0)), *values[1:])
        for node in values:
            if op in {"and", "or", "not"} and not node.is_bool:
                raise TraceError(f"{op!r} takes truth values (comparisons), found numbers")
        shape: Shape = ()
        for node in values:
            shape = broadcast(shape, node.shape)
        return self._node(op, tuple(values), shape)

    def power(self, base: Node, exponent: int) -> Node:
        """`base` to a small whole exponent, by repeated squaring."""
        if exponent < 0:
            return self.apply("div", self.const(1.0), self.power(base, -exponent))
        if exponent == 0:  # x⁰ is 1 in x's shape, for NaN too, as in NumPy
            return self.apply("where", self.apply("eq", base, base), *[self.const(1.0)] * 2)
        half = self.power(base, exponent // 2) if exponent > 1 else base
        if exponent == 1:
            return self.number(base)
        square = self.apply("mul", half, half)
        return self.apply("mul", square, base) if exponent % 2 else square

    def sum(self, node: Node, keepdims: bool) -> Node:
        """The sum over the last axis."""
        if not node.shape or not isinstance(node.shape[-1], int):
            raise TraceError(
                f"found a reduction of {show_shape(node.shape)}: only the last axis of a value can "
                "be reduced, and only once"
            )
        total = self._node("sum", (self.number(node),), (*node.shape[:-1], 1))
        return total if keepdims else self.drop_last(total)

    def drop_last(self, node: Node) -> Node:
        """The same value without its last axis, which is 1."""
        return self._node("reshape", (node,), node.shape[:-1])

    def add_last(self, node: Node) -> Node:
        """The same value with an axis of 1 behind the others.

        Only after a reduction, or of a float: kernels run along the last axis of all other values.
        """
        if node.shape and isinstance(node.shape[-1], int):
            raise TraceError(
                f"found a new axis behind {show_shape(node.shape)}: accepted is v[..., None] "
                "where a reduction took the last axis away"
            )
        if node.op == "reshape" and len(node.operands[0].shape) == len(node.shape) + 1:
            return node.operands[0]
        return self._node("reshape", (self.number(node),), (*node.shape, 1))

    def matmul(self, x: Node, arg: int) -> Node:
        """x [..., K] @ weight argument number `arg` [K, N]."""
        spec = self.signature[arg]
        assert isinstance(spec, WeightSpec)
        if not x.shape or x.shape[-1] != spec.k:
            raise TraceError(
                f"shapes {show_shape(x.shape)} @ [{spec.k}, {spec.n}] do not match: accepted is an "
                f"x whose last dimension is K = {spec.k}"
            )
        return self._node("matmul", (self.number(x),), (*x.shape[:-1], spec.n), arg=arg)

    def dequantize(self, arg: int) -> Node:
        """The whole of weight argument number `arg` as floats [K, N]."""
        spec = self.signature[arg]
        assert isinstance(spec, WeightSpec)
        return self._node("dequantize", (), (spec.k, spec.n), arg=arg)

    def ids(self, arg: int) -> Node:
        """Argument number `arg`, row numbers."""
        spec = self.signature[arg]
        assert isinstance(spec, IdsSpec)
        return self._node("ids", (), spec.shape, arg=arg)

    def rows(self, arg: int, ids: Node) -> Node:
        """The GGUF rows of weight argument number `arg` that ids [...] name: floats [..., K]."""
        spec = self.signature[arg]
        assert isinstance(spec, WeightSpec)
        return self._node("rows", (ids,), (*ids.shape, spec.k), arg=arg)

    def slice(self, node: Node, start: int, stop: int) -> Node:
        """Columns start..stop of the last axis, pushed down to loads and products."""
        done: dict[int, Node] = {}  # a value used many times is sliced once
        pending = [node]
        while pending:
            n = pending[-1]
            missing = [o for o in self._sliced_operands(n, start, stop) if o.id not in done]
            if missing:
                pending += missing
            else:
                done[n.id] = self._slice(n, start, stop, done)
                pending.pop()
        return done[node.id]

    def _sliced_operands(self, node: Node, start: int, stop: int) -> tuple[Node, ...]:
        if node.op not in ELEMENTWISE or (start, stop) == (0, node.shape[-1]):
            return ()
        return tuple(n for n in node.operands if n.shape and n.shape[-1] != 1)

    def _slice(self, node: Node, start: int, stop: int, done: dict[int, Node]) -> Node:
        if (start, stop) == (0, node.shape[-1]):
            return node
        shape = (*node.shape[:-1], stop - start)
        if node.op == "load":
            return self.load(node.arg, shape, node.start + start)
        if node.op == "matmul":
            return self._node(
                "matmul", node.operands, shape, arg=node.arg, start=node.start + start
            )
        if node.op in DECODED:
            raise TraceError(f"found a slice of {_ON_DECODED[node.op]}")
        if node.op in ELEMENTWISE:
            return self._node(node.op, tuple(done.get(n.id, n) for n in node.operands), shape)
        raise TraceError(f"a slice of a {node.op} of {show_shape(node.shape)} is not supported")
