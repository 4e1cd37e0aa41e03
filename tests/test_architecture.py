"""docs/architecture.md: its folder tree and its import order match the code."""

import re
from collections.abc import Iterator

from tests.support.layers import LAYERS
from tests.support.paths import ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def modules_of_the_tree() -> Iterator[str]:
    """Yield the modules that the tree of q4jit/ lists, as `cpu/lower`, in its order."""
    tree = TEXT[TEXT.index("q4jit/\n") :].partition("```")[0]
    folders: list[str] = []
    for line in tree.splitlines()[1:]:
        entry = re.match(r"((?:│   |    )*)(?:├── |└── )([\w-]+)(/|\.py)", line)
        if entry is None:
            continue
        depth = len(entry[1]) // 4
        del folders[depth:]
        if entry[3] == "/":
            folders.append(entry[2])
        else:
            yield "/".join([*folders, entry[2]])


def test_the_tree_lists_every_module() -> None:
    package = ROOT / "q4jit"
    paths = (path.relative_to(package).with_suffix("") for path in package.rglob("*.py"))
    there = {str(path) for path in paths if path.name != "__init__"}
    assert sorted(modules_of_the_tree()) == sorted(there - {"__main__"})


def test_the_order_of_imports_is_that_of_the_test() -> None:
    order = (
        TEXT[TEXT.index("Each module or package may import") :]
        .split("```")[1]
        .removeprefix("text\n")
    )
    assert re.findall(r"\w+", order) == list(LAYERS[:-2])
