"""Every exception and warning that q4jit raises.

Q4JitError
├── TraceError          the decorated function cannot be compiled
├── ArgumentError       an argument of a call does not fit (also a TypeError and a ValueError)
├── FormatError         a weight's bytes, shape or format name are wrong
├── GGUFError           a GGUF file is damaged, or uses something that q4jit does not read
├── MissingNameError    a GGUF file has no tensor or key of that name (also a KeyError)
├── TargetError         a target is unknown, or cannot run on this machine
├── CompileError        a compiler refused the generated text, or crashed
├── DeviceError         a GPU, its driver or its memory failed or is missing
├── ConfigError         an environment variable has a value that q4jit cannot use
└── TuningError         a file of tunings is damaged, or has constants that no kernel takes
CacheWarning            the disk cache cannot be used; results are not affected
SpecializationWarning   one argument makes a function be traced, and perhaps compiled, too often
"""

import copyreg
import difflib
import heapq
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

__all__ = [
    "ArgumentError",
    "CacheWarning",
    "CompileError",
    "ConfigError",
    "DeviceError",
    "FormatError",
    "GGUFError",
    "MissingNameError",
    "Q4JitError",
    "SpecializationWarning",
    "TargetError",
    "TraceError",
    "TuningError",
]


def expected(what: str, got: str, *, where: str = "", cure: str = "") -> str:
    """Return the text of an error about a value: "`where`: expected `what`, got `got`; `cure`".

    Args:
        what: the values that are accepted.
        got: the value, as the reader knows it.
        where: the argument, option, file or field that holds the value.
        cure: what the reader can do, as an imperative ("use x.astype(np.float32)").
    """
    subject = f"{where}: " if where else ""
    advice = f"; {cure}" if cure else ""
    return f"{subject}expected {what}, got {got}{advice}"


# kernel.hip:12:5: (clang), kernel.hip(12): (NVRTC), <string>:12:5: (LLVM's parser)
_LINE_IN_LOG: Final = re.compile(r"(?:kernel\.\w+|<string>)[:(](\d{1,9})\b")
_WHOLE_LINES: Final = 60  # longer sources are shown in part
_CONTEXT_LINES: Final = 4  # before and after each line that the log names
_SHOWN_ERRORS: Final = 5
_SHOWN_NAMES: Final = 8
_SHOWN_LETTERS: Final = 80  # of a name
# Names come from files that may be hostile. Comparing two names takes up to the product of their
# lengths, so only the beginnings of the most promising names are compared.
_SEARCHED_NAMES: Final = 10_000
_COMPARED_NAMES: Final = 64
_COMPARED_LETTERS: Final = 128


class Q4JitError(Exception):
    """Base of every error that q4jit raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the message and attributes, whatever arguments a subclass takes.

        By default Python calls the class with `args`, which fails for `CompileError`: raised in a
        worker of `multiprocessing.Pool`, it would leave the parent waiting for ever.
        """
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class TraceError(Q4JitError, TypeError):
    """The decorated function cannot be compiled; the message shows the line in question."""


class ArgumentError(Q4JitError, TypeError, ValueError):
    """An argument of a call has a kind, dtype or shape that the function cannot take."""


class FormatError(Q4JitError, ValueError):
    """A weight's bytes, shape or format name are wrong, or do not match each other."""


class GGUFError(Q4JitError, ValueError):
    """A GGUF file is damaged, or has a version, byte order or format that q4jit does not read."""


class MissingNameError(Q4JitError, KeyError):
    """A GGUF file has no tensor or metadata key of the name that was asked for.

    Attributes:
        path: the file.
        what: `tensor` or `key`.
        name: the name that was asked for.
        names: the names in the file.
    """

    def __init__(self, path: str, what: str, name: object, names: Collection[str]) -> None:
        super().__init__(path, what, name, tuple(names))
        self.path = path
        self.what = what
        self.name = name
        self.names = tuple(names)

    def __str__(self) -> str:  # composed only when printed: `Mapping.get` drops these errors
        count = f"{len(self.names)} {self.what}{'' if len(self.names) == 1 else 's'}"
        problem = f"{self.path}: no {self.what} named {short_name(self.name)}"
        if similar := _similar(str(self.name), self.names):
            return f"{problem} ({count}). Did you mean {' or '.join(map(short_name, similar))}?"
        listed = ", ".join(map(short_name, self.names[:_SHOWN_NAMES]))
        if len(self.names) > _SHOWN_NAMES:
            return f"{problem} ({count}; the first are {listed})"
        return f"{problem} ({count}: {listed})" if listed else f"{problem} ({count})"


