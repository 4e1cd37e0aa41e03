"""Errors survive pickling and copying, with all that they carry."""

import copy
import importlib
import importlib.util
import multiprocessing
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import q4jit
from q4jit import errors
from q4jit.compilers import llvm
from q4jit.errors import CompileError, MissingNameError
from q4jit.frontend.containers import Misfit
from q4jit.targets import host_target
from tests.support import child

UNUSUAL: dict[type[Exception], Callable[[], Exception]] = {
    CompileError: lambda: CompileError(
        "clang",
        ("-O3",),
        "kernel.hip:1: no",
        "int x\n",
        command=("clang", "-O3"),
        repro=Path("folder"),
        origins={1: "kernel/gemv.hip.j2:12"},
    ),
    MissingNameError: lambda: MissingNameError("a.gguf", "tensor", "x", ["y"]),
    Misfit: lambda: Misfit("keys that are str or int", "the float 1.5"),
}
"""Errors whose constructors take more than a message."""

COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda error: pickle.loads(pickle.dumps(error)),
    "oldest pickle": lambda error: pickle.loads(pickle.dumps(error, protocol=0)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


OPTIONAL = {"q4jit.torch": "torch", "q4jit.transformers": "transformers"}
"""Packages of q4jit that need another package."""


def exceptions() -> Iterator[type[Exception]]:
    """Yield every exception and warning class that q4jit defines."""
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(q4jit.__path__, "q4jit.")
        if not found.name.endswith(("__main__", "_child", "hook-q4jit"))  # programs
        and (found.name not in OPTIONAL or importlib.util.find_spec(OPTIONAL[found.name]))
    ]
    for module in modules:
        for value in vars(module).values():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and issubclass(value, Exception):
                yield value


CLASSES = sorted(exceptions(), key=lambda kind: kind.__name__)


def test_all_exceptions_are_tested() -> None:
    assert {getattr(errors, name) for name in errors.__all__} <= set(CLASSES)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_copy_has_the_same_message_and_attributes(kind: type[Exception], how: str) -> None:
    error = UNUSUAL.get(kind, lambda: kind("what went wrong"))()
    error.add_note("a note")
    again = COPIES[how](error)
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.args == error.args
    assert vars(again) == vars(error)


def test_a_copy_can_be_given_other_origins() -> None:
    error = UNUSUAL[CompileError]()
    assert isinstance(error, CompileError)
    again = pickle.loads(pickle.dumps(error)).with_origins({1: "elsewhere"})
    assert again.origins == {1: "elsewhere"}
    assert error.origins == {1: "kernel/gemv.hip.j2:12"}


def fail(_: int) -> None:
    llvm.compile_object("not LLVM IR", host_target())


@pytest.mark.process
def test_an_error_in_a_worker_reaches_the_parent() -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as workers, pytest.raises(CompileError, match="llvmlite failed"):
        workers.apply_async(fail, (1,)).get(child.TIMEOUT_S)
