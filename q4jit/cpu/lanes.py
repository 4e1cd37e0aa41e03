"""Values in lanes, in LLVM IR: constants, spreading and summing, loads and stores under a mask."""

from dataclasses import dataclass
from typing import Final

from q4jit.cpu.llvm_text import INTS, MASK, VECTOR, Function, Module, float_text, splat
from q4jit.weights.layouts import LANES


@dataclass(frozen=True)
class Lanes:
    """The type that values are computed in: one float, or 16 of them."""

    count: int

    @property
    def f32(self) -> str:
        """The type of numbers."""
        return VECTOR if self.count > 1 else "float"

    @property
    def i32(self) -> str:
        """The type of their bits."""
        return INTS if self.count > 1 else "i32"

    @property
    def i1(self) -> str:
        """The type of truth values."""
        return MASK if self.count > 1 else "i1"

    @property
    def suffix(self) -> str:
        """How intrinsics name the type."""
        return "v16f32" if self.count > 1 else "f32"

    def constant(self, value: float) -> str:
        """An f32 constant."""
        text = float_text(value)
        return splat("float", text) if self.count > 1 else text


ONE: Final = Lanes(1)
SIXTEEN: Final = Lanes(LANES)


def load_vector(module: Module, f: Function, pointer: str, mask: str | None) -> str:
    """16 floats, or zeros in the lanes that `mask` leaves out."""
    if mask is None:
        return f.let("v", f"load {VECTOR}, ptr {pointer}, align 4")
    module.declare(f"declare {VECTOR} @llvm.masked.load.v16f32.p0(ptr, i32, {MASK}, {VECTOR})")
    return f.let(
        "v",
        f"call {VECTOR} @llvm.masked.load.v16f32.p0(ptr {pointer}, i32 4, {MASK} {mask}, "
        f"{VECTOR} zeroinitializer)",
    )


def store_vector(module: Module, f: Function, value: str, pointer: str, mask: str | None) -> None:
    """16 floats, only the lanes of `mask`."""
    if mask is None:
        f.do(f"store {VECTOR} {value}, ptr {pointer}, align 4")
        return
    module.declare(f"declare void @llvm.masked.store.v16f32.p0({VECTOR}, ptr, i32, {MASK})")
    f.do(
        f"call void @llvm.masked.store.v16f32.p0({VECTOR} {value}, ptr {pointer}, i32 4, "
        f"{MASK} {mask})"
    )


def splat_value(f: Function, kind: str, value: str) -> str:
    """A scalar value (`float`, `i32`) in every lane."""
    one = f.let("lane", f"insertelement <16 x {kind}> poison, {kind} {value}, i64 0")
    return f.let(
        "splat",
        f"shufflevector <16 x {kind}> {one}, <16 x {kind}> poison, <16 x i32> zeroinitializer",
    )


def tail_mask(f: Function, first: str, width: int) -> str | None:
    """The lanes first, first + 1, … that are below `width`; None where 16 divides it."""
    if width % LANES == 0:
        return None
    left = f.let("left", f"sub i64 {width}, {first}")
    more = f.let("more", f"icmp sgt i64 {left}, {LANES}")
    few = f.let("few", f"select i1 {more}, i64 {LANES}, i64 {left}")
    left32 = f.let("left32", f"trunc i64 {few} to i32")
    lane = f"<i32 {', i32 '.join(map(str, range(LANES)))}>"
    return f.let("mask", f"icmp slt {INTS} {lane}, {splat_value(f, 'i32', left32)}")


def half_loader(module: Module, lanes: Lanes, align_bytes: int = 2) -> str:
    """The function that loads f16 values as f32 from an address of that alignment.

    Without F16C the conversion is integer arithmetic: LLVM would call a library function that
    nothing resolves.
    """
    name = f"load_half_{lanes.suffix}{'' if align_bytes == 2 else f'_align{align_bytes}'}"
    if not module.knows(name):
        f = Function(f"internal {lanes.f32} @{name}(ptr %p) #1", "f16 as f32, exactly.")
        if module.target.has("f16c") or module.target.family == "aarch64":
            kind = lanes.f32.replace("float", "half")
            half = f.let("half", f"load {kind}, ptr %p, align {align_bytes}")
            f.do(f"ret {lanes.f32} {f.let('v', f'fpext {kind} {half} to {lanes.f32}')}")
        else:
            _half_by_integers(f, lanes, align_bytes)
        module.add(name, f)
    return f"@{name}"


def _half_by_integers(f: Function, lanes: Lanes, align_bytes: int) -> None:
    ints, floats = lanes.i32, lanes.f32

    def number(value: int) -> str:
        return splat("i32", str(value)) if lanes.count > 1 else str(value)

    narrow = ints.replace("i32", "i16")
    half = f.let("half", f"load {narrow}, ptr %p, align {align_bytes}")
    bits = f.let("bits", f"zext {narrow} {half} to {ints}")
    magnitude = f.let("magnitude", f"and {ints} {bits}, {number(0x7FFF)}")
    shifted = f.let("shifted", f"shl {ints} {magnitude}, {number(13)}")
    f.comment("2^112 moves the exponent from f16's bias to f32's, and is exact for denormals too")
    small = f.let("small", f"bitcast {ints} {shifted} to {floats}")
    value = f.let("value", f"fmul {floats} {small}, {lanes.constant(2.0**112)}")
    finite = f.let("finite", f"bitcast {floats} {value} to {ints}")
    special = f.let("special", f"icmp uge {ints} {magnitude}, {number(0x7C00)}")
    infinite = f.let("infinite", f"or {ints} {shifted}, {number(0x7F800000)}")
    right = f.let("right", f"select {lanes.i1} {special}, {ints} {infinite}, {ints} {finite}")
    sign = f.let("sign", f"and {ints} {bits}, {number(0x8000)}")
    high = f.let("high", f"shl {ints} {sign}, {number(16)}")
    both = f.let("both", f"or {ints} {right}, {high}")
    f.do(f"ret {floats} {f.let('v', f'bitcast {ints} {both} to {floats}')}")


def sum_lanes(module: Module, f: Function, value: str) -> str:
    """The sum of 16 lanes, as a tree."""
    module.declare(f"declare float @llvm.vector.reduce.fadd.v16f32(float, {VECTOR})")
    return f.let(
        "sum", f"call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, {VECTOR} {value})"
    )
