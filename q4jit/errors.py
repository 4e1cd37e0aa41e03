"""Every exception and warning that q4jit raises.

Q4JitError
├── TraceError          the decorated function does something that cannot be compiled
├── ArgumentError       a call's arguments do not fit (also a TypeError and a ValueError)
├── FormatError         weight bytes, shapes or a format name do not fit together
├── GGUFError           a GGUF file is damaged, foreign or not supported
├── TargetError         a target is unknown, or cannot run on this machine
├── CompileError        a compiler refused the generated text
└── ConfigError         an environment variable holds something unusable
CacheWarning            the disk cache cannot be used; the results are right all the same
"""

__all__ = [
    "ArgumentError",
    "CacheWarning",
    "CompileError",
    "ConfigError",
    "FormatError",
    "GGUFError",
    "Q4JitError",
    "TargetError",
    "TraceError",
]


class Q4JitError(Exception):
    """Base of every error that q4jit raises on purpose."""


class TraceError(Q4JitError, TypeError):
    """The decorated function does something that cannot be compiled; the message shows its line."""


class ArgumentError(Q4JitError, TypeError, ValueError):
    """An argument of a call has a kind, dtype or shape that the function cannot take."""


class FormatError(Q4JitError, ValueError):
    """Weight bytes, a shape or a format name do not fit together."""


class GGUFError(Q4JitError, ValueError):
    """A GGUF file is damaged, of another version or byte order, or uses an unsupported format."""


class TargetError(Q4JitError, ValueError):
    """A target is unknown, or its code cannot run on this machine."""


class CompileError(Q4JitError, RuntimeError):
    """A compiler refused generated text: carries the log, the numbered source and the flags."""

    def __init__(self, compiler: str, flags: tuple[str, ...], log: str, source: str) -> None:
        self.compiler = compiler
        self.flags = flags
        self.log = log
        self.source = source
        numbered = "\n".join(f"{i:5d}  {line}" for i, line in enumerate(source.splitlines(), 1))
        super().__init__(f"{compiler} {' '.join(flags)} failed:\n{log}\n\nsource:\n{numbered}")


class ConfigError(Q4JitError, ValueError):
    """An environment variable holds a value that q4jit cannot use."""


class CacheWarning(UserWarning):
    """The disk cache cannot be read or written; kernels are kept in memory for this process."""
