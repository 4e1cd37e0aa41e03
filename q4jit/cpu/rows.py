"""Write the rows phase of a CPU's kernels in LLVM IR: the x of the products, and row values."""

import functools
import math
from typing import Final

from q4jit.cpu.digit_form import form_of
from q4jit.cpu.digits import add_digits
from q4jit.cpu.lanes import INFINITY, SIXTEEN, broadcast, magnitude_of, sum_lanes, tail_mask
from q4jit.cpu.llvm_text import (
    EXPONENT_BIAS,
    EXPONENT_SHIFT,
    MASK,
    VECTOR,
    Function,
    Module,
    float_text,
)
from q4jit.cpu.long_sums import write_long_sums
from q4jit.cpu.operations import apply
from q4jit.cpu.schedule import UNIT, digits_bytes, padded_k
from q4jit.cpu.values import Context, CpuValues
from q4jit.frontend.graph import REDUCTIONS, Node, reachable
from q4jit.plan.kernels import Slot, Store
from q4jit.weights.layouts import LANES

# A row is scaled by a power of two if the exponent of its largest element is outside this window.
# Inside, sums of 32 products with quants can neither overflow nor be lost to denormals.
_WINDOW_LOW: Final = -40
_WINDOW_HIGH: Final = 96
# The window's lower end for weights with scales in E8M0: products with a scale of 2^-128 should not
# be denormal either.
_WINDOW_LOW_E8M0: Final = 20
_LARGEST_SHIFT: Final = 126  # its inverse is the smallest normal power of two
_LEAST_EXPONENT: Final = -149  # of f32's denormals
# Elements below this are multiplied by 2^64 before their exponent is read: it is 0 in a denormal.
_TINY: Final = 2.0**-100
_TINY_SHIFT: Final = 64


