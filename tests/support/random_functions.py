"""Random functions: trees of closures that take the function's arguments by name.

Every operation keeps values near 1 and does not amplify errors, so the bound of a whole function
tests the kernels and not the function's condition.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from hypothesis import strategies as st

from q4jit import quantize
from q4jit.weights.formats import FORMATS
from tests.support.functions import Floats, random

ROWS: Final = (0, 1, 2, 3, 5, 8, 9, 17)
WIDTHS: Final = (1, 5, 16, 37, 48)

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Value:
    """An expression of the arguments; `width` is its last axis, 1 if it was reduced."""

    text: str
    width: int
    compute: Callable[[Arguments], Any]

    def __str__(self) -> str:
        return self.text


@dataclass
class Example:
    """A random function and its arguments."""

    arguments: dict[str, Any]
    results: list[Value] = field(default_factory=list)
    returns_tuple: bool = False

    def function(self) -> Callable[..., Any]:
        names = tuple(self.arguments)

        def computed(*values: Any) -> Any:
            arguments = dict(zip(names, values, strict=True))
            results = tuple(result.compute(arguments) for result in self.results)
            return results if self.returns_tuple else results[0]

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        computed.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # of *values
            [inspect.Parameter(name, kind) for name in names]
        )
        return computed

    def __repr__(self) -> str:
        kinds = {n: getattr(v, "shape", v) for n, v in self.arguments.items()}
        return f"{', '.join(map(str, self.results))}  where {kinds}"


# --- operations -----------------------------------------------------------------------------------

# All of these keep values moderate and do not amplify errors.
UNARY: dict[str, Callable[[Any], Any]] = {
    "-{}": lambda v: -v,
    "abs({})": abs,
    "({} + 0.5)": lambda v: v + 0.5,
    "(1.5 - {})": lambda v: 1.5 - v,
    "0.5 * {}": lambda v: 0.5 * v,
    "({} / 3)": lambda v: v / 3,
    "(1 / (1 + abs({})))": lambda v: 1 / (1 + abs(v)),
    "exp(-abs({}))": lambda v: np.exp(-abs(v)),
    "exp(minimum({}, 1))": lambda v: np.exp(np.minimum(v, 1)),
    "log(1 + abs({}))": lambda v: np.log(1 + np.abs(v)),
    "tanh({})": np.tanh,
    "sqrt(1 + {0} * {0})": lambda v: np.sqrt(1 + v * v),
    "silu({})": lambda v: v / (1 + np.exp(-v)),
    "clip({}, -1, 1.5)": lambda v: np.clip(v, -1, 1.5),
    "maximum({}, 0)": lambda v: np.maximum(v, 0),
    "tanh({})**3": lambda v: np.tanh(v) ** 3,
    "(1 + abs({}))**-2": lambda v: (1 + abs(v)) ** -2,
    "where({0} > 0, {0}, 0.1 * {0})": lambda v: np.where(v > 0, v, 0.1 * v),  # continuous at 0
    "where(({0} > -1) & ({0} < 1), {0}, sign)": lambda v: np.where(
        (v > -1) & (v < 1), v, np.where(v < 0, -1.0, 1.0)
    ),
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "({} + {})": lambda a, b: a + b,
    "({} - 0.5 * {})": lambda a, b: a - 0.5 * b,
    "tanh({}) * {}": lambda a, b: np.tanh(a) * b,
    "{} / (1 + abs({}))": lambda a, b: a / (1 + abs(b)),
    "maximum({}, {})": np.maximum,
    "minimum({}, {})": np.minimum,
    "where({0} > 0, {0} * tanh({1}), 0)": lambda a, b: np.where(a > 0, a * np.tanh(b), 0.0),
    "where({0} <= {1}, {0}, {1})": lambda a, b: np.where(a <= b, a, b),
    "where(~({0} < {1}) | ({0} != {0}), {0}, {1})": lambda a, b: np.where(
        ~(a < b) | (a != a), a, b
    ),
}
# Sums of squares and of magnitudes do not cancel.
REDUCTIONS: dict[str, Callable[[Any], Any]] = {
    "mean({0} * {0})": lambda v: np.mean(v * v, axis=-1, keepdims=True),
    "mean(abs({}))": lambda v: abs(v).mean(-1, keepdims=True),
    "max({})": lambda v: np.max(v, axis=-1, keepdims=True),
    "min({})": lambda v: v.min(-1, keepdims=True),
    "norm({})": lambda v: np.linalg.norm(v, axis=-1, keepdims=True),
    "(sum(abs({})) / 8)": lambda v: np.sum(np.abs(v), axis=-1, keepdims=True) / 8,
}


def unary(name: str, v: Value) -> Value:
    apply = UNARY[name]
    return Value(name.format(v), v.width, lambda args: apply(v.compute(args)))


def binary(name: str, a: Value, b: Value) -> Value:
    apply = BINARY[name]
    width = max(a.width, b.width)
    return Value(name.format(a, b), width, lambda args: apply(a.compute(args), b.compute(args)))


def reduced(name: str, v: Value) -> Value:
    apply = REDUCTIONS[name]
    return Value(name.format(v), 1, lambda args: apply(v.compute(args)))


def sliced(v: Value, start: int, stop: int) -> Value:
    text = f"{v}[..., {start}:{stop}]"
    return Value(text, stop - start, lambda args: v.compute(args)[..., start:stop])


def normalised(v: Value) -> Value:
    """Return the RMSNorm of a value, which keeps chained products from growing."""

    def compute(args: Arguments) -> Any:
        x = v.compute(args)
        return x / np.sqrt(0.1 + np.mean(x * x, axis=-1, keepdims=True))

    return Value(f"norm({v})", v.width, compute)


def product(v: Value, name: str, n: int) -> Value:
    return Value(f"({v} @ {name})", n, lambda args: v.compute(args) @ args[name])


def argument(name: str, width: int) -> Value:
    return Value(name, width, lambda args: args[name])


# --- graphs ---------------------------------------------------------------------------------------


@dataclass
class Drawing:
    """Draws an example: the values so far, and the arguments that they need."""

    draw: st.DrawFn
    lead: tuple[int, ...]
    example: Example = field(default_factory=lambda: Example({}))
    values: list[Value] = field(default_factory=list)

    def pick(self, choices: Any) -> Any:
        return self.draw(st.sampled_from(list(choices)))

    def numbers(self, shape: tuple[int, ...]) -> Floats:
        seed = self.draw(st.integers(0, 2**32 - 1))
        return random(*shape, seed=seed)

    def add_array(self, width: int, *, full: bool = False) -> Value:
        """Add an argument of random rank: a vector, a residual, or a shape between them."""
        kept = self.draw(st.integers(0, len(self.lead)))
        lead = self.lead if full else self.lead[len(self.lead) - kept :]
        if not full:
            lead = tuple(self.pick((size, 1)) for size in lead)
        name = f"a{len(self.example.arguments)}"
        self.example.arguments[name] = self.numbers((*lead, width))
        return argument(name, width)

    def add_scalar(self) -> Value:
        name = f"s{len(self.example.arguments)}"
        self.example.arguments[name] = self.draw(st.floats(-2, 2, width=32))
        return argument(name, 1)

    def add_weight(self, k: int, n: int) -> str:
        name = f"w{len(self.example.arguments)}"
        whole = [f for f in ("Q4_0", "Q8_0", "Q4_1") if k % FORMATS[f].block_elements == 0]
        format_ = self.pick(["F32", "F16", *whole])
        self.example.arguments[name] = quantize(self.numbers((k, n)) / np.sqrt(k), format_)
        return name

    def beside(self, v: Value) -> Value:
        """Return a value to combine with `v`: an earlier one, a new array, column or scalar."""
        fitting = [u for u in self.values if 1 in (u.width, v.width) or u.width == v.width]
        kind = self.pick(("earlier", "earlier", "array", "scalar", "column"))
        if kind == "earlier" and fitting:
            return self.pick_value(fitting)
        if kind == "scalar":
            return self.add_scalar()
        return self.add_array(1 if kind == "column" else v.width)

    def pick_value(self, values: list[Value]) -> Value:
        return values[self.draw(st.integers(0, len(values) - 1))]

    def step(self, v: Value) -> Value:
        """Return `v` after one more operation that is not a product."""
        kind = self.pick(("unary", "unary", "binary", "binary", "reduce", "slice", "slice", "norm"))
        if kind == "unary":
            return unary(self.pick(UNARY), v)
        if kind == "binary":
            pair = (v, self.beside(v))
            return binary(self.pick(BINARY), *(pair if self.draw(st.booleans()) else pair[::-1]))
        if kind == "reduce":
            return binary("{} / (1 + abs({}))", v, reduced(self.pick(REDUCTIONS), v))
        if kind == "slice" and v.width > 1:
            if self.draw(st.booleans()):  # a slice of a slice
                v = sliced(v, v.width // 3, v.width)
            start = self.draw(st.integers(0, v.width - 1) | st.just(v.width // 2 // 16 * 16))
            return sliced(v, start, self.draw(st.integers(start + 1, v.width)))
        return normalised(v)

    def steps(self, v: Value, most: int) -> Value:
        for _ in range(self.pick(range(most, -1, -1))):
            v = self.step(v)
            self.values.append(v)
        return v


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """Draw a function: prologue, products that may be chained or share their x, epilogue."""
    rows = draw(st.sampled_from(ROWS))
    lead = draw(st.sampled_from([(rows,), (rows,), (2, rows), (rows, 3), (rows, 1)]))
    drawing = Drawing(draw, lead)
    k = draw(st.sampled_from((32, 64, 96, 5, 37)))
    # with M = 0 every result must have all leading dimensions
    x = drawing.steps(drawing.add_array(k, full=rows == 0 or draw(st.booleans())), 2)
    drawing.values.append(x)
    for _ in range(draw(st.integers(1, 3))):
        x = drawing.pick_value(drawing.values) if draw(st.booleans()) else x
        n = draw(st.sampled_from(WIDTHS))
        y = product(normalised(x), drawing.add_weight(x.width, n), n)
        drawing.values.append(y)
        y = drawing.steps(y, 4)
        drawing.values.append(y)
        if draw(st.booleans()):
            x = y
    example = drawing.example
    example.results = [drawing.values[-1]]
    more = draw(st.sampled_from((2, 1, 0, 0)))
    example.results += [drawing.pick_value(drawing.values) for _ in range(more)]
    example.returns_tuple = more > 0 or draw(st.booleans())
    return example
