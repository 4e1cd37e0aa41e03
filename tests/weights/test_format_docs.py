"""docs/formats.md and docs/adding-a-format.md agree with the descriptions and the schedules."""

import re

import pytest

from q4jit.weights import formats
from q4jit.weights.formats import FORMATS
from tests.support.format_table import format_table
from tests.support.golden import check_golden
from tests.support.paths import ROOT

FORMATS_PAGE = ROOT / "docs" / "formats.md"
ADDING = (ROOT / "docs" / "adding-a-format.md").read_text(encoding="utf-8")
MARK = "<!-- generated -->\n"


def test_the_table_of_kernels_is_what_the_schedules_choose(request: pytest.FixtureRequest) -> None:
    update = bool(request.config.getoption("--update-golden"))
    before, _, after = FORMATS_PAGE.read_text(encoding="utf-8").split(MARK)
    check_golden(FORMATS_PAGE, MARK.join([before, format_table(), after]), update=update)


def test_every_format_is_listed() -> None:
    page = FORMATS_PAGE.read_text(encoding="utf-8")
    (table,) = re.findall(r"\| format \| .*\n(?:\|.*\n)+", page)
    listed = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+(?:\.\d+)?) \|", table, re.MULTILINE)
    wanted = {
        (
            name,
            str(f.block_elements),
            str(f.block_bytes),
            f"{8 * f.block_bytes / f.block_elements:g}",
        )
        for name, f in FORMATS.items()
    }
    assert set(listed) == wanted


def test_the_readme_lists_every_format() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"multiply \| `quantize` \|\n\|---.*\n((?:\|.*\n)+)", readme)
    names = [name for row in table.splitlines() for name in row.split("|")[1].split(", ")]
    assert sorted(name.strip() for name in names) == sorted(FORMATS)


def test_the_example_is_the_description() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", ADDING, re.DOTALL)
    assert eval(example, vars(formats).copy()) == FORMATS["Q5_1"]
