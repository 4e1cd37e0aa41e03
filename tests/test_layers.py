"""Each module imports only the layers below it, and the top level exports the public names."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import q4jit
from q4jit import errors
from tests.support.layers import LAYERS
from tests.support.paths import TESTS

PACKAGE = Path(str(q4jit.__file__)).parent


def module_names(package: Path) -> dict[str, Path]:
    """Return every module and package below the folder `package` by its dotted name."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        names[".".join(parts)] = path
    return names


def imported(package: str, path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full name of every import in a file, also inside functions.

    `from q4jit.a import b` gives q4jit.a.b, whether or not b is a module.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(level=0, module=str(module), names=names):
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in names)
            case ast.ImportFrom():
                raise AssertionError(f"{path}:{node.lineno}: a relative import")
            case ast.Call(func=ast.Name(id="import_module" | "__import__"), args=[first, *_]) | (
                ast.Call(func=ast.Attribute(attr="import_module"), args=[first, *_])
            ):
                if not isinstance(first, ast.Constant) or not isinstance(first.value, str):
                    raise AssertionError(f"{path}:{node.lineno}: an import of a computed name")
                yield node.lineno, first.value
            case _:
                pass


def edges(package: Path) -> dict[str, dict[str, int]]:
    """Return the modules of `package` that each of its modules imports, with the first line."""
    modules = module_names(package)
    graph: dict[str, dict[str, int]] = {name: {} for name in modules}
    for name, path in modules.items():
        for line, full in imported(package.name, path):
            top, *rest = full.split(".")
            if top != package.name:
                continue
            while rest and ".".join(rest) not in modules:
                rest.pop()
            graph[name].setdefault(".".join(rest) or "__init__", line)
    return graph


def violations(package: Path, layers: Iterable[str]) -> list[str]:
    """Return every import that goes upwards or in a circle, and every module without a layer."""
    height = {name: position for position, name in enumerate(layers)}
    graph = edges(package)
    problems = [f"{name}: in no layer" for name in graph if name.split(".")[0] not in height]
    for name, targets in graph.items():
        for target, line in targets.items():
            layer, other = name.split(".")[0], target.split(".")[0]
            same_package = layer == other and name != target
            if height.get(other, -1) >= height.get(layer, -1) and not same_package:
                problems.append(f"{name}, line {line}: imports {target}, which is above it")
    return problems + [
        f"{name}: is in a circle of imports" for name in graph if reaches(graph, name, name)
    ]


def reaches(graph: dict[str, dict[str, int]], start: str, goal: str) -> bool:
    """Whether imports lead from `start` to `goal` in one or more steps."""
    seen: set[str] = set()
    waiting = list(graph.get(start, ()))
    while waiting:
        name = waiting.pop()
        if name == goal:
            return True
        if name not in seen:
            seen.add(name)
            waiting.extend(graph.get(name, ()))
    return False


def test_every_module_imports_only_layers_below_it() -> None:
    assert violations(PACKAGE, LAYERS) == []


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return a package in good order: low, middle (a package of a and b), high."""
    root = tmp_path / "pkg"
    (root / "middle").mkdir(parents=True)
    for name in ("low", "middle/__init__", "middle/a"):
        (root / f"{name}.py").write_text("import os\n")
    (root / "middle" / "b.py").write_text("from pkg.middle.a import x\nfrom pkg import low\n")
    (root / "high.py").write_text("from pkg.middle import b\nimport pkg.low\n")
    (root / "__init__.py").write_text("from pkg.high import y\n")
    return root


ORDER = ("low", "middle", "high", "__init__")


def test_good_order_is_accepted(package: Path) -> None:
    assert violations(package, ORDER) == []


@pytest.mark.parametrize(
    ("module", "text", "target"),
    [
        ("low", "import pkg.middle.a", "middle.a"),
        ("low", "import pkg.high as h", "high"),
        ("low", "from pkg.high import y", "high"),
        ("low", "from pkg import high", "high"),
        ("low", "from pkg import y", "__init__"),
        ("low", "import pkg", "__init__"),
        ("low", "def f():\n    if 1:\n        from pkg import high", "high"),
        ("low", "import importlib\nimportlib.import_module('pkg.high')", "high"),
        ("middle/a", "from pkg.high import y", "high"),
    ],
)
def test_an_upward_import_is_found(package: Path, module: str, text: str, target: str) -> None:
    (package / f"{module}.py").write_text(text + "\n")
    line = text.count("\n") + 1
    upward = f"{module.replace('/', '.')}, line {line}: imports {target}, which is above it"
    assert upward in violations(package, ORDER)


def test_a_circle_inside_a_package_is_found(package: Path) -> None:
    (package / "middle" / "a.py").write_text("def f():\n    import pkg.middle.b\n")
    assert violations(package, ORDER) == [
        "middle.a: is in a circle of imports",
        "middle.b: is in a circle of imports",
    ]


def test_a_module_without_a_layer_is_found(package: Path) -> None:
    (package / "new.py").write_text("")
    assert violations(package, ORDER) == ["new: in no layer"]


@pytest.mark.parametrize("text", ["from . import high", "__import__('pkg.' + name)"])
def test_an_import_that_cannot_be_read_is_refused(package: Path, text: str) -> None:
    (package / "low.py").write_text(text + "\n")
    with pytest.raises(AssertionError, match=r"low\.py:1: "):
        violations(package, ORDER)


# --- rules that an order cannot state ----------------------------------------------------------


def importers(package: Path, layer: str) -> set[str]:
    """Return the layers whose modules import a module of `layer`."""
    return {
        name.split(".")[0]
        for name, targets in edges(package).items()
        for target in targets
        if target.split(".")[0] == layer
    } - {layer}


def test_back_ends_do_not_know_each_other() -> None:
    assert "hip" not in importers(PACKAGE, "cpu")
    assert "cpu" not in importers(PACKAGE, "hip")


def test_nothing_below_the_tools_imports_them() -> None:
    assert importers(PACKAGE, "tools") == {"__main__"}


NEUTRAL = [
    "pipeline",
    "dispatcher",
    *(f"dispatch/{p.stem}" for p in sorted((PACKAGE / "dispatch").glob("*.py"))),
]
NEUTRAL.remove("dispatch/policy")
"""Modules that serve every back end, and depend on none. The policy decides between them."""


def named_back_ends(path: Path) -> list[str]:
    """Return the lines where a module imports a back end or compares with the name of one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    compared = [
        constant
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare | ast.MatchValue)
        for constant in ast.walk(node)
        if isinstance(constant, ast.Constant) and constant.value in {"cpu", "hip"}
    ]
    return [
        *(f"line {line}: {name}" for line, name in imported("q4jit", path) if is_back_end(name)),
        *(f"line {constant.lineno}: compares with {constant.value!r}" for constant in compared),
    ]


