"""Write LLVM IR as text that people read: functions, loops, struct types, constants, comments.

Small helpers that a C programmer would write as inline functions stay functions in the text
(`alwaysinline`), so that one line of IR says what it does.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from q4jit.targets import Target

VECTOR: Final = "<16 x float>"
INTS: Final = "<16 x i32>"
MASK: Final = "<16 x i1>"

# The bits of an f32, from the highest: the sign, 8 bits of exponent, 23 bits of mantissa.
EXPONENT_SHIFT: Final = 23
EXPONENT_BIAS: Final = 127
EXPONENT_BITS: Final = 0x7F800000
"""All bits of the exponent. They are also the bits of Inf, and NaN's bits are greater."""
MAGNITUDE_BITS: Final = 0x7FFFFFFF
"""All bits but the sign."""

_LAST_DECIMAL: Final = 0xFFFF
"""Integers up to this read best in decimal; beyond it they are bit patterns."""


def float_text(value: float) -> str:
    """Return an f32 constant: decimal if that is short and exact, else the bits LLVM asks for."""
    rounded = np.float32(value)
    if np.isfinite(rounded) and float(rounded) == round(float(rounded), 4):
        text = f"{float(rounded):.4f}".rstrip("0")
        return f"{text}0" if text.endswith(".") else text
    bits = int(np.array([rounded]).astype(np.float64).view(np.uint64)[0])
    return f"0x{bits:016X}"


def int_text(value: int) -> str:
    """Return an i32 constant: decimal if it is small, else its bits in hexadecimal."""
    if abs(value) <= _LAST_DECIMAL:
        return str(value)
    return f"u0x{value & 0xFFFFFFFF:08X}"


def float_bits(value: float) -> int:
    """Return the bits of an f32 as an i32."""
    return int(np.float32(value).view(np.int32))


def exponent_bits(exponent: int) -> int:
    """Return the bits that add `exponent` to the exponent of an f32."""
    return exponent << EXPONENT_SHIFT


def splat(kind: str, value: str) -> str:
    """Return a constant of a scalar type (`float`, `i32`) in every lane."""
    return f"splat ({kind} {value})"


def splat_int(value: int) -> str:
    """Return an i32 constant in every lane."""
    return splat("i32", int_text(value))


class StructField(NamedTuple):
    """A field of a struct: its name, its LLVM type, and what the text says about it."""

    name: str
    kind: str
    comment: str


@dataclass(frozen=True)
class Struct:
    """A struct type of the text, whose fields Python code names.

    Attributes:
        name: its name in the text, without `%`.
        comment: what the text says about it.
        fields: in order of their addresses.
    """

    name: str
    comment: str
    fields: tuple[StructField, ...]

    def number(self, name: str) -> int:
        """Return the number of a field."""
        return [each.name for each in self.fields].index(name)

    def offset_bytes(self, name: str, *indices: int) -> int:
        """Return where a field begins, or the element at `indices` in it."""
        number = self.number(name)
        start = sum(_size_bytes(each.kind) for each in self.fields[:number])
        kind = self.fields[number].kind
        for index in indices:
            kind = kind.partition(" x ")[2].removesuffix("]")
            start += index * _size_bytes(kind)
        return start

    def text(self) -> str:
        """Return the definition, a line for each field."""
        kinds = [each.kind + "," * (each is not self.fields[-1]) for each in self.fields]
        width = max(map(len, kinds))
        lines = [
            f"  {kind:{width}}  ; {i} {each.comment}"
            for i, (kind, each) in enumerate(zip(kinds, self.fields, strict=True))
        ]
        body = "\n".join(lines)
        return f"; {self.comment}\n%{self.name} = type {{\n{body}\n}}\n"


def _size_bytes(kind: str) -> int:
    """Return the size of a scalar or of an array."""
    if not kind.startswith("["):
        return {"i8": 1, "i32": 4, "float": 4}[kind]
    count, _, element = kind[1:-1].partition(" x ")
    return int(count) * _size_bytes(element)


@dataclass
class Loop:
    """A running loop: its index, and the values that each round hands to the next."""

    index: str
    values: dict[str, str]

    def __getitem__(self, name: str) -> str:
        return self.values[name]

    def __setitem__(self, name: str, value: str) -> None:
        assert name in self.values
        self.values[name] = value


