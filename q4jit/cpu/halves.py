"""Load and store one or 16 floats of every type; f16 and bf16 are converted on the way.

Their bits, from the highest: a sign; then 5 bits of exponent and 10 of mantissa in f16 (IEEE 754
binary16), 8 and 7 in bf16, which is the upper half of an f32. CPUs without F16C convert f16 by
integer arithmetic, and all CPUs convert bf16 so: LLVM would call library functions that nothing
resolves.
"""

from collections.abc import Callable
from typing import Final

from q4jit.cpu.lanes import Lanes, load_vector, store_vector
from q4jit.cpu.llvm_text import EXPONENT_BITS, EXPONENT_SHIFT, MAGNITUDE_BITS, Function, Module
from q4jit.floats import FLOAT_BYTES, FloatType

_F16_MAGNITUDE: Final = 0x7FFF
_F16_SIGN: Final = 0x8000
_F16_INFINITY: Final = 0x7C00
_F16_QUIET_NAN: Final = 0x7E00
_F16_MANTISSA: Final = 0x3FF
_F16_OVERFLOW: Final = 65520.0  # and what is greater rounds to more than the largest f16
_F16_LEAST_NORMAL: Final = 2.0**-14
_F16_HALF: Final = 0.5  # its last bit is 2^-24, that of f16's denormals
_HALF_BITS: Final = 0x3F000000
_MANTISSA_SHIFT: Final = 23 - 10  # from f16's mantissa to f32's
_SIGN_SHIFT: Final = 31 - 15
_BIAS_FACTOR: Final = 2.0 ** (127 - 15)  # f32's bias of the exponent less f16's
_BIAS_BITS: Final = (127 - 15) << 23
_BELOW_TIE: Final = (1 << _MANTISSA_SHIFT - 1) - 1

_BF16_SHIFT: Final = 16
_BF16_BELOW_TIE: Final = (1 << _BF16_SHIFT - 1) - 1
_BF16_QUIET: Final = 0x40  # the highest bit of a NaN's mantissa

_E8M0_DENORMAL_SHIFT: Final = 21  # 2^-128 has only this bit

STORED: Final[dict[FloatType, str]] = {"f32": "float", "f16": "i16", "bf16": "i16"}
"""LLVM's type of an element in memory."""


def type_suffix(float_type: FloatType) -> str:
    """Return the end of a function's name: the type that it stores, unless that is f32."""
    return "" if float_type == "f32" else f"_{float_type}"


def named(float_type: FloatType) -> str:
    """Return how comments name numbers of a type."""
    return "floats" if float_type == "f32" else float_type


def load_floats(
    module: Module,
    f: Function,
    lanes: Lanes,
    float_type: FloatType,
    pointer: str,
    mask: str | None,
    hint: str,
) -> str:
    """Load one or 16 floats as f32, and zeros instead of the lanes that `mask` leaves out."""
    element = STORED[float_type]
    if lanes.count > 1:
        value = load_vector(module, f, pointer, mask, hint, element)
    else:
        value = f.let(hint, f"load {element}, ptr {pointer}, align {FLOAT_BYTES[float_type]}")
    if float_type == "f32":
        return value
    kind = _stored(lanes, float_type)
    widen = _function(module, lanes, f"{float_type}_to_f32", kind, lanes.f32, _WIDEN[float_type])
    return f.let(f"{hint}_f32", f"call {lanes.f32} {widen}({kind} {value})")


def store_floats(
    module: Module,
    f: Function,
    lanes: Lanes,
    float_type: FloatType,
    value: str,
    pointer: str,
    mask: str | None,
) -> None:
    """Store one or 16 f32 values, or only the lanes of `mask`, rounded to nearest even."""
    element = STORED[float_type]
    if float_type != "f32":
        name, kind = f"f32_to_{float_type}", _stored(lanes, float_type)
        narrow = _function(module, lanes, name, lanes.f32, kind, _NARROW[float_type])
        value = f.let(float_type, f"call {kind} {narrow}({lanes.f32} {value})")
    if lanes.count > 1:
        store_vector(module, f, value, pointer, mask, element)
    else:
        f.do(f"store {element} {value}, ptr {pointer}, align {FLOAT_BYTES[float_type]}")