def is_back_end(name: str) -> bool:
    """Whether an import is from the package of a back end."""
    return name.split(".")[:2] in (["q4jit", "cpu"], ["q4jit", "hip"])


@pytest.mark.parametrize("module", NEUTRAL)
def test_neutral_modules_name_no_back_end(module: str) -> None:
    assert named_back_ends(PACKAGE / f"{module}.py") == []


@pytest.mark.parametrize(
    "text",
    [
        "from q4jit.hip.schedule import grid",
        "from q4jit import cpu",
        "import q4jit.cpu",
        "if target.family == 'cpu': pass",
        "x = kind in ('hip', 'cuda')",
        "match kind:\n    case 'hip': pass",
    ],
)
def test_the_name_of_a_back_end_is_found(text: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(text + "\n")
    assert len(named_back_ends(path)) == 1
    path.write_text("from q4jit.cpus import x\nx = 'cpu'\nassert x == 'cpus'\n")
    assert named_back_ends(path) == []


# --- the tests ------------------------------------------------------------------------------------

_IMPORT_OF_TESTS = re.compile(
    r"^\s*(?:from|import) +(tests\b[\w.]*)(?: +import +(\w+))?", re.MULTILINE
)


def imports_of_test_modules(tests: Path) -> list[str]:
    """Return imports of test modules outside `tests.support`, also in programs that tests run."""
    return [
        f"{path.relative_to(tests)}: {match[0].strip()}"
        for path in sorted(tests.rglob("*.py"))
        for match in _IMPORT_OF_TESTS.finditer(path.read_text(encoding="utf-8"))
        if f"{match[1]}.{match[2]}".split(".")[1] != "support"
    ]


def test_no_test_module_imports_another() -> None:
    assert imports_of_test_modules(TESTS) == []


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("import numpy\nfrom tests.support import child\nfrom tests.support.hip import run\n", []),
        ("import tests.support.child\n", []),
        ("from tests.hip.test_gpu import run\n", ["from tests.hip.test_gpu import run"]),
        ("from tests import conftest\n", ["from tests import conftest"]),
        ("    import tests.test_layers\n", ["import tests.test_layers"]),
        ("X = '''\n    from tests.test_layers import x\n'''", ["from tests.test_layers import x"]),
    ],
)
def test_an_import_of_a_test_module_is_found(text: str, ends: list[str], tmp_path: Path) -> None:
    (tmp_path / "support").mkdir()
    for name in ("test_a.py", "support/b.py"):
        (tmp_path / name).write_text(text)
    imports = imports_of_test_modules(tmp_path)
    assert imports == [f"{name}: {end}" for name in ("support/b.py", "test_a.py") for end in ends]


# --- the top level --------------------------------------------------------------------------------


def test_all_is_the_public_names_of_the_top_level() -> None:
    public = {
        name
        for name in dir(q4jit)
        if not name.startswith("_") and not isinstance(getattr(q4jit, name), ModuleType)
    }
    assert set(q4jit.__all__) == public
    assert public == {
        "ExpertTensor",
        "QuantizedTensor",
        "get_num_threads",
        "load_gguf",
        "quantize",
        "set_num_threads",
        "specialize",
        "vecmat",
        *errors.__all__,
    }


@pytest.mark.parametrize("module", ["llvmlite", "jinja2"])
def test_importing_q4jit_imports_no_compiler(module: str) -> None:
    code = f"import sys, q4jit; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