class RowWriter:
    """Writes the function of one row: its sums, the values it stores, and the x of the products."""

    def __init__(self, lowering: Context) -> None:
        self._lowering = lowering
        self._kernel, self._work = lowering.kernel, lowering.kernel.work
        self._f = Function(
            f"internal void @{self._work.symbol}.row(ptr %args, i64 %row) #0",
            "One row before the products: x, and the row's values that the columns phase needs.",
        )
        loads = {s.node.id: s.buffer for s in self._work.loads}
        row = lowering.vector_at(self._f, "%row")
        self._values = CpuValues(lowering, self._f, row, loads)

    def write(self) -> None:
        """Add the function to the module."""
        f, work = self._f, self._work
        for node in self._sums():
            self._sum(node)
        for store in work.rows:
            if store.node.width == 1:
                self._values.store_scalar(store)
            else:
                self._copy(store)
        if work.x is not None:
            self._write_x(work.x)
        f.do("ret void")
        self._lowering.module.add(f"{work.symbol}.row", f)

    def _sums(self) -> list[Node]:
        roots = [s.node for s in self._work.rows]
        roots += [self._work.x] if self._work.x is not None else []
        return [n for n in reachable(tuple(roots), self._values.buffers) if n.op in REDUCTIONS]

    def _sum(self, node: Node) -> None:
        (operand,) = node.operands
        if operand.width == 1:
            return
        f, values, module = self._f, self._values, self._lowering.module
        values.start(SIXTEEN, "0", None, {})
        values.prepare([operand])
        f.comment(f"{node.op} of {operand.width} columns")
        if node.op == "sum":
            added = functools.partial(self._added, operand)
            vectors = _whole(operand.width) // LANES
            sums = write_long_sums(module, f, vectors, 1, ["sum"], added)
            values.scalars[node.id] = sum_lanes(module, f, sums["sum"])
            return
        least = SIXTEEN.constant(-math.inf)
        with f.loop(
            "column", 0, _whole(operand.width), step=LANES, carry={"max": (VECTOR, least)}
        ) as loop:
            value = self._padded(operand, loop.index, least)
            loop["max"] = apply(module, f, SIXTEEN, "maximum", [value, loop["max"]])
        values.scalars[node.id] = _largest_lane(module, f, loop["max"])

    def _added(self, node: Node, first: str | int, end: str | int) -> dict[str, str]:
        """Write the sums of vectors first … end - 1 of a value; return them as `sum`."""
        f = self._f
        with f.loop("vector", first, end, carry={"sum": (VECTOR, "zeroinitializer")}) as loop:
            value = self._padded(node, f.index("column", (loop.index, LANES)))
            loop["sum"] = f.let("sum", f"fadd {VECTOR} {loop['sum']}, {value}")
        return loop.values

    def _padded(self, node: Node, column: str, beyond: str = "zeroinitializer") -> str:
        """Return 16 columns of a value, with the constant `beyond` beyond its width."""
        f = self._f
        mask = tail_mask(f, column, node.width)
        self._values.start(SIXTEEN, column, mask, {})
        value = self._values.at(node)
        if mask is None:
            return value
        return f.let("padded", f"select {MASK} {mask}, {VECTOR} {value}, {VECTOR} {beyond}")

    def _copy(self, store: Store) -> None:
        f, values, width = self._f, self._values, store.node.width
        values.start(SIXTEEN, "0", None, {})
        values.prepare([store.node])
        out = values.buffer_row(store)
        with f.loop("column", 0, _whole(width), step=LANES) as loop:
            values.start(SIXTEEN, loop.index, tail_mask(f, loop.index, width), {})
            values.store(store, out)

    def _write_x(self, x: Node) -> None:
        f, values = self._f, self._values
        self._add_normalise()
        padded = padded_k(self._lowering.plan, self._kernel)
        base = self._lowering.argument(f, Slot("x"))
        offset = f.index("prologue_offset", ("%row", padded))
        x_row_at = f.at(base, "float", offset, "prologue_row_at")
        values.start(SIXTEEN, "0", None, {})
        values.prepare([x])
        f.comment("x of the products, and its largest finite magnitude")
        zero = {"largest": (VECTOR, "zeroinitializer")}
        with f.loop("column", 0, _whole(x.width), step=LANES, carry=zero) as loop:
            value = self._padded(x, loop.index)
            at = f.at(x_row_at, "float", loop.index, "prologue_at")
            f.do(f"store {VECTOR} {value}, ptr {at}, align 4")
            magnitude = magnitude_of(self._lowering.module, f, value)
            finite = f.let("finite", f"fcmp olt {VECTOR} {magnitude}, {INFINITY}", "Inf")
            larger = f.let("larger", f"fcmp ogt {VECTOR} {magnitude}, {loop['largest']}")
            both = f.let("both", f"and {MASK} {finite}, {larger}")
            loop["largest"] = f.let(
                "largest", f"select {MASK} {both}, {VECTOR} {magnitude}, {VECTOR} {loop['largest']}"
            )
        for column in range(_whole(x.width), padded, LANES):
            at = f.at(x_row_at, "float", column, "padding_at")
            f.do(f"store {VECTOR} zeroinitializer, ptr {at}, align 4")
        factors = self._lowering.argument(f, Slot("row_factors"))
        factor_at = f.at(factors, "float", "%row", "row_factor_at")
        f.do(
            f"call void @normalise(ptr {x_row_at}, i64 {padded}, {VECTOR} {loop['largest']}, "
            f"ptr {factor_at})"
        )
        self._write_digits(x_row_at, padded)

    def _add_normalise(self) -> None:
        """Add the function that scales a row, with the window of the kernel's weights."""
        products = [p for section in self._work.sections for p in section.products]
        specs = [self._lowering.plan.weight(p.arg) for p in products]
        exponents = [spec for spec in specs if spec.block_format.scale_type == "e8m0"]
        # huge scales need an x that is not larger than it was
        is_high = bool(exponents) and all(spec.finite for spec in exponents)
        _add_normalise(self._lowering.module, _WINDOW_LOW_E8M0 if is_high else _WINDOW_LOW)

    def _write_digits(self, x_row_at: str, padded: int) -> None:
        """Write the digits of x, if the kernel has integer products."""
        kernel, plan, f = self._kernel, self._lowering.plan, self._f
        if kernel.dot is None:
            return
        form = form_of(plan, kernel)
        function = add_digits(self._lowering.module, form)
        base = self._lowering.argument(f, Slot("digits"))
        offset = f.index("digits_offset", ("%row", digits_bytes(padded, kernel.digits)))
        at = f.at(base, "i8", offset, "digits_at")
        f.do(f"call void {function}(ptr {x_row_at}, ptr {at}, i64 {padded // UNIT})")


