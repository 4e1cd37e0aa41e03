"""Writing LLVM IR as text that people read: functions, loops, constants, comments.

Small helpers that a C programmer would write as inline functions stay functions in the text
(`alwaysinline`), so one line of IR says what it is about.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from q4jit.frontend import elementary
from q4jit.targets import Target
from q4jit.weights.layouts import LANES

VECTOR: Final = "<16 x float>"
INTS: Final = "<16 x i32>"
MASK: Final = "<16 x i1>"


def float_text(value: float) -> str:
    """An f32 constant: decimal where that is short and exact, else the bits LLVM asks for."""
    rounded = np.float32(value)
    if np.isfinite(rounded) and float(rounded) == round(float(rounded), 4):
        text = f"{float(rounded):.4f}".rstrip("0")
        return f"{text}0" if text.endswith(".") else text
    bits = int(np.array([rounded]).astype(np.float64).view(np.uint64)[0])
    return f"0x{bits:016X}"


def splat(kind: str, value: str) -> str:
    """A constant of a scalar type (`float`, `i32`) in every lane."""
    return f"splat ({kind} {value})"


@dataclass
class Loop:
    """A running loop: its index, and the values that it carries from round to round."""

    index: str
    values: dict[str, str]

    def __getitem__(self, name: str) -> str:
        return self.values[name]

    def __setitem__(self, name: str, value: str) -> None:
        assert name in self.values
        self.values[name] = value


@dataclass
class Function:
    """One function being written. Names are made unique by a number where they repeat."""

    header: str
    doc: str = ""
    lines: list[str] = field(default_factory=list)
    _used: dict[str, int] = field(default_factory=dict)
    _block: str = "entry"
    _at_entry: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # parameters and the first block's label share one space of names with values
        self._used = dict.fromkeys([*re.findall(r"%(\w+)", self.header), "entry"], 1)

    def fresh(self, hint: str) -> str:
        """A name that the function has not used yet."""
        count = self._used.get(hint, 0)
        self._used[hint] = count + 1
        return f"{hint}.{count}" if count else hint

    def let(self, hint: str, expression: str) -> str:
        """Add `%hint = expression` and return the name."""
        name = f"%{self.fresh(hint)}"
        self.lines.append(f"  {name} = {expression}")
        return name

    def let_at_entry(self, hint: str, expression: str) -> str:
        """Add `%hint = expression` to the top of the function, once for the same expression."""
        if expression not in self._at_entry:
            self._at_entry[expression] = f"%{self.fresh(hint)}"
        return self._at_entry[expression]

    def do(self, instruction: str) -> None:
        """Add an instruction without a result."""
        self.lines.append(f"  {instruction}")

    def comment(self, text: str) -> None:
        """Add a comment line."""
        self.lines.append(f"  ; {text}")

    def label(self, name: str) -> None:
        """Start a basic block."""
        self.lines.append(f"{name}:")
        self._block = name

    def at(self, base: str, kind: str, index: str | int, hint: str = "at") -> str:
        """The address of element `index` of type `kind`."""
        if index in (0, "0"):
            return base
        return self.let(hint, f"getelementptr {kind}, ptr {base}, i64 {index}")

    def index(self, hint: str, *terms: tuple[str | int, int]) -> str:
        """The sum of (index, factor) products; constants are folded."""
        constant, parts = 0, []
        for term, factor in terms:
            if str(term).isdigit():
                constant += int(term) * factor
            else:
                parts.append(
                    str(term) if factor == 1 else self.let(hint, f"mul i64 {term}, {factor}")
                )
        if not parts:
            return str(constant)
        total = parts[0]
        for part in [*parts[1:], *([str(constant)] if constant else [])]:
            total = self.let(hint, f"add i64 {total}, {part}")
        return total

    @contextmanager
    def loop(
        self,
        hint: str,
        start: str | int,
        stop: str | int,
        *,
        step: int = 1,
        carry: dict[str, tuple[str, str]] | None = None,
        unroll: bool = False,
    ) -> Iterator[Loop]:
        """Count from start to stop; `carry` maps names to (type, first value).

        Inside, read `loop[name]` and assign the value of the next round; behind the loop it is the
        last value. A loop of one round is written without a loop.
        """
        carry = carry or {}
        if isinstance(start, int) and isinstance(stop, int) and stop - start == step:
            yield Loop(str(start), {n: v for n, (_, v) in carry.items()})
            return
        name = self.fresh(hint)
        before = self._block
        self.do(f"br label %{name}.head")
        self.label(f"{name}.head")
        names = {n: f"%{self.fresh(f'{n}.{name}')}" for n in carry}
        head = len(self.lines)
        self.do(f"%{name}.more = icmp slt i64 %{name}, {stop}")
        self.do(f"br i1 %{name}.more, label %{name}.body, label %{name}.done")
        self.label(f"{name}.body")
        running = Loop(f"%{name}", dict(names))
        yield running
        self.do(f"%{name}.next = add i64 %{name}, {step}")
        self.do(f"br label %{name}.head" + (", !llvm.loop !0" if unroll else ""))
        phis = [f"  %{name} = phi i64 [ {start}, %{before} ], [ %{name}.next, %{self._block} ]"]
        phis += [
            f"  {names[n]} = phi {kind} [ {first}, %{before} ], "
            f"[ {running.values[n]}, %{self._block} ]"
            for n, (kind, first) in carry.items()
        ]
        self.lines[head:head] = phis
        self.label(f"{name}.done")
        running.values = names

    def text(self) -> str:
        """The whole function."""
        doc = "".join(f"; {line}\n" for line in self.doc.splitlines())
        entry = [f"  {name} = {expression}" for expression, name in self._at_entry.items()]
        body = "\n".join(["entry:", *entry, *self.lines])
        return f"{doc}define {self.header} {{\n{body}\n}}\n"


@dataclass
class Module:
    """A module being written: its target, its functions in order, its declarations."""

    target: Target
    _functions: dict[str, Function | str] = field(default_factory=dict)
    _declarations: set[str] = field(default_factory=set)

    def add(self, name: str, function: Function | str) -> None:
        """Add a finished function under its name, which must be new."""
        assert name not in self._functions, name
        self._functions[name] = function

    def knows(self, name: str) -> bool:
        """Whether a function of that name was added."""
        return name in self._functions

    def declare(self, declaration: str) -> None:
        """Declare an intrinsic."""
        self._declarations.add(declaration)

    def fma(self, kind: str = VECTOR) -> str:
        """The name of the multiply-add intrinsic: fused only where the CPU fuses.

        Elsewhere `llvm.fma` would become a call of libm's fmaf, lane by lane.
        """
        fused = self.target.has("fma") or self.target.family == "aarch64"
        name = f"llvm.{'fma' if fused else 'fmuladd'}.{'v16f32' if kind == VECTOR else 'f32'}"
        self.declare(f"declare {kind} @{name}({kind}, {kind}, {kind})")
        return f"@{name}"

    def text(self, comment: str) -> str:
        """The whole module under a leading comment."""
        # 512-bit registers are used only where a function says so
        width = 8 * self.target.vector_bytes
        attributes = (
            f'attributes #0 = {{ nounwind "prefer-vector-width"="{width}" '
            f'"min-legal-vector-width"="{width}" }}\n'
            "attributes #1 = { alwaysinline nounwind }"
        )
        parts = [
            "".join(f"; {line}\n" for line in comment.splitlines()),
            f'target triple = "{self.target.triple}"\n',
            *(f if isinstance(f, str) else f.text() for f in self._functions.values()),
            "\n".join(sorted(self._declarations)) + "\n" if self._declarations else "",
            attributes + "\n",
            '!0 = distinct !{!0, !{!"llvm.loop.unroll.full"}}\n',
        ]
        return "\n".join(p for p in parts if p)


# --- element-wise operations ----------------------------------------------------------------

_FLOAT_OPS: Final = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
_COMPARE: Final = {"lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge", "eq": "oeq", "ne": "une"}


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


def apply(module: Module, f: Function, lanes: Lanes, op: str, v: Sequence[str]) -> str:
    """Write one element-wise operation of the graph and return the name of its value."""
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
            nan = f.let("nan", f"fcmp uno {kind} {v[0]}, {v[0]}")  # NumPy hands NaN on
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
        return splat("i32", str(value)) if self._lanes.count > 1 else str(value)

    def op(self, name: str, *v: str) -> str:
        lanes, let = self._lanes, self._f.let
        match name:
            case "fadd" | "fsub" | "fmul" | "fdiv":
                return let("v", f"{name} {lanes.f32} {v[0]}, {v[1]}")
            case "iadd" | "isub":
                return let("i", f"{name[1:]} {lanes.i32} {v[0]}, {v[1]}")
            case "shl" | "ashr" | "and" | "or":
                return let("i", f"{name} {lanes.i32} {v[0]}, {v[1]}")
            case "flt" | "feq":
                return let("t", f"fcmp o{name[1:]} {lanes.f32} {v[0]}, {v[1]}")
            case "select":
                kind = lanes.f32
                return let("v", f"select {lanes.i1} {v[0]}, {kind} {v[1]}, {kind} {v[2]}")
            case "as_int":
                return let("i", f"bitcast {lanes.f32} {v[0]} to {lanes.i32}")
            case "as_float":
                return let("v", f"bitcast {lanes.i32} {v[0]} to {lanes.f32}")
            case "fma":
                kind = lanes.f32
                fma = self._module.fma(kind)
                return let("v", f"call {kind} {fma}({kind} {v[0]}, {kind} {v[1]}, {kind} {v[2]})")
            case "fabs":
                return apply(self._module, self._f, lanes, "abs", v)
        raise AssertionError(f"no LLVM text for {name}")


# what the text says of each: data, because Python may drop docstrings and the text is a cache key
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


# --- loads and stores of 16 lanes -------------------------------------------------------------


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
