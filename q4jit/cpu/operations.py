"""The graph's element-wise operations in LLVM IR, for one float or 16 lanes of them."""

from collections.abc import Sequence
from typing import Final

from q4jit.cpu.lanes import Lanes
from q4jit.cpu.llvm_text import Function, Module
from q4jit.frontend import elementary

_FLOAT_OPS: Final = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
_COMPARE: Final = {"lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge", "eq": "oeq", "ne": "une"}


def apply(module: Module, f: Function, lanes: Lanes, op: str, v: Sequence[str]) -> str:
    """Write an element-wise operation of the graph and return the name of its value."""
    kind = lanes.f32
    if op in _FLOAT_OPS:
        return f.let(op, f"{_FLOAT_OPS[op]} {kind} {v[0]}, {v[1]}")
    if op in _COMPARE:
        return f.let(op, f"fcmp {_COMPARE[op]} {kind} {v[0]}, {v[1]}")
    match op:
        case "neg":
            return f.let("neg", f"fneg {kind} {v[0]}")
        case "abs" | "sqrt":
            name = f"llvm.{'fabs' if op == 'abs' else 'sqrt'}.{lanes.suffix}"
            module.declare(f"declare {kind} @{name}({kind})")
            return f.let(op, f"call {kind} @{name}({kind} {v[0]})")
        case "maximum" | "minimum":
            test = f.let(
                "beyond", f"fcmp {'ogt' if op == 'maximum' else 'olt'} {kind} {v[0]}, {v[1]}"
            )
            nan = f.let("nan", f"fcmp uno {kind} {v[0]}, {v[0]}")  # as in NumPy, NaN wins
            first = f.let("first", f"or {lanes.i1} {test}, {nan}")
            return f.let(op, f"select {lanes.i1} {first}, {kind} {v[0]}, {kind} {v[1]}")
        case "and" | "or":
            return f.let(op, f"{op} {lanes.i1} {v[0]}, {v[1]}")
        case "not":
            true = "splat (i1 true)" if lanes.count > 1 else "true"
            return f.let("not", f"xor {lanes.i1} {v[0]}, {true}")
        case "where":
            return f.let("where", f"select {lanes.i1} {v[0]}, {kind} {v[1]}, {kind} {v[2]}")
        case "exp" | "log" | "tanh":
            name = _elementary(module, op, lanes)
            return f.let(op, f"call {kind} @{name}({kind} {v[0]})")
    raise AssertionError(f"no LLVM text for {op}")


class _LlvmOps:
    """The operations of `elementary.Ops`, written as LLVM IR."""

    def __init__(self, module: Module, f: Function, lanes: Lanes) -> None:
        self._module, self._f, self._lanes = module, f, lanes

    def f32(self, value: float) -> str:
        return self._lanes.constant(value)

    def i32(self, value: int) -> str:
        return self._lanes.integer(value)

    def op(self, name: str, *v: str) -> str:
        lanes, let = self._lanes, self._f.let
        match name:
            case "fadd" | "fsub" | "fmul" | "fdiv":
                return let(name[1:], f"{name} {lanes.f32} {v[0]}, {v[1]}")
            case "iadd" | "isub":
                return let(name, f"{name[1:]} {lanes.i32} {v[0]}, {v[1]}")
            case "shl" | "ashr" | "and" | "or":
                return let(name, f"{name} {lanes.i32} {v[0]}, {v[1]}")
            case "flt" | "feq":
                return let(name[1:], f"fcmp o{name[1:]} {lanes.f32} {v[0]}, {v[1]}")
            case "select":
                kind = lanes.f32
                return let("chosen", f"select {lanes.i1} {v[0]}, {kind} {v[1]}, {kind} {v[2]}")
            case "as_int":
                return let("bits", f"bitcast {lanes.f32} {v[0]} to {lanes.i32}")
            case "as_float":
                return let("float", f"bitcast {lanes.i32} {v[0]} to {lanes.f32}")
            case "fma":
                kind = lanes.f32
                fma = self._module.fma(kind)
                return let("fma", f"call {kind} {fma}({kind} {v[0]}, {kind} {v[1]}, {kind} {v[2]})")
            case "fabs":
                return apply(self._module, self._f, lanes, "abs", v)
        raise AssertionError(f"no LLVM text for {name}")


# Comments of the text, kept apart from docstrings: Python may drop those, and the text is a cache
# key, so it must not depend on that.
_ELEMENTARY_DOCS: Final = {
    "exp": "eˣ within 2 ulp, denormal results included; 0 below −104, Inf above 88.72.",
    "log": "ln x within 3 ulp, denormals included; −Inf at 0, NaN below, Inf at Inf.",
    "tanh": "Tanh x within 3 ulp: a polynomial up to 0.625, 1 − 2/(e²ˣ + 1) beyond.",
}


def _elementary(module: Module, op: str, lanes: Lanes) -> str:
    name = f"{op}_{lanes.suffix}"
    if not module.knows(name):
        function = {"exp": elementary.exp, "log": elementary.log, "tanh": elementary.tanh}[op]
        f = Function(f"internal {lanes.f32} @{name}({lanes.f32} %x) #1", _ELEMENTARY_DOCS[op])
        ops: elementary.Ops[str] = _LlvmOps(module, f, lanes)
        f.do(f"ret {lanes.f32} {function(ops, '%x')}")
        module.add(name, f)
    return name
