"""Generated HIP texts as files: a change of the generator shows as a change of these files.

`pytest tests/hip/test_hip_golden.py --update-golden` writes them again; review the difference. The
files hold the texts below their preludes; preludes and matrix units have files of their own.
"""

import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Final

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

PLATFORMS = ("amd", "nvidia", "host")
# Begins where the host's text tells the tests how to launch the kernel.
FOR_THE_HOST = re.compile(r'\nextern "C" (?=void \w+_host\(|\{\nextern const int host_)')

Golden = Callable[[str, str], None]
EACH = [pytest.param(arch, kernel, id=f"{kernel.name}_{arch}") for arch, kernel in GOLDEN]


def parts(source: Source) -> tuple[str, str, str]:
    """Return the head comment of a text, its prelude with the matrix unit, and the rest."""
    comment, _, rest = source.text.partition("\n\n")
    head, _, body = rest.partition(BODY)
    return comment + "\n", head, BODY + body


@pytest.mark.parametrize(("arch", "kernel"), EACH)
def test_text(golden: Golden, arch: str, kernel: Case | Generic) -> None:
    for source in kernel.sources(arch):
        comment, _, body = parts(source)
        part = next((p for p in ("_rows", "_splits", "_sort") if source.symbol.endswith(p)), "")
        golden(comment + body, f"{part}.hip")


@pytest.mark.ratchet
@pytest.mark.parametrize(("arch", "kernel"), EACH)
def test_compilers_accept_the_texts(arch: str, kernel: Case | Generic) -> None:
    for source in kernel.sources(arch):
        assert compiler_for(arch).compile_object(source.text, source.target)


@pytest.mark.parametrize(
    ("platform", "arch"),
    [("amd", "gfx90a"), ("amd", "gfx1100"), ("nvidia", "sm_90"), ("host", "gfx1201")],
)
def test_prelude(golden: Golden, platform: str, arch: str) -> None:
    """Check all three preludes, AMD's for waves of 64 and of 32, and all four matrix units."""
    tile = case("tile", product, zeros(64, 32), tensor("Q4_0", 32, 1))
    _, head, _ = parts(tile.sources(arch, platform)[-1])
    golden(head, ".hip")


@pytest.mark.parametrize(("arch", "kernel"), [p for p in EACH if "warpgroup" not in str(p.id)])
def test_the_kernel_is_the_same_text_on_every_platform(arch: str, kernel: Case | Generic) -> None:
    """Except where four waves multiply together: only one platform has an instruction for that."""
    for sources in zip(*(kernel.sources(arch, p) for p in PLATFORMS), strict=True):
        amd, nvidia, host = (parts(source)[2] for source in sources)
        assert amd == nvidia == FOR_THE_HOST.split(host)[0]


def test_one_text_serves_all_archs_of_a_kind() -> None:
    for kernel in RECORDED:
        texts = [kernel.sources(arch) for arch in ("gfx1100", "gfx1101")]
        for one, other in zip(*texts, strict=True):
            assert one.text.replace("gfx1100", "gfx1101") == other.text


_DECLARED: Final = re.compile(
    r"^ *(?:static )?constexpr [\w ]+? (\w+) ="  # a constant
    r"|^ *DEVICE [^(=]*?(\w+)\("  # a function
    r"|^    (?:    )?u\d\w* (\w+)[;[]",  # a member
    re.MULTILINE,
)


def unused(source: Source) -> set[str]:
    """Return the constants, functions and members below the prelude that nothing uses."""
    code = re.sub(r"//.*", "", parts(source)[2])
    uses = Counter(re.findall(r"\w+", code))
    declared = {name for names in _DECLARED.findall(code) for name in names if name}
    return {name for name in declared if uses[name] == 1}


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1030", "gfx1100", "gfx1201", "sm_90"])
def test_texts_declare_nothing_that_they_do_not_use(arch: str) -> None:
    kernels = [*(k for a, k in GOLDEN if a == arch), *RECORDED]
    sources = [source for kernel in kernels for source in kernel.sources(arch)]
    assert not {source.symbol: unused(source) for source in sources if unused(source)}


def test_an_unused_member_is_found() -> None:
    (source,) = GOLDEN[0][1].sources(GOLDEN[0][0])
    assert not unused(source)
    added = source.text.replace("struct Stored {", "static constexpr int N = 1;\n struct Stored {")
    assert unused(replace(source, text=added)) == {"N"}


def digest() -> str:
    """Return a hash of many texts."""
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
def test_an_undefined_name_is_an_error(missing: str) -> None:
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
