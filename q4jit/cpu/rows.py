"""The rows phase of a CPU's kernels in LLVM IR: x as products want it, and what else is known."""

import math
from typing import Final

from q4jit.cpu.digits import add_digits, digits_for
from q4jit.cpu.lanes import SIXTEEN, splat_value, sum_lanes, tail_mask
from q4jit.cpu.llvm_text import (
    MASK,
    VECTOR,
    Function,
    Module,
    float_text,
    splat,
)
from q4jit.cpu.operations import apply
from q4jit.cpu.schedule import UNIT, digits_bytes, is_integer, padded_k
from q4jit.cpu.values import Context, CpuValues
from q4jit.frontend.graph import REDUCTIONS, Node, reachable
from q4jit.plan.kernels import Slot, Store
from q4jit.weights.layouts import LANES

# x is scaled by a power of two where its largest element lies outside of this window. Inside, 32
# products with quants can neither overflow nor be lost to denormals.
_WINDOW_LOW: Final = -40
_WINDOW_HIGH: Final = 96


class RowWriter:
    """Writes the function of one row: sums, stored values, and the x of the products."""

    def __init__(self, lowering: Context) -> None:
        self._lowering = lowering
        self._kernel, self._work = lowering.kernel, lowering.kernel.work
        self._f = Function(
            f"internal void @{self._work.symbol}.row(ptr %args, i64 %row) #0",
            "One row before the products: x, and what the columns phase needs of it.",
        )
        loads = {s.node.id: s.buffer for s in self._work.loads}
        self._values = CpuValues(lowering, self._f, "%row", loads)

    def write(self) -> None:
        """Add the function to the module."""
        f, work = self._f, self._work
        for node in self._sums():
            self._sum(node)
        for store in work.rows:
            if store.node.width == 1:
                value = self._values.scalar(store.node)
                f.do(f"store float {value}, ptr {self._values.buffer_row(store)}, align 4")
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
        f.comment(f"{node.op} over {operand.width}")
        neutral = "zeroinitializer" if node.op == "sum" else splat("float", float_text(-math.inf))
        start = {node.op: (VECTOR, neutral)}
        with f.loop("c", 0, _whole(operand.width), step=LANES, carry=start) as loop:
            value = self._padded(operand, loop.index, neutral)
            if node.op == "sum":
                loop["sum"] = f.let("sum", f"fadd {VECTOR} {loop['sum']}, {value}")
            else:
                loop["max"] = apply(module, f, SIXTEEN, "maximum", [value, loop["max"]])
        lanes = sum_lanes if node.op == "sum" else _largest_lane
        values.scalars[node.id] = lanes(module, f, loop[node.op])

    def _padded(self, node: Node, column: str, beyond: str = "zeroinitializer") -> str:
        """Write 16 columns of a value, with the constant `beyond` beyond its width."""
        f = self._f
        mask = tail_mask(f, column, node.width)
        self._values.start(SIXTEEN, column, mask, {})
        value = self._values.at(node)
        if mask is None:
            return value
        return f.let("value", f"select {MASK} {mask}, {VECTOR} {value}, {VECTOR} {beyond}")

    def _copy(self, store: Store) -> None:
        f, values, width = self._f, self._values, store.node.width
        values.start(SIXTEEN, "0", None, {})
        values.prepare([store.node])
        out = values.buffer_row(store)
        with f.loop("c", 0, _whole(width), step=LANES) as loop:
            values.start(SIXTEEN, loop.index, tail_mask(f, loop.index, width), {})
            values.store(store, out)

    def _write_x(self, x: Node) -> None:
        f, values = self._f, self._values
        _add_normalise(self._lowering.module)
        padded = padded_k(self._lowering.plan, self._kernel)
        base = self._lowering.argument(f, Slot("x"))
        out = f.at(base, "float", f.index("x_at", ("%row", padded)), "x_row")
        values.start(SIXTEEN, "0", None, {})
        values.prepare([x])
        f.comment("x, and its largest finite magnitude")
        zero = {"largest": (VECTOR, "zeroinitializer")}
        module = self._lowering.module
        module.declare(f"declare {VECTOR} @llvm.fabs.v16f32({VECTOR})")
        with f.loop("c", 0, _whole(x.width), step=LANES, carry=zero) as loop:
            value = self._padded(x, loop.index)
            f.do(f"store {VECTOR} {value}, ptr {f.at(out, 'float', loop.index)}, align 4")
            size = f.let("size", f"call {VECTOR} @llvm.fabs.v16f32({VECTOR} {value})")
            infinity = splat("float", float_text(float("inf")))
            finite = f.let("finite", f"fcmp olt {VECTOR} {size}, {infinity}")
            larger = f.let("larger", f"fcmp ogt {VECTOR} {size}, {loop['largest']}")
            both = f.let("both", f"and {MASK} {finite}, {larger}")
            loop["largest"] = f.let(
                "largest", f"select {MASK} {both}, {VECTOR} {size}, {VECTOR} {loop['largest']}"
            )
        for pad in range(_whole(x.width), padded, LANES):
            f.do(f"store {VECTOR} zeroinitializer, ptr {f.at(out, 'float', pad)}, align 4")
        exponents = self._lowering.argument(f, Slot("exponent"))
        scale_at = f.at(exponents, "float", "%row")
        f.do(
            f"call void @normalise(ptr {out}, i64 {padded}, {VECTOR} {loop['largest']}, "
            f"ptr {scale_at})"
        )
        self._write_digits(out, padded)

    def _write_digits(self, x: str, padded: int) -> None:
        """The x of integer products."""
        kernel, plan, f = self._kernel, self._lowering.plan, self._f
        if kernel.dot is None:
            return
        formats = [
            plan.weight(p.arg).block_format
            for s in self._work.sections
            for p in s.products
            if is_integer(plan, kernel, s, p)
        ]
        form = digits_for(formats, kernel.limbs)
        function = add_digits(self._lowering.module, form)
        base = self._lowering.argument(f, Slot("digits"))
        offset = f.index("digits_off", ("%row", digits_bytes(padded, kernel.limbs)))
        at = f.at(base, "i8", offset, "digits_at")
        f.do(f"call void {function}(ptr {x}, ptr {at}, i64 {padded // UNIT})")


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