def _largest_lane(module: Module, f: Function, value: str) -> str:
    """Return the largest of 16 lanes, or NaN if one is NaN."""
    for step in (8, 4, 2, 1):
        order = ", ".join(f"i32 {(lane + step) % LANES}" for lane in range(LANES))
        rotated = f.let(
            "rotated",
            f"shufflevector {VECTOR} {value}, {VECTOR} poison, <16 x i32> <{order}>",
        )
        value = apply(module, f, SIXTEEN, "maximum", [rotated, value])
    return f.let("max", f"extractelement {VECTOR} {value}, i64 0")


def _whole(width: int) -> int:
    """Return the columns of whole vectors that hold `width` columns."""
    return -(-width // LANES) * LANES


def _add_normalise(module: Module, low: int) -> None:
    """Add a function that scales a row into the window by a power of two, which is exact."""
    f = Function(
        f"internal void @normalise(ptr %x, i64 %k, {VECTOR} %largest, ptr %row_factor_at) #0",
        f"Scale a row by a power of two that brings the exponent of its largest element into "
        f"{low} … {_WINDOW_HIGH}.\nThere, sums of products with quants neither overflow "
        "nor become denormal. Most rows are there already.\n"
        "Sums of the row are later multiplied by the row factor, the inverse of that power.",
    )
    module.declare(f"declare float @llvm.vector.reduce.fmax.v16f32({VECTOR})")
    module.declare("declare i32 @llvm.smax.i32(i32, i32)")
    module.declare("declare i32 @llvm.smin.i32(i32, i32)")
    largest = f.let("max", f"call float @llvm.vector.reduce.fmax.v16f32({VECTOR} %largest)")
    f.comment("a denormal is made normal first, so that its exponent can be read")
    tiny = f.let("tiny", f"fcmp olt float {largest}, {float_text(_TINY)}", "2^-100")
    lifted = f.let("lifted", f"fmul float {largest}, {float_text(2.0**_TINY_SHIFT)}", "2^64")
    normal = f.let("normal", f"select i1 {tiny}, float {lifted}, float {largest}")
    biases = f"i32 {EXPONENT_BIAS + _TINY_SHIFT}, i32 {EXPONENT_BIAS}"
    bias = f.let("bias", f"select i1 {tiny}, {biases}")
    bits = f.let("bits", f"bitcast float {normal} to i32")
    biased = f.let("biased", f"lshr i32 {bits}, {EXPONENT_SHIFT}", "past the mantissa")
    exponent = f.let("exponent", f"sub i32 {biased}, {bias}")
    at_least = f.let("at_least", f"call i32 @llvm.smax.i32(i32 {exponent}, i32 {low})")
    wanted = f.let("wanted", f"call i32 @llvm.smin.i32(i32 {at_least}, i32 {_WINDOW_HIGH})")
    shift = f.let("shift", f"sub i32 {wanted}, {exponent}")
    if low - _LEAST_EXPONENT > _LARGEST_SHIFT:
        shift = f.let("shift", f"call i32 @llvm.smin.i32(i32 {shift}, i32 {_LARGEST_SHIFT})")
    zero = f.let("zero", f"fcmp oeq float {largest}, 0.0")
    inside = f.let("inside", f"icmp eq i32 {shift}, 0")
    nothing = f.let("nothing", f"or i1 {zero}, {inside}")
    f.do(f"br i1 {nothing}, label %keep, label %rescale")
    f.label("keep")
    f.do("store float 1.0, ptr %row_factor_at, align 4")
    f.do("ret void")
    f.label("rescale")
    up = _power_of_two(f, f.let("up_biased", f"add i32 {shift}, {EXPONENT_BIAS}"), "up")
    down = _power_of_two(f, f.let("down_biased", f"sub i32 {EXPONENT_BIAS}, {shift}"), "down")
    f.do(f"store float {down}, ptr %row_factor_at, align 4")
    factor = broadcast(f, "float", up)
    with f.loop("column", 0, "%k", step=LANES) as loop:
        at = f.at("%x", "float", loop.index, "x_at")
        value = f.let("x", f"load {VECTOR}, ptr {at}, align 4")
        scaled = f.let("scaled", f"fmul {VECTOR} {value}, {factor}")
        f.do(f"store {VECTOR} {scaled}, ptr {at}, align 4")
    f.do("ret void")
    module.add("normalise", f)


def _power_of_two(f: Function, biased: str, hint: str) -> str:
    """Return the float whose biased exponent is given."""
    bits = f.let(f"{hint}_bits", f"shl i32 {biased}, {EXPONENT_SHIFT}")
    return f.let(hint, f"bitcast i32 {bits} to float")