def shortened(text: str, most: int) -> str:
    """Return a text from outside, or its beginning and an ellipsis: `most` letters in all."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def short_name(name: object) -> str:
    """Return a name from outside, quoted, escaped and at most about 80 characters long."""
    if isinstance(name, str):
        name = name if len(name) <= _SHOWN_LETTERS else name[: _SHOWN_LETTERS - 3] + "..."
        return repr(name)
    text = " ".join(repr(name).split())  # an array's has several lines
    return text if len(text) <= _SHOWN_LETTERS else text[: _SHOWN_LETTERS - 3] + "..."


def _similar(name: str, names: Sequence[str]) -> list[str]:
    """Return up to three names that resemble `name`, in a time that does not grow with `names`."""
    wanted = name[:_COMPARED_LETTERS].casefold()
    beginnings = {known: known[:_COMPARED_LETTERS] for known in names[:_SEARCHED_NAMES]}
    promising = heapq.nlargest(
        _COMPARED_NAMES, beginnings, key=lambda known: _shared(wanted, beginnings[known].casefold())
    )
    by_beginning = {beginnings[known]: known for known in promising}
    close = difflib.get_close_matches(name[:_COMPARED_LETTERS], by_beginning)
    return [by_beginning[beginning] for beginning in close]


def _shared(a: str, b: str) -> int:
    """Return how many letters two names share at their beginnings and at their ends."""
    return _shared_beginning(a, b) + _shared_beginning(a[::-1], b[::-1])


def _shared_beginning(a: str, b: str) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


class TargetError(Q4JitError, ValueError):
    """A target is unknown, or its code cannot run on this machine."""


class CompileError(Q4JitError, RuntimeError):
    """A compiler refused generated text, crashed or took too long; or its output is damaged.

    Attributes:
        compiler: its name.
        command: the command that failed, as a list of arguments.
        flags: the options that q4jit always passes, in order.
        log: what the compiler printed.
        source: the text.
        lines: the line numbers of the text that the log names, in the log's order.
        repro: a folder with the text and `repro.sh`, which runs the command again.
        origins: for a line number of the text, the line that it was generated from.
    """

    def __init__(
        self,
        compiler: str,
        flags: tuple[str, ...],
        log: str,
        source: str,
        *,
        command: tuple[str, ...] = (),
        repro: Path | None = None,
        origins: Mapping[int, str] | None = None,
    ) -> None:
        self.compiler = compiler
        self.command = command
        self.flags = flags
        self.log = log
        self.source = source
        self.lines = _lines_named(log, source)
        self.repro = repro
        self.origins = dict(origins or {})
        super().__init__(self._message())

    def with_origins(self, origins: Mapping[int, str]) -> "CompileError":
        """Return the same error with the template line of each line ("kernel/gemv.hip.j2:12")."""
        error = CompileError(
            self.compiler,
            self.flags,
            self.log,
            self.source,
            command=self.command,
            repro=self.repro,
            origins=origins,
        )
        for note in getattr(self, "__notes__", ()):
            error.add_note(note)
        return error

    def _message(self) -> str:
        called = shlex.join(self.command) if self.command else " ".join(self.flags)
        parts = [f"{self.compiler} failed{': ' if called else ''}{called}\n{self.log.rstrip()}"]
        if self.source:
            parts.append(f"source:\n{self._excerpt()}")
        if self.repro:
            parts.append(f"to run it again: sh {shlex.quote(str(self.repro / 'repro.sh'))}")
        return "\n\n".join(parts)

    def _excerpt(self) -> str:
        """Return the numbered source: all of it, or the lines around those that the log names."""
        text = self.source.splitlines()
        wanted: Sequence[int] = range(1, len(text) + 1)
        if len(text) > _WHOLE_LINES:
            near = {
                number
                for line in self.lines[:_SHOWN_ERRORS]
                for number in range(line - _CONTEXT_LINES, line + _CONTEXT_LINES + 1)
            }
            wanted = [number for number in wanted if number in near]
        shown = []
        for before, number in zip((0, *wanted), wanted, strict=False):
            if number != before + 1:
                shown.append("       …")
            origin = self.origins.get(number)
            mark = f"    <- {origin}" if origin and number in self.lines else ""
            shown.append(f"{number:5d}  {text[number - 1]}{mark}")
        if len(wanted) < len(text) and (not wanted or wanted[-1] < len(text)):
            shown.append(f"       … ({len(text)} lines)")
        return "\n".join(shown)


def _lines_named(log: str, source: str) -> tuple[int, ...]:
    count = len(source.splitlines())
    named = (int(match[1]) for match in _LINE_IN_LOG.finditer(log))
    return tuple(dict.fromkeys(line for line in named if 1 <= line <= count))


class DeviceError(Q4JitError, RuntimeError):
    """A GPU, its driver or its memory failed or is missing; the message says what to do."""


class ConfigError(Q4JitError, ValueError):
    """An environment variable holds a value that q4jit cannot use."""


class TuningError(Q4JitError, ValueError):
    """A file of tunings is damaged, or has constants that q4jit would not have tried."""


class CacheWarning(UserWarning):
    """The disk cache cannot be read or written; kernels are kept in memory for this process."""


class SpecializationWarning(UserWarning):
    """One argument or global has made a function be traced, and perhaps compiled, many times."""
