"""The limits of a CPU: reads and multiply-adds."""

import dataclasses
import itertools
import re

import numpy as np
import pytest

from q4jit.backends import find_backend
from q4jit.targets import find_target
from q4jit.tools.compare import limits
from tests.support.tools import lack


@pytest.mark.parametrize("variant", limits.READ_VARIANTS)
def test_a_read_reads_every_word(variant: tuple[int, int]) -> None:
    load = limits.reader(find_target("cpu"), *variant)
    data = np.random.default_rng(0).integers(0, 1 << 32, 3 * limits.CHUNK_BYTES // 4, np.uint32)
    xor = np.zeros(1, np.uint32)
    for passes, wanted in (
        (1, np.bitwise_xor.reduce(data)),
        (2, 0),
        (3, np.bitwise_xor.reduce(data)),
    ):
        load(data.ctypes.data, data.nbytes, passes, xor.ctypes.data)
        assert xor[0] == wanted


@pytest.mark.parametrize("precision", ["f32", "i8"])
def test_a_peak_checks_its_sums(precision: str) -> None:
    peak = limits.peak(find_target("cpu"), precision)
    if peak is None:
        lack("an instruction that sums products of int8")
    assert peak.run()[1]
    broken = dataclasses.replace(peak, _kernel=lambda sums, factors, steps: None)
    assert not broken.run()[1]


@pytest.mark.parametrize(
    ("name", "more", "precision", "instruction", "vectors"),
    [
        ("cpu:x86-64-v4", "", "f32", r"vfmadd231ps\t%zmm", 24),
        ("cpu:x86-64-v4", "avx512vnni", "i8", r"vpdpbusd\t%zmm", 24),
        ("cpu:x86-64-v3", "", "f32", r"vfmadd\d+ps\t%ymm", 12),
        ("cpu:x86-64-v3", "avxvnni", "i8", r"vpdpbusd\t%ymm", 12),
        ("cpu:x86-64", "", "f32", r"mulps", 12),
        ("cpu:aarch64", "", "f32", r"fmla", 24),
        ("cpu:aarch64", "dotprod", "i8", r"sdot", 24),
    ],
)
def test_the_loop_of_a_peak_only_multiplies_and_adds(
    name: str, more: str, precision: str, instruction: str, vectors: int
) -> None:
    """The innermost loop loads nothing, copies nothing, and has every multiply-add."""
    target = find_target(name)
    target = dataclasses.replace(target, features=target.features | set(more.split()))
    kind = limits.instruction(target, precision)
    assert kind is not None
    text = limits.peak_text(target, kind, vectors)
    assembly = find_backend(target).compiler(target).compile_assembly(text, target)
    blocks = re.split(r"^\.LBB.*:.*$", assembly, flags=re.MULTILINE)
    loop = next(part for part in reversed(blocks) if len(re.findall(instruction, part)) >= vectors)
    lines = [line.strip() for line in loop.splitlines() if re.match(r"\t[^.]", line)]
    body = list(itertools.takewhile(lambda line: not re.match(r"j|b\.", line), lines))
    counted = [line for line in body if re.match(rf"({{vex}}\t)?{instruction}", line)]
    assert len(counted) % vectors == 0
    rest = {line.split()[0] for line in body if line not in counted}
    assert rest <= {*"addps incq decq cmpq addq subs add cmp".split()}


def test_there_is_no_int8_peak_without_an_instruction() -> None:
    assert limits.peak(find_target("cpu:x86-64-v3"), "i8") is None
