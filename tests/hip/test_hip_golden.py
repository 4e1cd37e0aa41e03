"""Generated HIP texts to read: a change of what is generated shows as a change of these files.

`pytest tests/hip/test_hip_golden.py --update-golden` writes them anew; look at the difference. Of
each text the part below its prelude is kept; preludes and matrix units have files of their own.
"""

import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable

import jinja2
import pytest

from q4jit.hip.templates import environment
from q4jit.hip.variables import variables
from q4jit.plan.kernels import Source
from q4jit.plan.options import PlanOptions
from tests.support.compilers import compiler_for
from tests.support.hip import hip_plan
from tests.support.hip_cases import (
    GOLDEN,
    RECORDED,
    Case,
    Generic,
    case,
    product,
    tensor,
    zeros,
)
from tests.support.paths import ROOT

BODY = "\nconstexpr int BLOCK_SIZE = "  # begins where prelude and matrix unit end

Golden = Callable[[str, str], None]
EACH = [pytest.param(arch, kernel, id=f"{kernel.name}_{arch}") for arch, kernel in GOLDEN]


def parts(source: Source) -> tuple[str, str, str]:
    """The comment that opens a text, its prelude with the matrix unit, and what is below."""
    comment, _, rest = source.text.partition("\n\n")
    head, _, body = rest.partition(BODY)
    return comment + "\n", head, BODY + body


@pytest.mark.parametrize(("arch", "kernel"), EACH)
def test_text(golden: Golden, arch: str, kernel: Case | Generic) -> None:
    for source in kernel.sources(arch):
        comment, _, body = parts(source)
        golden(comment + body, "_rows.hip" if source.symbol.endswith("_rows") else ".hip")


@pytest.mark.ratchet
@pytest.mark.parametrize(("arch", "kernel"), EACH)
def test_texts_are_taken_by_their_compilers(arch: str, kernel: Case | Generic) -> None:
    for source in kernel.sources(arch):
        assert compiler_for(arch).compile_object(source.text, source.target)


@pytest.mark.parametrize(
    ("platform", "arch"),
    [("amd", "gfx90a"), ("amd", "gfx1100"), ("nvidia", "sm_90"), ("host", "gfx1201")],
)
def test_prelude(golden: Golden, platform: str, arch: str) -> None:
    """All three preludes, AMD's for waves of 64 and of 32, and all four matrix units."""
    tile = case("tile", product, zeros(64, 32), tensor("Q4_0", 32, 1))
    _, head, _ = parts(tile.sources(arch, platform)[-1])
    golden(head, ".hip")


@pytest.mark.parametrize(("arch", "kernel"), EACH)
def test_the_kernel_is_the_same_text_on_every_platform(arch: str, kernel: Case | Generic) -> None:
    for platforms in zip(
        *(kernel.sources(arch, p) for p in ("amd", "nvidia", "host")), strict=True
    ):
        amd, nvidia, host = (parts(source)[2] for source in platforms)
        launched_by_tests = '\nextern "C" '
        assert amd == nvidia == host.partition(launched_by_tests)[0]


def test_one_text_serves_all_archs_of_a_kind() -> None:
    for kernel in RECORDED:
        texts = [kernel.sources(arch) for arch in ("gfx1100", "gfx1101")]
        for one, other in zip(*texts, strict=True):
            assert one.text.replace("gfx1100", "gfx1101") == other.text


def digest() -> str:
    """A hash over many texts."""
    texts = [s.text for arch, kernel in GOLDEN for s in kernel.sources(arch)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def test_texts_are_the_same_in_every_process() -> None:
    program = "from tests.hip.test_hip_golden import digest; print(digest(), end='')"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == digest(), done.stderr


@pytest.mark.parametrize("missing", ["arch", "kernel", "needs", "parameters", "products", "x"])
def test_a_name_that_no_one_defined_is_an_error(missing: str) -> None:
    args = (zeros(1, 64), tensor("Q4_0", 64, 8))
    plan = hip_plan(product, "hip:gfx1100", args, PlanOptions())
    context = variables(plan, plan.kernels[0]) | {"platform": "amd"}
    template = environment().get_template("part/frame.hip.j2")
    assert template.render(context)
    del context[missing]
    with pytest.raises(jinja2.UndefinedError, match=f"'{missing}' is undefined"):
        template.render(context)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1100", "gfx1201", "sm_90"])
def test_texts_are_tidy(arch: str) -> None:
    for kernel in (*RECORDED, *(kernel for _, kernel in GOLDEN)):
        for source in kernel.sources(arch):
            lines = source.text.split("\n")
            assert lines[-1] == "", "a text ends with its last line's end"
            for number, (line, after) in enumerate(itertools.pairwise(lines), 1):
                where = f"{kernel.name}:{number}: {line}"
                assert len(line) <= 120, where
                assert line == line.rstrip(), where
                assert "\t" not in line, where
                assert line or after, f"{where}: two blank lines, or one at the end"
                assert not line.startswith("#include"), where
            assert not re.search(r"\{\n\n|\n\n *\}", source.text), "a blank line inside braces"
