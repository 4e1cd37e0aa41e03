"""Modules, classes and functions stay short enough to read in one go."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import q4jit

MODULE_LINES = 500
CLASS_LINES = 250
FUNCTION_LINES = 60

EXCEPTIONS: dict[str, str] = {}
"""Names that may be longer, each with the reason."""

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Yield every class and function below `node` with its full name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield f"{prefix}{child.name}", child
            yield from definitions(child, f"{prefix}{child.name}.")
        else:
            yield from definitions(child, prefix)


def too_long(package: Path) -> dict[str, str]:
    """Return the size of each module, class and function over its limit, in words."""
    sizes = {}
    for path in sorted(package.rglob("*.py")):
        module, text = path.relative_to(package).as_posix(), path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > MODULE_LINES:
            sizes[module] = f"{lines} lines, the limit is {MODULE_LINES}"
        for name, node in definitions(ast.parse(text)):
            limit = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
            assert node.end_lineno is not None
            if (lines := node.end_lineno - node.lineno + 1) > limit:
                sizes[f"{module}: {name}"] = f"{lines} lines, the limit is {limit}"
    return sizes


def problems(package: Path, exceptions: dict[str, str]) -> list[str]:
    """Return a line for each name that is too long, and for each unused exception."""
    sizes = too_long(package)
    longer = [f"{name} has {size}" for name, size in sizes.items() if name not in exceptions]
    return longer + [f"{name} is short: no exception" for name in exceptions.keys() - sizes.keys()]


def test_everything_is_short() -> None:
    assert q4jit.__file__ is not None
    assert problems(Path(q4jit.__file__).parent, EXCEPTIONS) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = 1\n" * 500, None),
        ("x = 1\n" * 501, "a/b.py has 501 lines, the limit is 500"),
        ("class C:\n" + "    x = 1\n" * 249, None),
        ("class C:\n" + "    x = 1\n" * 250, "a/b.py: C has 251 lines, the limit is 250"),
        ("@f\ndef f():\n" + "    x = 1\n" * 59, None),
        ("if 1:\n    def f():\n" + "        x\n" * 60, "a/b.py: f has 61 lines, the limit is 60"),
        (
            "class C:\n  async def f(self):\n" + "    x = 1\n" * 60,
            "a/b.py: C.f has 61 lines, the limit is 60",
        ),
    ],
)
def test_excess_length_is_reported(text: str, problem: str | None, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text(text)
    assert problems(tmp_path, {}) == ([problem] if problem else [])
    name = problem.partition(" has ")[0] if problem else "a/b.py"
    allowed = problems(tmp_path, {name: "for a test"})
    assert allowed == ([] if problem else ["a/b.py is short: no exception"])
