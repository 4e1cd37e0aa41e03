"""What PyTorch's compiler must guard, so that no compiled graph has stale values.

Objects: results of functions that the compiler does not trace are constants to it, and before
PyTorch 2.14 it passes them no objects but Python's own. So they get the identity `id(value)`, which
the compiler guards, and look the object up.

Globals and closures: a compiled graph holds the text of a call, and the text holds the values that
tracing has read. PyTorch's compiler guards what its own trace reads, and it never sees the
function's code. So each compiled graph gets a guard that asks the function whether its text is
still the same.
"""

import ctypes
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])


def constant(function: _F) -> _F:
    """Let PyTorch's compiler call a function while it traces, and keep the result as a constant."""
    marked: _F = torch.compiler.assume_constant_result(function)
    return marked


def object_at(identity: int) -> Any:
    """Return the object with an `id`. It is alive, because the frame that was traced holds it."""
    return ctypes.cast(identity, ctypes.py_object).value


def guard(holds: Callable[[], bool], what: str) -> None:
    """Make the graph that PyTorch's compiler is tracing valid only as long as `holds()` is true.

    what: the condition, for the logs of recompilations. Does nothing outside of a trace, and under
    torch.export, whose programs keep what they were exported with.
    """
    try:
        context = torch._guards.TracingContext.try_get()
        if context is None:
            return
        add = context.guards_context.dynamo_guards.add
        source = torch._dynamo.source.GlobalStateSource()
        add(torch._guards.Guard(source, _Condition(holds, what)))
    except (AttributeError, TypeError) as error:  # these functions are private to PyTorch
        warnings.warn(
            f"PyTorch {torch.__version__} cannot guard that {what} ({error}); call "
            "torch.compiler.reset() after a change",
            stacklevel=2,
        )


class _Condition:
    """Adds a guard when the compiler asks for it."""

    def __init__(self, holds: Callable[[], bool], what: str) -> None:
        self._holds, self._what = holds, what
        # by which the compiler sorts guards
        self.__name__, self.__code__ = "Q4JIT_UNCHANGED", holds.__code__

    def __call__(self, builder: Any, _: Any) -> None:
        holds = self._holds
        builder.guard_manager.root.add_lambda_guard(lambda _: holds(), [self._what], None)
