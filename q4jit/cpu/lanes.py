"""Vectors of 16 lanes in LLVM IR: constants, broadcasts, sums, masked loads and stores."""

from dataclasses import dataclass
from typing import Final

from q4jit.cpu.llvm_text import (
    EXPONENT_BITS,
    INTS,
    MASK,
    VECTOR,
    Function,
    Module,
    float_text,
    int_text,
    splat,
    splat_int,
)
from q4jit.weights.layouts import LANES

# The bits of an f16, from the highest: the sign, 5 bits of exponent, 10 bits of mantissa.
_F16_MAGNITUDE: Final = 0x7FFF
_F16_SIGN: Final = 0x8000
_F16_INFINITY: Final = 0x7C00
_MANTISSA_SHIFT: Final = 23 - 10  # from f16's mantissa to f32's
_SIGN_SHIFT: Final = 31 - 15
_BIAS_FACTOR: Final = 2.0 ** (127 - 15)  # f32's bias of the exponent less f16's


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
        """The type's name in the names of intrinsics."""
        return "v16f32" if self.count > 1 else "f32"

    def constant(self, value: float) -> str:
        """Return an f32 constant."""
        text = float_text(value)
        return splat("float", text) if self.count > 1 else text

    def integer(self, value: int) -> str:
        """Return an i32 constant."""
        return splat_int(value) if self.count > 1 else int_text(value)


ONE: Final = Lanes(1)
SIXTEEN: Final = Lanes(LANES)
INFINITY: Final = SIXTEEN.constant(float("inf"))


def load_vector(module: Module, f: Function, pointer: str, mask: str | None, hint: str) -> str:
    """Load 16 floats, and zeros instead of the lanes that `mask` leaves out."""
    if mask is None:
        return f.let(hint, f"load {VECTOR}, ptr {pointer}, align 4")
    module.declare(f"declare {VECTOR} @llvm.masked.load.v16f32.p0(ptr, i32, {MASK}, {VECTOR})")
    return f.let(
        hint,
        f"call {VECTOR} @llvm.masked.load.v16f32.p0(ptr {pointer}, i32 4, {MASK} {mask}, "
        f"{VECTOR} zeroinitializer)",
    )


def store_vector(module: Module, f: Function, value: str, pointer: str, mask: str | None) -> None:
    """Store 16 floats, or only the lanes of `mask`."""
    if mask is None:
        f.do(f"store {VECTOR} {value}, ptr {pointer}, align 4")
        return
    module.declare(f"declare void @llvm.masked.store.v16f32.p0({VECTOR}, ptr, i32, {MASK})")
    f.do(
        f"call void @llvm.masked.store.v16f32.p0({VECTOR} {value}, ptr {pointer}, i32 4, "
        f"{MASK} {mask})"
    )


def broadcast(f: Function, kind: str, value: str) -> str:
    """Put a scalar value (`float`, `i32`, `i1`) into every lane."""
    name = value.removeprefix("%").split(".")[0] if value.startswith("%") else "constant"
    one = f.let(f"{name}_lane", f"insertelement <16 x {kind}> poison, {kind} {value}, i64 0")
    return f.let(
        f"{name}_lanes",
        f"shufflevector <16 x {kind}> {one}, <16 x {kind}> poison, <16 x i32> zeroinitializer",
    )


def tail_mask(f: Function, first: str, width: int) -> str | None:
    """Return the lanes of columns first, first + 1, … below `width`; None if 16 divides it."""
    if width % LANES == 0:
        return None
    left = f.let("left", f"sub i64 {width}, {first}")
    more = f.let("more", f"icmp sgt i64 {left}, {LANES}")
    few = f.let("few", f"select i1 {more}, i64 {LANES}, i64 {left}")
    count = f.let("count", f"trunc i64 {few} to i32")
    numbers = f"<i32 {', i32 '.join(map(str, range(LANES)))}>"
    return f.let("mask", f"icmp slt {INTS} {numbers}, {broadcast(f, 'i32', count)}")


