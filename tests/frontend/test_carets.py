"""The line of the user's code that a TraceError shows, and the columns that it marks."""

# ruff: noqa: PLW0108 - each lambda is a user's function, whose line the message shows

import importlib.util
import os
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q4jit import specialize
from tests.support.functions import random
from tests.support.tracing import K, refusal


def test_a_statement_over_several_lines() -> None:
    def function(x: Any, w: Any) -> Any:
        # fmt: off
        return (x @ w
                + float(
                    x,
                ))
        # fmt: on

    shown = refusal(function)
    assert shown.line.strip() == "+ float("
    assert shown.marked == "float("
    assert shown.origin.endswith(f"line {function.__code__.co_firstlineno + 3}, in function")


def test_the_caret_counts_characters_not_bytes() -> None:
    shown = refusal(lambda x, größe=1, 数="…": ("äöü €", np.sin(x)), random(2, K))
    assert shown.marked == "np.sin(x)"


def test_a_local_function_and_a_loop() -> None:
    def function(x: Any) -> Any:
        def inner(y: Any) -> Any:
            for part in y:
                x.append(part)
            return x

        return inner(x)

    shown = refusal(function)
    assert shown.line.strip() == "for part in y:"
    assert re.fullmatch("(for part in )?y:?", shown.marked)
    assert shown.origin.endswith("in inner")


def module_at(path: Path, text: str) -> types.ModuleType:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_helper_of_another_module(tmp_path: Path) -> None:
    helper = module_at(tmp_path / "helper.py", "def root(v):\n\treturn 1 + v ** 0.5 # tab\n")
    shown = refusal(lambda x: helper.root(x))
    assert shown.origin == f"  File {str(tmp_path / 'helper.py')!r}, line 2, in root"
    assert shown.marked == "v ** 0.5"


def test_a_folder_named_like_the_package_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames of q4jit and NumPy are skipped, but not those of a folder q4jit_plots."""
    from q4jit.frontend import carets

    monkeypatch.setattr(carets, "_NUMPY", f"{tmp_path / 'q4jit'}{os.sep}")
    helper = module_at(
        tmp_path / "q4jit_plots" / "helper.py", "def root(v):\n    return v ** 0.5\n"
    )
    assert refusal(lambda x: helper.root(x)).marked == "v ** 0.5"
    assert Path(carets._PACKAGE).name == "q4jit"
    assert carets._PACKAGE.endswith(os.sep)


def test_a_function_without_source() -> None:
    code = compile("\n\ndef made(x):\n    return float(x)\n", "<made>", "exec")
    space: dict[str, Any] = {}
    exec(code, space)
    shown = refusal(space["made"], random(2, K))
    assert shown.origin == "  File '<made>', line 4, in made"
    assert shown.line == shown.marked == ""


def test_a_function_without_positions() -> None:
    """Code compiled with -X no_debug_ranges has lines but no columns."""

    def function(x: Any) -> Any:
        return float(x)

    code = function.__code__
    lines_only = code.replace(co_linetable=_without_columns(code))
    shown = refusal(types.FunctionType(lines_only, globals()), random(2, K))
    assert shown.line.strip() == "return float(x)"
    assert shown.marked == ""


def _without_columns(code: types.CodeType) -> bytes:
    """Return a location table of the code's lines, without columns."""
    table, line = bytearray(), code.co_firstlineno
    for start, end, at in code.co_lines():
        units = (end - start) // 2
        delta = 0 if at is None else at - line
        line = line if at is None else at
        while units:
            size = min(units, 8)
            value = delta << 1 if delta >= 0 else (-delta << 1) | 1
            assert value < 64  # one byte of a variable-length number
            table += bytes([0x80 | 13 << 3 | size - 1, value])
            units, delta = units - size, 0
    return bytes(table)


def test_a_users_own_error_passes_through() -> None:
    def function(x: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        specialize(function)(random(2, K))