def half_loader(module: Module, lanes: Lanes, float_type: FloatType, align_bytes: int = 2) -> str:
    """Return the function that loads f16 or bf16 as f32 from an address of that alignment."""
    aligned = "" if align_bytes == 2 else f"_align{align_bytes}"
    name = f"load_{float_type}_{lanes.suffix}{aligned}"
    if not module.knows(name):
        doc = f"{float_type} as f32, exactly."
        f = Function(f"internal {lanes.f32} @{name}(ptr %at) #1", doc)
        if float_type == "f16" and _converts_f16(module):
            kind = lanes.f32.replace("float", "half")
            f16 = f.let("f16", f"load {kind}, ptr %at, align {align_bytes}")
            f.do(f"ret {lanes.f32} {f.let('value', f'fpext {kind} {f16} to {lanes.f32}')}")
        else:
            stored = f"load {_stored(lanes, float_type)}, ptr %at, align {align_bytes}"
            widen = _widen_bf16 if float_type == "bf16" else _widen_f16
            wide = widen(module, f, lanes, f.let(float_type, stored))
            f.do(f"ret {lanes.f32} {wide}")
        module.add(name, f)
    return f"@{name}"


def e8m0_loader(module: Module, lanes: Lanes) -> str:
    """Return the function that loads scales in E8M0 as f32: 2^(e − 128), and 2^126, 2^127 at most.

    A byte has only an exponent. The scale is half of 2^(e − 127), because tables of numbers have
    twice their values.
    """
    name = f"load_e8m0_{lanes.suffix}"
    if not module.knows(name):
        f = Function(f"internal {lanes.f32} @{name}(ptr %at) #1", "E8M0 as f32: 2^(e - 128).")
        narrow = lanes.f32.replace("float", "i8")
        ints, number = lanes.i32, lanes.integer
        e8m0 = f.let("e8m0", f"load {narrow}, ptr %at, align 1")
        e = f.let("e", f"zext {narrow} {e8m0} to {ints}")
        biased = f.let("biased", f"sub {ints} {e}, {number(1)}")
        normal = f.let("normal", f"shl {ints} {biased}, {number(EXPONENT_SHIFT)}")
        f.comment("the first two are denormal: 2^-128 and 2^-127")
        next_ = f.let("next", f"add {ints} {e}, {number(1)}")
        denormal = f.let("denormal", f"shl {ints} {next_}, {number(_E8M0_DENORMAL_SHIFT)}")
        is_small = f.let("is_small", f"icmp ult {ints} {e}, {number(2)}")
        operands = f"{ints} {denormal}, {ints} {normal}"
        bits = f.let("bits", f"select {lanes.i1} {is_small}, {operands}")
        f.do(f"ret {lanes.f32} {f.let('value', f'bitcast {ints} {bits} to {lanes.f32}')}")
        module.add(name, f)
    return f"@{name}"


def _stored(lanes: Lanes, float_type: FloatType) -> str:
    return lanes.f32.replace("float", STORED[float_type])


def _converts_f16(module: Module) -> bool:
    return module.target.has("f16c") or module.target.family == "aarch64"


_Writer = Callable[[Module, Function, Lanes, str], str]


def _function(
    module: Module, lanes: Lanes, name: str, source: str, result: str, write: _Writer
) -> str:
    """Return the function that converts `%value` of type `source` by what `write` writes."""
    full = f"{name}_x{lanes.count}"
    if not module.knows(full):
        how = "exactly" if name.endswith("f32") else "to nearest even"
        doc = f"{name.replace('_', ' ')}, {how}."
        f = Function(f"internal {result} @{full}({source} %value) #1", doc)
        f.do(f"ret {result} {write(module, f, lanes, '%value')}")
        module.add(full, f)
    return f"@{full}"


# --- to f32 ---------------------------------------------------------------------------------------


def _widen_f16(module: Module, f: Function, lanes: Lanes, value: str) -> str:
    if not _converts_f16(module):
        return _widen_f16_by_integers(f, lanes, value)
    kind = lanes.f32.replace("float", "half")
    half = f.let("half", f"bitcast {_stored(lanes, 'f16')} {value} to {kind}")
    return f.let("wide", f"fpext {kind} {half} to {lanes.f32}")


def _widen_f16_by_integers(f: Function, lanes: Lanes, f16: str) -> str:
    ints, floats, number = lanes.i32, lanes.f32, lanes.integer
    bits = f.let("bits", f"zext {_stored(lanes, 'f16')} {f16} to {ints}")
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
    return f.let("result", f"bitcast {ints} {both} to {floats}")


def _widen_bf16(module: Module, f: Function, lanes: Lanes, value: str) -> str:
    bits = f.let("bits", f"zext {_stored(lanes, 'bf16')} {value} to {lanes.i32}")
    high = f.let("high", f"shl {lanes.i32} {bits}, {lanes.integer(_BF16_SHIFT)}")
    return f.let("wide", f"bitcast {lanes.i32} {high} to {lanes.f32}")


# --- from f32, rounded to nearest even ------------------------------------------------------------


