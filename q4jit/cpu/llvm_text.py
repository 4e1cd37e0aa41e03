"""Writing LLVM IR as text that people read: functions, loops, constants, comments.

Small helpers that a C programmer would write as inline functions stay functions in the text
(`alwaysinline`), so one line of IR says what it is about.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from q4jit.targets import Target

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
