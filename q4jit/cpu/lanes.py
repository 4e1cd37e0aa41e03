"""Vectors of 16 lanes in LLVM IR: constants, broadcasts, sums, masked loads and stores."""

from dataclasses import dataclass
from typing import Final

from q4jit.cpu.llvm_text import (
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

# elements of vectors in memory: their alignment in bytes, and the name of 16 in intrinsics
_ALIGNMENTS: Final = {"float": 4, "i16": 2}
_SUFFIXES: Final = {"float": "v16f32", "i16": "v16i16"}


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


def load_vector(
    module: Module, f: Function, pointer: str, mask: str | None, hint: str, element: str = "float"
) -> str:
    """Load 16 elements, floats or `i16`, and zeros instead of the lanes that `mask` leaves out."""
    kind, align = f"<{LANES} x {element}>", _ALIGNMENTS[element]
    if mask is None:
        return f.let(hint, f"load {kind}, ptr {pointer}, align {align}")
    intrinsic = f"@llvm.masked.load.{_SUFFIXES[element]}.p0"
    module.declare(f"declare {kind} {intrinsic}(ptr, i32, {MASK}, {kind})")
    return f.let(
        hint,
        f"call {kind} {intrinsic}(ptr {pointer}, i32 {align}, {MASK} {mask}, "
        f"{kind} zeroinitializer)",
    )


def store_vector(
    module: Module,
    f: Function,
    value: str,
    pointer: str,
    mask: str | None,
    element: str = "float",
) -> None:
    """Store 16 elements, floats or `i16`, or only the lanes of `mask`."""
    kind, align = f"<{LANES} x {element}>", _ALIGNMENTS[element]
    if mask is None:
        f.do(f"store {kind} {value}, ptr {pointer}, align {align}")
        return
    intrinsic = f"@llvm.masked.store.{_SUFFIXES[element]}.p0"
    module.declare(f"declare void {intrinsic}({kind}, ptr, i32, {MASK})")
    f.do(f"call void {intrinsic}({kind} {value}, ptr {pointer}, i32 {align}, {MASK} {mask})")


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