def _add_normalise(module: Module) -> None:
    """Bring a row into the window by a power of two, which is exact, and keep its inverse."""
    f = Function(
        f"internal void @normalise(ptr %x, i64 %k, {VECTOR} %largest, ptr %scale) #0",
        f"Bring the exponent of x's largest element into {_WINDOW_LOW} … {_WINDOW_HIGH}, where\n"
        "most lie already: sums of products with quants then neither overflow nor go denormal.",
    )
    module.declare(f"declare float @llvm.vector.reduce.fmax.v16f32({VECTOR})")
    module.declare("declare i32 @llvm.smax.i32(i32, i32)")
    module.declare("declare i32 @llvm.smin.i32(i32, i32)")
    largest = f.let("max", f"call float @llvm.vector.reduce.fmax.v16f32({VECTOR} %largest)")
    # a denormal is made normal first, so that its exponent can be read
    tiny = f.let("tiny", f"fcmp olt float {largest}, {float_text(2.0**-100)}")
    lifted = f.let("lifted", f"fmul float {largest}, {float_text(2.0**64)}")
    seen = f.let("seen", f"select i1 {tiny}, float {lifted}, float {largest}")
    lift = f.let("lift", f"select i1 {tiny}, i32 {127 + 64}, i32 127")
    bits = f.let("bits", f"bitcast float {seen} to i32")
    field_ = f.let("field", f"lshr i32 {bits}, 23")
    exponent = f.let("exponent", f"sub i32 {field_}, {lift}")
    low = f.let("low", f"call i32 @llvm.smax.i32(i32 {exponent}, i32 {_WINDOW_LOW})")
    wanted = f.let("wanted", f"call i32 @llvm.smin.i32(i32 {low}, i32 {_WINDOW_HIGH})")
    shift = f.let("shift", f"sub i32 {wanted}, {exponent}")
    zero = f.let("zero", f"fcmp oeq float {largest}, 0.0")
    inside = f.let("inside", f"icmp eq i32 {shift}, 0")
    nothing = f.let("nothing", f"or i1 {zero}, {inside}")
    f.do(f"br i1 {nothing}, label %keep, label %rescale")
    f.label("keep")
    f.do("store float 1.0, ptr %scale, align 4")
    f.do("ret void")
    f.label("rescale")
    up = _power_of_two(f, f.let("up", f"add i32 {shift}, 127"))
    down = _power_of_two(f, f.let("down", f"sub i32 127, {shift}"))
    f.do(f"store float {down}, ptr %scale, align 4")
    factor = splat_value(f, "float", up)
    with f.loop("c", 0, "%k", step=LANES) as loop:
        at = f.at("%x", "float", loop.index)
        value = f.let("v", f"load {VECTOR}, ptr {at}, align 4")
        scaled = f.let("scaled", f"fmul {VECTOR} {value}, {factor}")
        f.do(f"store {VECTOR} {scaled}, ptr {at}, align 4")
    f.do("ret void")
    module.add("normalise", f)


def _power_of_two(f: Function, biased: str) -> str:
    bits = f.let("bits", f"shl i32 {biased}, 23")
    return f.let("power", f"bitcast i32 {bits} to float")