def _narrow_f16(module: Module, f: Function, lanes: Lanes, value: str) -> str:
    if not _converts_f16(module):
        return _narrow_f16_by_integers(f, lanes, value)
    kind = lanes.f32.replace("float", "half")
    half = f.let("half", f"fptrunc {lanes.f32} {value} to {kind}")
    return f.let("narrow", f"bitcast {kind} {half} to {_stored(lanes, 'f16')}")


def _narrow_f16_by_integers(f: Function, lanes: Lanes, value: str) -> str:
    ints, floats, number, truth = lanes.i32, lanes.f32, lanes.integer, lanes.i1
    bits = f.let("bits", f"bitcast {floats} {value} to {ints}")
    magnitude = f.let("magnitude", f"and {ints} {bits}, {number(MAGNITUDE_BITS)}")
    size = f.let("size", f"bitcast {ints} {magnitude} to {floats}")
    shifted = f.let("shifted", f"lshr {ints} {magnitude}, {number(_MANTISSA_SHIFT)}")

    f.comment("normal: the exponent gets f16's bias, and a tie is rounded up to an even mantissa")
    odd = f.let("odd", f"and {ints} {shifted}, {number(1)}")
    rebased = f.let("rebased", f"sub {ints} {magnitude}, {number(_BIAS_BITS - _BELOW_TIE)}")
    rounded = f.let("rounded", f"add {ints} {rebased}, {odd}")
    normal = f.let("normal", f"lshr {ints} {rounded}, {number(_MANTISSA_SHIFT)}")

    f.comment("denormal: adding 1/2 rounds to multiples of 2^-24")
    moved = f.let("moved", f"fadd {floats} {size}, {lanes.constant(_F16_HALF)}")
    moved_bits = f.let("moved_bits", f"bitcast {floats} {moved} to {ints}")
    denormal = f.let("denormal", f"sub {ints} {moved_bits}, {number(_HALF_BITS)}")
    least = lanes.constant(_F16_LEAST_NORMAL)
    is_small = f.let("is_small", f"fcmp olt {floats} {size}, {least}")
    finite = f.let("finite", f"select {truth} {is_small}, {ints} {denormal}, {ints} {normal}")

    most = lanes.constant(_F16_OVERFLOW)
    is_large = f.let("is_large", f"fcmp oge {floats} {size}, {most}")
    infinity = number(_F16_INFINITY)
    number_bits = f.let("number", f"select {truth} {is_large}, {ints} {infinity}, {ints} {finite}")
    payload = f.let("payload", f"and {ints} {shifted}, {number(_F16_MANTISSA)}")
    nan = f.let("nan", f"or {ints} {payload}, {number(_F16_QUIET_NAN)}")
    is_nan = f.let("is_nan", f"fcmp uno {floats} {value}, {value}")
    right = f.let("right", f"select {truth} {is_nan}, {ints} {nan}, {ints} {number_bits}")
    high = f.let("high", f"lshr {ints} {bits}, {number(_SIGN_SHIFT)}")
    sign = f.let("sign", f"and {ints} {high}, {number(_F16_SIGN)}")
    both = f.let("both", f"or {ints} {right}, {sign}")
    return f.let("narrow", f"trunc {ints} {both} to {_stored(lanes, 'f16')}")


def _narrow_bf16(module: Module, f: Function, lanes: Lanes, value: str) -> str:
    ints, number = lanes.i32, lanes.integer
    bits = f.let("bits", f"bitcast {lanes.f32} {value} to {ints}")
    high = f.let("high", f"lshr {ints} {bits}, {number(_BF16_SHIFT)}")
    odd = f.let("odd", f"and {ints} {high}, {number(1)}", "a tie is rounded up where this is 1")
    raised = f.let("raised", f"add {ints} {bits}, {number(_BF16_BELOW_TIE)}")
    rounded = f.let("rounded", f"add {ints} {raised}, {odd}")
    finite = f.let("finite", f"lshr {ints} {rounded}, {number(_BF16_SHIFT)}")
    nan = f.let("nan", f"or {ints} {high}, {number(_BF16_QUIET)}")
    is_nan = f.let("is_nan", f"fcmp uno {lanes.f32} {value}, {value}")
    right = f.let("right", f"select {lanes.i1} {is_nan}, {ints} {nan}, {ints} {finite}")
    return f.let("narrow", f"trunc {ints} {right} to {_stored(lanes, 'bf16')}")


_WIDEN: Final[dict[FloatType, _Writer]] = {"f16": _widen_f16, "bf16": _widen_bf16}
_NARROW: Final[dict[FloatType, _Writer]] = {"f16": _narrow_f16, "bf16": _narrow_bf16}
