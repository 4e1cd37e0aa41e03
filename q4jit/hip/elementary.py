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
        result = f"t{len(self.lines)}"
        self.lines.append(f"    const {kind} {result} = {text.format(*v)};")
        return result


_CXX: Final = {
    "fadd": ("float", "{} + {}"),
    "fsub": ("float", "{} - {}"),
    "fmul": ("float", "{} * {}"),
    "fdiv": ("float", "{} / {}"),
    "fma": ("float", "fma_f32({}, {}, {})"),
    "fabs": ("float", "abs_f32({})"),
    # unsigned: what wraps around for NaN and numbers below 0 is not used, but must be defined
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
