"""Pages of mapped files: given back once they have been read, while tensors stay valid."""

import ctypes
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from q4jit import GGUFError, MissingNameError, QuantizedTensor, load_gguf
from q4jit.weights.formats import FORMATS
from q4jit.weights.gguf.file import GGUFFile
from q4jit.weights.layouts import GGUF, INTERLEAVED16, PLANAR, TILES16, pack, pack_experts
from q4jit.weights.mapped import DrainedColumns, give_back
from q4jit.weights.reference import random_weight
from q4jit.weights.stored import GgufBlocks
from tests.support.gguf_files import build, tensor
from tests.support.layouts import formats_and_layouts
from tests.support.memory import MB

LAYOUTS = (GGUF, INTERLEAVED16, PLANAR, TILES16)
K, N = 1024, 16384
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


def file_bytes_in_memory() -> int:
    """Return the bytes of mapped files that count as memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile:"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with two tensors in Q8_0 of 17 MB each, and a vector."""
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    raw = random_weight("Q8_0", K, N).raw
    kind = FORMATS["Q8_0"].ggml_type
    tensors = [tensor(name, (K, N), kind, i * raw.nbytes) for i, name in enumerate("ab")]
    tensors.append(tensor("v", (8,), 0, 2 * raw.nbytes))
    path.write_bytes(build((), tuple(tensors), raw.tobytes() * 2 + bytes(32)))
    return path


def matrix(file: GGUFFile, name: str) -> QuantizedTensor:
    w = file[name]
    assert isinstance(w, QuantizedTensor)
    return w


def without_pages(w: QuantizedTensor) -> int:
    """Give the pages of a tensor that was read back, and return `file_bytes_in_memory`."""
    before, stored = file_bytes_in_memory(), w._resident.stored
    assert isinstance(stored, GgufBlocks)
    give_back(stored.memory)
    after = file_bytes_in_memory()
    assert before - after > 0.99 * w.nbytes
    return after


@on_linux
def test_pages_of_a_tensor_are_given_back(model: Path) -> None:
    file = load_gguf(model)
    expected = [matrix(file, name).raw.tobytes() for name in "ab"]
    size, before = len(expected[0]), file_bytes_in_memory()
    file.give_back("a")
    assert before - file_bytes_in_memory() > 0.99 * size
    file.give_back("b")
    assert before - file_bytes_in_memory() > 1.99 * size
    assert [matrix(file, name).raw.tobytes() for name in "ab"] == expected
    file.give_back("v")
    np.testing.assert_array_equal(file["v"], np.zeros(8))


def test_names_and_files_that_cannot_be_given_back(model: Path) -> None:
    file = load_gguf(model)
    with pytest.raises(MissingNameError, match="no tensor named 'c'"):
        file.give_back("c")
    file.close()
    with pytest.raises(GGUFError, match="the file is closed"):
        file.give_back("a")


@on_linux
@pytest.mark.parametrize("layout", LAYOUTS)
def test_repacking_gives_pages_back_as_it_goes(
    model: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = matrix(load_gguf(model), "a")
    expected = pack(w.block_format, layout, w.raw)
    before, seen, give = without_pages(w), [], DrainedColumns._give_back

    def watched(columns: DrainedColumns, end: int) -> None:
        seen.append(file_bytes_in_memory())
        give(columns, end)

    monkeypatch.setattr(DrainedColumns, "_give_back", watched)
    out = w._resident.made(layout, np.zeros(expected.nbytes, np.uint8))
    assert len(seen) > 3
    assert max(seen) - before < 8 * MB
    assert file_bytes_in_memory() - before < MB
    assert out.tobytes() == expected.tobytes()


@on_linux
def test_finding_out_about_scales_gives_pages_back(model: Path) -> None:
    w = matrix(load_gguf(model), "b")
    assert w.raw.any()
    before = without_pages(w)
    assert w.has_finite_scales
    assert file_bytes_in_memory() - before < MB


def test_memory_that_is_no_file_is_left_alone() -> None:
    give_back(memoryview(b"bytes"))
    give_back(memoryview(b""))
    with mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE) as own:  # its pages would become zeros
        own[:4] = b"text"
        give_back(memoryview(own))
        give_back(memoryview(own).toreadonly())
        assert own[:4] == b"text"


def test_what_was_written_to_a_private_map_is_kept(model: Path) -> None:
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as own:
        own[:4] = b"text"
        give_back(memoryview(own).toreadonly())
        assert own[:4] == b"text"


@on_linux
def test_locked_pages_stay(model: Path) -> None:
    w = matrix(load_gguf(model), "a")
    raw, lock = w.raw, ctypes.CDLL(None, use_errno=True)
    page = raw.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    if lock.mlock(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE)):
        pytest.skip(f"mlock: {os.strerror(ctypes.get_errno())}")
    stored = w._resident.stored
    assert isinstance(stored, GgufBlocks)
    give_back(stored.memory)
    assert w.has_finite_scales


# --- memory that is given -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout"), formats_and_layouts(LAYOUTS))
def test_packing_into_memory(name: str, layout: str) -> None:
    fmt = FORMATS[name]
    for k, n in ((max(fmt.block_elements, 32), 5), (3 * max(fmt.block_elements, 32), 37)):
        raw = random_weight(name, k, n).raw
        expected = pack(fmt, layout, raw)
        for offset in (0, 1):
            out = np.full(expected.nbytes + 1, 0xAA, np.uint8)[offset : offset + expected.nbytes]
            assert pack(fmt, layout, raw, out) is out
            assert out.flags.writeable
            assert out.tobytes() == expected.tobytes()
        columns = DrainedColumns(memoryview(raw.tobytes()), raw.shape)
        assert pack(fmt, layout, columns).tobytes() == expected.tobytes()
        experts = DrainedColumns(memoryview(raw.tobytes() * 3), (3, *raw.shape))
        assert pack_experts(fmt, layout, experts).tobytes() == expected.tobytes() * 3
