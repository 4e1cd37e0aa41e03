"""Memory of a process while it prepares and multiplies weights, and after it drops them."""

import sys
from pathlib import Path

import pytest

from tests.support import child

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
    pytest.mark.process,
]

MB = 1 << 20

MEASURE = """
import gc, mmap
import numpy as np
from q4jit import QuantizedTensor, specialize

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field + ":"))

def map_file(path):
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

def blocks(k, n):
    # Q4_0 with scales of 1.0 and codes of 8, which mean 0
    block = np.full((1, 18), 0x88, np.uint8)
    block[0, :2] = 0x00, 0x3C
    return np.broadcast_to(block, (n * k // 32, 18)).tobytes()

@specialize
def product(x, w):
    return x @ w

def run(w):
    x = np.ones((2, w.shape[0]), np.float32)
    assert not product(x, w).any()
    return x
"""


@pytest.mark.parametrize("source", ["bytes", "map"])
def test_how_often_a_large_product_holds_its_blocks(source: str, tmp_path: Path) -> None:
    # repacked, and in the user's buffer; the pages of a file are given back
    times = 2 if source == "bytes" else 1
    k, n = 4096, 14336
    size_bytes = n * k // 32 * 18
    program = f"""
    run(QuantizedTensor.from_bytes(blocks({k}, 64), shape=({k}, 64), format="Q4_0"))
    raw = blocks({k}, {n}) if {source == "bytes"} else map_file({str(tmp_path / "blocks")!r})
    gc.collect()
    before = status("VmRSS") - ({size_bytes} if {source == "bytes"} else 0)
    w = QuantizedTensor.from_bytes(raw, shape=({k}, {n}), format="Q4_0")
    for m in (1, 2, 64):
        assert not product(np.ones((m, {k}), np.float32), w).any()
    print(status("VmHWM") - before)
    """
    if source == "map":
        child.run(
            f"open({str(tmp_path / 'blocks')!r}, 'wb').write(blocks({k}, {n}))", prelude=MEASURE
        )
    held = int(child.run(program, prelude=MEASURE))
    assert (times - 0.1) * size_bytes < held, "the measurement misses the blocks"
    assert held < times * size_bytes + 16 * MB, f"{held / MB:.0f} MB for {size_bytes / MB:.0f} MB"


def test_a_hundred_cycles_leave_memory_level() -> None:
    program = """
    raw = blocks(1024, 4096)
    for cycle in range(100):
        run(QuantizedTensor.from_bytes(raw, shape=(1024, 4096), format="Q4_0"))
        if cycle == 9:
            gc.collect()
            before = status("VmRSS")
    gc.collect()
    print(status("VmRSS") - before)
    """
    growth = int(child.run(program, prelude=MEASURE))
    # if each of 90 cycles kept its repacked blocks, they would hold 200 MB
    assert growth < 4 * MB, f"{growth / MB:.1f} MB more after 90 cycles"


def test_functions_that_are_dropped_release_their_code() -> None:
    program = """
    w = QuantizedTensor.from_bytes(blocks(256, 64), shape=(256, 64), format="Q4_0")
    x = np.ones((1, 256), np.float32)

    def cycles(count):
        for _ in range(count):
            specialize(lambda x, w: x @ w)(x, w)
        gc.collect()
        return status("VmRSS")

    before = cycles(20)
    print(cycles(200) - before)
    """
    growth = int(child.run(program, prelude=MEASURE))
    # 200 functions that are kept hold 18 MB
    assert growth < 8 * MB, f"{growth / MB:.1f} MB more after 200 functions"
