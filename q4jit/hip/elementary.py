"""exp, log and tanh as C++ functions."""

import functools
from collections.abc import Container
from typing import Final

from q4jit.frontend import elementary
from q4jit.hip.values import literal


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
        result = f"{_PREFIXES[kind]}{len(self.lines)}"
        meanings = [_MEANINGS[operand] for operand in v if operand in _MEANINGS]
        comment = f"  // {'; '.join(meanings)}" if meanings else ""
        self.lines.append(f"    const {kind} {result} = {text.format(*v)};{comment}")
        return result


_PREFIXES: Final = {"float": "t", "i32": "n", "bool": "is"}
_CXX: Final = {
    "fadd": ("float", "{} + {}"),
    "fsub": ("float", "{} - {}"),
    "fmul": ("float", "{} * {}"),
    "fdiv": ("float", "{} / {}"),
    "fma": ("float", "fma_f32({}, {}, {})"),
    "fabs": ("float", "abs_f32({})"),
    # unsigned: what wraps around, for NaN and numbers below 0, is not used but must be defined
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
# What a constant of the algorithms is, by its text.
_MEANINGS: Final = {
    "1.442695f": "1 / ln 2",
    "-0.6933594f": "-ln 2, its first 10 bits",
    "0.6933594f": "ln 2, its first 10 bits",
    "0.00021219444f": "-ln 2, the rest",
    "-0.00021219444f": "ln 2, the rest",
    "1.2582912e+07f": "1.5 * 2^23, where floats are whole numbers",
    "(i32)0x4b400000u": "the bits of 1.5 * 2^23",
    "(i32)0x3f3504f3u": "the bits of sqrt(1/2), the smallest mantissa",
    "(i32)0x80000000u": "the sign",
    "1.6777216e+07f": "2^24",
    "1.1754944e-38f": "the smallest normal number",
    "as_f32(0x7f800000u)": "Inf",
    "as_f32(0xff800000u)": "-Inf",
    "as_f32(0x7fc00000u)": "NaN",
    "127": "the bias of an exponent",
}
# data, because Python may drop docstrings and the text is a cache key
_ELEMENTARY: Final = {
    "exp": (elementary.exp, "e to the x within 2 ulp, denormal results included."),
    "log": (elementary.log, "ln x within 3 ulp, denormals included; -Inf at 0, NaN below."),
    "tanh": (elementary.tanh, "tanh x within 3 ulp: a polynomial up to 0.625, by exp beyond."),
}


def elementary_functions(operations: Container[str]) -> list[str]:
    """Return the texts of those functions that are among the operations of a kernel."""
    return [_function(name) for name in _ELEMENTARY if name in operations]


@functools.cache
def _function(name: str) -> str:
    function, comment = _ELEMENTARY[name]
    ops = _CxxOps()
    o: elementary.Ops[str] = ops
    result = function(o, "x")
    body = "\n".join([*ops.lines, f"    return {result};"])
    return f"// {comment}\nDEVICE float {name}_f32(float x) {{\n{body}\n}}"
