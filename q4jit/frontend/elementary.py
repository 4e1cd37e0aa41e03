"""exp, log and tanh, stated once and rendered into every target's text.

Each is one range reduction and one polynomial, in operations that every target has, so no kernel
calls libm. All targets run the same steps. Targets without a fused multiply-add round twice in
`fma`, so their last bits may differ. The polynomials are this project's own minimax fits.
`tests/frontend/test_elementary.py` measures the errors over the f32 inputs of the ranges; the bound
of 4 ulp holds for both kinds of targets.
"""

from typing import Final, Protocol, TypeVar

import numpy as np

V = TypeVar("V")


class Ops(Protocol[V]):
    """The operations of a target. Values are lanes of 32 bits: f32 or two's complement."""

    def f32(self, value: float) -> V:
        """Return a float constant."""
        ...

    def i32(self, value: int) -> V:
        """Return an integer constant."""
        ...

    def op(self, name: str, *operands: V) -> V:
        """Return the result of one operation on lanes.

        Floats: fadd, fsub, fmul, fdiv, fma, fabs. Integers: iadd, isub, shl, ashr, and, or.
        Truth values: flt, feq; `select` chooses by one. The same bits: as_int, as_float.
        """
        ...


_LOG2E: Final = 1.4426950408889634
# ln 2 as a sum; the first number has 10 significant bits, so n·LN2_HIGH is exact without fma too
_LN2_HIGH: Final = 0.693359375
_LN2_LOW: Final = -2.1219444005469057e-4
# 1.5·2²³, where f32 has a spacing of 1: x + _ROUND holds the nearest whole number in its low bits
_ROUND: Final = 12582912.0
_ROUND_BITS: Final = 0x4B400000
_EXPONENT_BIAS: Final = 127
_MANTISSA_BITS: Final = 23
_SIGN_BIT: Final = -0x80000000
_SQRT_HALF_BITS: Final = 0x3F3504F3  # the bits of √½

# (eʳ − 1 − r)/r² on |r| ≤ ½ ln 2: relative error of eʳ 3.1e-9
_EXP: Final = (0.4999999288, 0.1666652133, 0.0416683904, 0.0083687157, 0.0013814616)
# (2 atanh(s) − 2s)/s³ in s², for mantissas in [√½, √2): relative error 8.1e-10
_LOG: Final = (0.6666677671, 0.3997749516, 0.2987307692)
# (tanh x − x)/x³ in x² on |x| ≤ 0.625: relative error 1.5e-10
_TANH: Final = (
    -0.3333333109,
    0.1333321023,
    -0.0539472005,
    0.0217029693,
    -0.0081826702,
    0.0021475370,
)


def _horner(o: Ops[V], x: V, coefficients: tuple[float, ...]) -> V:
    total = o.f32(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = o.op("fma", total, x, o.f32(c))
    return total


def _power_of_two(o: Ops[V], n: V) -> V:
    return o.op(
        "as_float", o.op("shl", o.op("iadd", n, o.i32(_EXPONENT_BIAS)), o.i32(_MANTISSA_BITS))
    )


def exp(o: Ops[V], x: V) -> V:
    """Return eˣ within 2 ulp, denormal results included: 0 below −104, Inf above 88.72."""
    low, high = o.f32(-104.0), o.f32(89.0)
    x = o.op("select", o.op("flt", x, low), low, x)  # ordered comparisons let NaN pass
    x = o.op("select", o.op("flt", high, x), high, x)
    shifted = o.op("fma", x, o.f32(_LOG2E), o.f32(_ROUND))
    n = o.op("isub", o.op("as_int", shifted), o.i32(_ROUND_BITS))
    n_float = o.op("fsub", shifted, o.f32(_ROUND))
    r = o.op("fma", n_float, o.f32(-_LN2_HIGH), x)
    r = o.op("fma", n_float, o.f32(-_LN2_LOW), r)
    tail = o.op("fma", o.op("fmul", r, r), _horner(o, r, _EXP), r)
    p = o.op("fadd", tail, o.f32(1.0))
    # 2ⁿ as a product of two: n reaches −150 and 128, which one exponent field cannot hold
    half = o.op("ashr", n, o.i32(1))
    p = o.op("fmul", p, _power_of_two(o, half))
    return o.op("fmul", p, _power_of_two(o, o.op("isub", n, half)))


def log(o: Ops[V], x: V) -> V:
    """Return ln x within 3 ulp, denormals included: −Inf at 0, NaN below 0, Inf at Inf."""
    tiny = o.op("flt", x, o.f32(float(np.finfo(np.float32).tiny)))
    scaled = o.op("select", tiny, o.op("fmul", x, o.f32(2.0**24)), x)
    bias = o.op("select", tiny, o.f32(-24.0), o.f32(0.0))
    bits = o.op("as_int", scaled)
    # subtracting √½'s bits makes the exponent step where the mantissa passes √½
    above = o.op("isub", bits, o.i32(_SQRT_HALF_BITS))
    exponent = o.op("ashr", above, o.i32(_MANTISSA_BITS))
    shifted = o.op("shl", exponent, o.i32(_MANTISSA_BITS))
    mantissa = o.op("as_float", o.op("isub", bits, shifted))
    magic = o.op("iadd", exponent, o.i32(_ROUND_BITS))
    e = o.op("fadd", o.op("fsub", o.op("as_float", magic), o.f32(_ROUND)), bias)
    f = o.op("fsub", mantissa, o.f32(1.0))
    s = o.op("fdiv", f, o.op("fadd", f, o.f32(2.0)))
    z = o.op("fmul", s, s)
    # ln(1+f) = f − s·(f − z·P(z)): the correction is small beside f, and so is its rounding error
    low = o.op("fsub", f, o.op("fmul", z, _horner(o, z, _LOG)))
    low = o.op("fma", e, o.f32(_LN2_LOW), o.op("fsub", o.f32(0.0), o.op("fmul", s, low)))
    result = o.op("fma", e, o.f32(_LN2_HIGH), o.op("fadd", f, low))
    inf, zero = o.f32(float("inf")), o.f32(0.0)
    finite = o.op("flt", x, inf)
    result = o.op("select", finite, result, x)  # Inf and NaN pass unchanged
    positive = o.op("flt", zero, x)
    at_zero = o.op("select", o.op("flt", x, zero), o.f32(float("nan")), o.f32(float("-inf")))
    is_nan_or_positive = o.op("select", positive, result, at_zero)
    return o.op("select", o.op("feq", x, x), is_nan_or_positive, x)


def tanh(o: Ops[V], x: V) -> V:
    """Return tanh x within 3 ulp: a polynomial up to 0.625, 1 − 2/(e²ˣ + 1) beyond."""
    magnitude = o.op("fabs", x)
    z = o.op("fmul", x, x)
    small = o.op("fma", o.op("fmul", x, z), _horner(o, z, _TANH), x)
    power = exp(o, o.op("fadd", magnitude, magnitude))
    ratio = o.op("fdiv", o.f32(2.0), o.op("fadd", power, o.f32(1.0)))
    large = o.op("fsub", o.f32(1.0), ratio)
    sign = o.op("and", o.op("as_int", x), o.i32(_SIGN_BIT))
    # the comparison is false for NaN, which the polynomial passes on
    result = o.op("select", o.op("flt", o.f32(0.625), magnitude), large, small)
    # the sign is set last, because the polynomial of −0 is +0
    return o.op("as_float", o.op("or", o.op("as_int", result), sign))