def f16_loader(module: Module, lanes: Lanes, align_bytes: int = 2) -> str:
    """Return the function that loads f16 values as f32 from an address of that alignment.

    CPUs without F16C convert by integer arithmetic: LLVM would call a library function that nothing
    resolves.
    """
    name = f"load_f16_{lanes.suffix}{'' if align_bytes == 2 else f'_align{align_bytes}'}"
    if not module.knows(name):
        f = Function(f"internal {lanes.f32} @{name}(ptr %at) #1", "f16 as f32, exactly.")
        if module.target.has("f16c") or module.target.family == "aarch64":
            kind = lanes.f32.replace("float", "half")
            f16 = f.let("f16", f"load {kind}, ptr %at, align {align_bytes}")
            f.do(f"ret {lanes.f32} {f.let('value', f'fpext {kind} {f16} to {lanes.f32}')}")
        else:
            _f16_by_integers(f, lanes, align_bytes)
        module.add(name, f)
    return f"@{name}"


def _f16_by_integers(f: Function, lanes: Lanes, align_bytes: int) -> None:
    ints, floats, number = lanes.i32, lanes.f32, lanes.integer
    narrow = ints.replace("i32", "i16")
    f16 = f.let("f16", f"load {narrow}, ptr %at, align {align_bytes}")
    bits = f.let("bits", f"zext {narrow} {f16} to {ints}")
    magnitude = f.let(
        "magnitude", f"and {ints} {bits}, {number(_F16_MAGNITUDE)}", "all but the sign"
    )
    shifted = f.let("shifted", f"shl {ints} {magnitude}, {number(_MANTISSA_SHIFT)}")
    f.comment("2^112 moves the exponent from f16's bias to f32's, and is exact for denormals too")
    small = f.let("small", f"bitcast {ints} {shifted} to {floats}")
    value = f.let("value", f"fmul {floats} {small}, {lanes.constant(_BIAS_FACTOR)}")
    finite = f.let("finite", f"bitcast {floats} {value} to {ints}")
    special = f.let(
        "special", f"icmp uge {ints} {magnitude}, {number(_F16_INFINITY)}", "Inf or NaN"
    )
    infinite = f.let(
        "infinite", f"or {ints} {shifted}, {number(EXPONENT_BITS)}", "f32's exponent of those"
    )
    right = f.let("right", f"select {lanes.i1} {special}, {ints} {infinite}, {ints} {finite}")
    sign = f.let("sign", f"and {ints} {bits}, {number(_F16_SIGN)}")
    high = f.let("high", f"shl {ints} {sign}, {number(_SIGN_SHIFT)}")
    both = f.let("both", f"or {ints} {right}, {high}")
    f.do(f"ret {floats} {f.let('result', f'bitcast {ints} {both} to {floats}')}")


def sum_lanes(module: Module, f: Function, value: str, hint: str = "sum") -> str:
    """Add up 16 lanes, as a tree."""
    module.declare(f"declare float @llvm.vector.reduce.fadd.v16f32(float, {VECTOR})")
    return f.let(
        hint, f"call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, {VECTOR} {value})"
    )


def largest_lane(module: Module, f: Function, value: str, hint: str) -> str:
    """Return the largest of 16 signed integers."""
    module.declare(f"declare i32 @llvm.vector.reduce.smax.v16i32({INTS})")
    return f.let(hint, f"call i32 @llvm.vector.reduce.smax.v16i32({INTS} {value})")


def magnitude_of(module: Module, f: Function, value: str) -> str:
    """Return the magnitudes of 16 floats."""
    module.declare(f"declare {VECTOR} @llvm.fabs.v16f32({VECTOR})")
    return f.let("magnitude", f"call {VECTOR} @llvm.fabs.v16f32({VECTOR} {value})")
