"""Plain English and one meaning per name, as far as a script can tell."""

import ast
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.prose import files, problems

GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "root", ["q4jit", "templates", "tests", "docs", "examples", "README.md", "CONTRIBUTING.md"]
)
def test_no_old_wording_is_left(root: str) -> None:
    paths = [
        p
        for p in files([ROOT / root])
        if p.name not in {"prose.py", "test_prose.py"} and "golden" not in p.parts
    ]
    assert paths
    assert [problem for path in paths for problem in problems(path)] == []


def test_old_wording_is_recognised(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        '"""What is here is listed."""\n'
        "found = 1  # as many as stand in the file\n"
        'raise ValueError(f"{found}: found 2, accepted is 3")\n',
        encoding="utf-8",
    )
    assert len(list(problems(module))) >= 4


def test_every_class_has_a_name_of_its_own() -> None:
    modules = defaultdict(list)
    for path in sorted((ROOT / "q4jit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                modules[node.name].append(path.name)
    assert {name: paths for name, paths in modules.items() if len(paths) > 1} == {}


def test_the_glossary_defines_each_word_once() -> None:
    words = [
        word
        for cell in re.findall(r"^\| ([^|]+) \|", GLOSSARY, re.MULTILINE)
        if cell not in {"word", "---"}
        for word in cell.replace("`", "").split(", ")
    ]
    assert len(words) > 50
    assert [word for word, count in Counter(words).items() if count > 1] == []