@dataclass
class Function:
    """A function that is being written. A number makes repeated names unique."""

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
        """Return a name that the function has not used yet."""
        count = self._used.get(hint, 0)
        self._used[hint] = count + 1
        return f"{hint}.{count}" if count else hint

    def let(self, hint: str, expression: str, note: str = "") -> str:
        """Add `%hint = expression`, with a note behind it, and return the name."""
        name = f"%{self.fresh(hint)}"
        self.lines.append(f"  {name} = {expression}" + (f"  ; {note}" if note else ""))
        return name

    def let_at_entry(self, hint: str, expression: str) -> str:
        """Add `%hint = expression` to the top of the function, once per expression."""
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

    def at(self, base: str, kind: str, index: str | int, hint: str) -> str:
        """Return the address of element `index` of type `kind`."""
        if index in (0, "0"):
            return base
        return self.let(hint, f"getelementptr {kind}, ptr {base}, i64 {index}")

    def field_at(self, base: str, struct: Struct, name: str, *indices: str | int) -> str:
        """Return the address of a struct's field, or of the element at `indices` in it."""
        steps = "".join(f", i64 {index}" for index in indices)
        number = struct.number(name)
        return self.let(
            f"{name}_at", f"getelementptr %{struct.name}, ptr {base}, i64 0, i32 {number}{steps}"
        )

    def index(self, hint: str, *terms: tuple[str | int, int]) -> str:
        """Return the sum of (index, factor) products; constants are folded."""
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

    def divided(self, index: str, count: int, whole: str, within: str) -> tuple[str, str]:
        """Divide an index by `count`; return the quotient and the remainder, so named."""
        if count == 1:
            return index, "0"
        if index.isdigit():
            quotient, remainder = divmod(int(index), count)
            return str(quotient), str(remainder)
        return (
            self.let(whole, f"udiv i64 {index}, {count}"),
            self.let(within, f"urem i64 {index}, {count}"),
        )

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

        Inside, read `loop[name]` and assign the value of the next round; after the loop it is the
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
        """Return the whole function."""
        doc = "".join(f"; {line}\n" for line in self.doc.splitlines())
        entry = [f"  {name} = {expression}" for expression, name in self._at_entry.items()]
        body = "\n".join(["entry:", *entry, *self.lines])
        return f"{doc}define {self.header} {{\n{body}\n}}\n"


@dataclass
class Module:
    """A module that is being written: its target, structs, functions and declarations."""

    target: Target
    _structs: dict[str, Struct] = field(default_factory=dict)
    _functions: dict[str, Function | str] = field(default_factory=dict)
    _declarations: set[str] = field(default_factory=set)

    def add_struct(self, struct: Struct) -> None:
        """Define a struct, once."""
        defined = self._structs.setdefault(struct.name, struct)
        assert defined == struct, struct.name

    def add(self, name: str, function: Function | str) -> None:
        """Add a finished function under its name, which must be new."""
        assert name not in self._functions, name
        self._functions[name] = function

    def knows(self, name: str) -> bool:
        """Return whether a function of that name was added."""
        return name in self._functions

    def declare(self, declaration: str) -> None:
        """Declare an intrinsic."""
        self._declarations.add(declaration)

    def fma(self, kind: str = VECTOR) -> str:
        """Return the name of the multiply-add intrinsic, fused only if the CPU fuses.

        On other CPUs LLVM would turn `llvm.fma` into a call of libm's fmaf for each lane.
        """
        fused = self.target.has("fma") or self.target.family == "aarch64"
        name = f"llvm.{'fma' if fused else 'fmuladd'}.{'v16f32' if kind == VECTOR else 'f32'}"
        self.declare(f"declare {kind} @{name}({kind}, {kind}, {kind})")
        return f"@{name}"

    def text(self, comment: str) -> str:
        """Return the whole module under a leading comment."""
        # LLVM uses 512-bit registers only in functions that ask for them
        width = 8 * self.target.vector_bytes
        attributes = (
            f'attributes #0 = {{ nounwind "prefer-vector-width"="{width}" '
            f'"min-legal-vector-width"="{width}" }}\n'
            "attributes #1 = { alwaysinline nounwind }"
        )
        parts = [
            "".join(f"; {line}\n" for line in comment.splitlines()),
            f'target triple = "{self.target.triple}"\n',
            *(struct.text() for struct in self._structs.values()),
            *(f if isinstance(f, str) else f.text() for f in self._functions.values()),
            "\n".join(sorted(self._declarations)) + "\n" if self._declarations else "",
            attributes + "\n",
            '!0 = distinct !{!0, !{!"llvm.loop.unroll.full"}}\n',
        ]
        return "\n".join(p for p in parts if p)
