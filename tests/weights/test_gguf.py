"""The GGUF reader: what it reads, what it refuses, and that damage never does worse than that."""

import gc
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import quants
from numpy.typing import NDArray

from q4jit.errors import GGUFError, MissingNameError
from q4jit.weights import layouts
from q4jit.weights.formats import FORMATS
from q4jit.weights.gguf.file import GGUFFile, load_gguf
from q4jit.weights.layouts import INTERLEAVED16
from q4jit.weights.tensor import QuantizedTensor
from tests.support.tools import model_file

MB = 1 << 20
HUGE = [2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**32, 2**61 + 1]
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SIZES = {U8: 1, I8: 1, U16: 2, I16: 2, U32: 4, I32: 4, F32: 4, BOOL: 1, U64: 8, I64: 8, F64: 8}


# Files written byte by byte


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + u32(kind) + value


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return u32(kind) + u64(count) + data


def tensor(
    name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0, rank: int | None = None
) -> bytes:
    sizes = b"".join(u64(size) for size in dims)
    return text(name) + u32(len(dims) if rank is None else rank) + sizes + u32(kind) + u64(offset)


def build(
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: bytes = u32(3),
    tensor_count: int | None = None,
    key_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    head = magic + version
    head += u64(len(tensors) if tensor_count is None else tensor_count)
    head += u64(len(keys) if key_count is None else key_count)
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data if tensors else head


@pytest.fixture
def load(tmp_path: Path) -> Callable[[bytes], GGUFFile]:
    """`load(data)` opens a file of these bytes."""
    path = tmp_path / "model.gguf"

    def write_and_load(data: bytes) -> GGUFFile:
        path.unlink(missing_ok=True)  # a mapped file must not be overwritten
        path.write_bytes(data)
        return load_gguf(path)

    return write_and_load


# A small file of every kind of thing, written by gguf


def stored_rows(name: str, n: int = 5, k: int = 256) -> NDArray[Any]:
    rng = np.random.default_rng(len(name) + n)
    if name == "Q6_K":
        rows = rng.integers(0, 256, (n, k // 256, 210), np.uint8)
        rows[..., 208:] = 0x00, 0x34
        return rows.reshape(n, -1)
    return quants.quantize(
        rng.standard_normal((n, k)).astype(np.float32), gguf.GGMLQuantizationType[name]
    )


def write_small(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("n.u8", 255)
    writer.add_int8("n.i8", -128)
    writer.add_uint16("n.u16", 65535)
    writer.add_int16("n.i16", -32768)
    writer.add_uint32("n.u32", 2**32 - 1)
    writer.add_int32("n.i32", -(2**31))
    writer.add_uint64("n.u64", 2**64 - 1)
    writer.add_int64("n.i64", -(2**63))
    writer.add_float32("n.f32", 0.1)
    writer.add_float64("n.f64", 0.1)
    writer.add_bool("n.true", True)
    writer.add_bool("n.false", False)
    writer.add_string("n.text", "ein Wört\n☃")
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1.5])
    writer.add_array("a.bools", [True, False, True])
    writer.add_array("a.texts", ["", "ä", "token " * 20])
    for name in FORMATS:
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(f"{name}.weight", stored_rows(name), raw_dtype=kind)
    writer.add_tensor("norm", np.arange(7, dtype=np.float32))
    writer.add_tensor("half", np.arange(-3, 4, dtype=np.float16))
    writer.add_tensor(
        "vector.q8", stored_rows("Q8_0", 1)[0], raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("experts", np.zeros((2, 3, 4), np.float32))
    writer.add_tensor("foreign", np.zeros((2, 3), np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_small(path)
    return path


def matrix(model: Mapping[str, Any], name: str) -> QuantizedTensor:
    found = model[name]
    assert isinstance(found, QuantizedTensor)
    return found


def vector(model: Mapping[str, Any], name: str) -> NDArray[np.float32]:
    found = model[name]
    assert isinstance(found, np.ndarray)
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_is_a_quantized_tensor(small: Path, name: str) -> None:
    model = load_gguf(small)
    w = matrix(model, f"{name}.weight")
    assert (w.shape, w.format) == ((256, 5), name)
    stored = np.ascontiguousarray(stored_rows(name))
    np.testing.assert_array_equal(w.raw, stored.view(np.uint8))
    np.testing.assert_array_equal(
        w.dequantize().T, quants.dequantize(stored, gguf.GGMLQuantizationType[name])
    )
    assert model[f"{name}.weight"] is w


def test_a_vector_is_a_read_only_f32_array(small: Path) -> None:
    model = load_gguf(small)
    assert vector(model, "norm").tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert vector(model, "half").tolist() == [-3, -2, -1, 0, 1, 2, 3]
    wanted = quants.dequantize(stored_rows("Q8_0", 1), gguf.GGMLQuantizationType.Q8_0)[0]
    np.testing.assert_array_equal(vector(model, "vector.q8"), wanted)
    for name in ("norm", "half", "vector.q8"):
        assert vector(model, name).dtype == np.float32
        assert vector(model, name).flags.aligned
        with pytest.raises(ValueError, match="read-only"):
            vector(model, name)[0] = 1


def test_metadata_are_python_values(small: Path) -> None:
    metadata = load_gguf(small).metadata
    scalars = {
        "general.architecture": "llama",
        "n.u8": 255,
        "n.i8": -128,
        "n.u16": 65535,
        "n.i16": -32768,
        "n.u32": 2**32 - 1,
        "n.i32": -(2**31),
        "n.u64": 2**64 - 1,
        "n.i64": -(2**63),
        "n.f32": float(np.float32(0.1)),
        "n.f64": 0.1,
        "n.true": True,
        "n.false": False,
        "n.text": "ein Wört\n☃",
        "a.texts": ("", "ä", "token " * 20),
    }
    for name, wanted in scalars.items():
        found = metadata[name]
        assert found == wanted
        assert type(found) is type(wanted)
    arrays = {"a.ints": [1, -2, 3], "a.floats": [0.5, -1.5], "a.bools": [True, False, True]}
    for name, values in arrays.items():
        found = metadata[name]
        assert isinstance(found, np.ndarray)
        assert found.tolist() == values
        assert not found.flags.writeable
    assert list(metadata)[0] == "general.architecture"  # noqa: RUF015 - the file's order
    assert set(metadata) >= set(scalars) | set(arrays)
    assert repr(metadata).endswith(f"{len(metadata)} keys>")


def test_a_file_is_a_mapping(small: Path) -> None:
    model = load_gguf(str(small))
    assert list(model)[:2] == ["F32.weight", "F16.weight"]
    assert len(model) == len(FORMATS) + 5
    assert "norm" in model
    assert "foreign" in model
    assert "nothing" not in model
    assert model.get("nothing") is None
    assert model.metadata.get("nothing", 3) == 3
    assert repr(model) == f"<GGUFFile {small}: 11 tensors, {len(model.metadata)} keys>"


def test_a_name_that_is_not_there(small: Path) -> None:
    model = load_gguf(small)
    for ask, message in (
        (lambda: model["norms"], f"{small}: no tensor named 'norms' (11 tensors). Did you mean"),
        (lambda: model["f16.weight"], ". Did you mean 'F16.weight'"),
        (lambda: model["~"], "; the first are 'F32.weight', 'F16.weight', "),
        (lambda: model.metadata["general.arch"], "keys). Did you mean 'general.architecture'"),
    ):
        with pytest.raises(KeyError) as caught:
            ask()
        assert isinstance(caught.value, MissingNameError)
        assert message in str(caught.value)
    one = MissingNameError("f", "tensor", "~", ["a"])
    assert str(one) == "f: no tensor named '~' (1 tensor: 'a')"
    assert str(MissingNameError("f", "key", 3, [])) == "f: no key named 3 (0 keys)"


def test_a_tensor_that_cannot_be_read_leaves_the_others(small: Path) -> None:
    model = load_gguf(small)
    with pytest.raises(
        GGUFError,
        match=r"small\.gguf: tensor 'foreign' at byte \d+: found format I32 \(ggml type 26\), "
        r"accepted is F32, F16, Q4_0, Q4_1, Q8_0, Q6_K",
    ):
        model["foreign"]
    with pytest.raises(
        GGUFError, match=r"'experts' at byte \d+: found dimensions \(4, 3, 2\), accepted is one or"
    ):
        model["experts"]
    assert vector(model, "norm").size == 7


def test_a_format_of_unknown_size_is_placed_all_the_same(
    load: Callable[[bytes], GGUFFile],
) -> None:
    model = load(build(tensors=(tensor("t", (2**40, 7), 77),), data=bytes(32)))
    with pytest.raises(
        GGUFError, match=r"tensor 't' at byte 24: found format unknown \(ggml type 77\)"
    ):
        model["t"]
    with pytest.raises(GGUFError, match=r"tensor 't' at byte 24: found data from byte 128 to"):
        load(build(tensors=(tensor("t", (1,), 77, 64),), data=bytes(64)))


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_written_byte_by_byte(load: Callable[[bytes], GGUFFile], version: int) -> None:
    block = bytes.fromhex("0038" + "f0e1d2c3b4a5968778695a4b3c2d1e0f")
    model = load(
        build(
            keys=(key("general.alignment", U32, u32(8)), key("k", STRING, text("v"))),
            tensors=(tensor("w", (32, 2), 2, 8), tensor("v", (2,), 0, 0)),
            data=struct.pack("<2f", 1.5, -2) + 2 * block + bytes(4),
            version=u32(version),
            alignment=8,
        )
    )
    assert dict(model.metadata) == {"general.alignment": 8, "k": "v"}
    assert vector(model, "v").tolist() == [1.5, -2]
    assert matrix(model, "w").raw.tobytes() == 2 * block


def test_an_empty_file_and_empty_arrays(load: Callable[[bytes], GGUFFile]) -> None:
    assert len(load(build())) == 0
    kinds = [*SIZES, STRING]
    model = load(build(keys=tuple(key(f"k{kind}", ARRAY, array(kind, 0)) for kind in kinds)))
    assert [len(value) for value in model.metadata.values()] == [0] * len(kinds)  # type: ignore[arg-type]  # all are arrays


def test_trailing_dimensions_of_one_do_not_count(load: Callable[[bytes], GGUFFile]) -> None:
    tensors = (tensor("w", (2, 3, 1, 1)), tensor("column", (6, 1), 0, 32))
    model = load(build(tensors=tensors, data=bytes(64)))
    assert matrix(model, "w").shape == (2, 3)
    assert matrix(model, "column").shape == (6, 1)


def test_f32_at_any_alignment(load: Callable[[bytes], GGUFFile]) -> None:
    for padding in range(4):
        names = key("x" * padding, U8, b"\0"), key("general.alignment", U32, u32(1))
        data = struct.pack("<6f", 1, 2, 3, 4, 5, 6)
        tensors = (tensor("v", (2,)), tensor("w", (2, 2), 0, 8))
        model = load(build(keys=names, tensors=tensors, data=data, alignment=1))
        assert vector(model, "v").tolist() == [1, 2]
        assert vector(model, "v").flags.aligned
        assert matrix(model, "w").dequantize().T.tolist() == [[3, 4], [5, 6]]
        assert (np.ones((1, 2), np.float32) @ matrix(model, "w")).tolist() == [[7, 11]]


# Lifetime


def test_tensors_outlive_their_file(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "gone.gguf"
    path.write_bytes(small.read_bytes())
    with load_gguf(path) as model:
        w, norm, texts = model["Q4_0.weight"], model["norm"], model.metadata["a.texts"]
        metadata = model.metadata
        path.unlink()
        late = model["Q8_0.weight"]
    del model
    gc.collect()
    for tensor_, name in ((w, "Q4_0"), (late, "Q8_0")):
        assert isinstance(tensor_, QuantizedTensor)
        assert tensor_.raw.tobytes() == stored_rows(name).tobytes()
    assert isinstance(norm, np.ndarray)
    assert norm.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert metadata["a.texts"] is texts


def test_a_closed_file_says_so(small: Path) -> None:
    model = load_gguf(small)
    model.close()
    model.close()
    assert "norm" in model
    with pytest.raises(GGUFError, match=r"small\.gguf: found a closed file"):
        model["norm"]
    with pytest.raises(GGUFError, match=r"small\.gguf: found a closed file"):
        model.metadata["n.text"]


def test_tensors_are_cut_from_the_map_without_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    path.write_bytes(build(tensors=(tensor("w", (1024, 4096)),), data=bytes(16 * MB)))
    tracemalloc.start()
    try:
        w = matrix(load_gguf(path), "w")
        assert w.nbytes == 16 * MB
        assert tracemalloc.get_traced_memory()[1] < MB // 4
    finally:
        tracemalloc.stop()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_hundred_cycles_leave_memory_level(tmp_path: Path) -> None:
    path = tmp_path / "cycle.gguf"
    # too large to lie beside others, which would have a part in its memory
    size = 4096 * FORMATS["Q4_0"].column_bytes(2048)
    path.write_bytes(build(tensors=(tensor("w", (2048, 4096), 2),), data=bytes(size)))
    x = np.ones((1, 2048), np.float32)

    def cycle() -> None:
        w = matrix(load_gguf(path), "w")
        w._resident.blocks(INTERLEAVED16)
        x @ w

    gc.disable()  # nothing may wait for the collector
    try:
        for _ in range(10):
            cycle()
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        before = resident_bytes()
        for _ in range(100):
            cycle()
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
        assert resident_bytes() - before < 3 * size  # 100 leaked forms would be 200 times that
    finally:
        gc.enable()


# Files that are not what they should be


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_gguf(tmp_path / "nothing.gguf")


def test_a_folder_and_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe):
        with pytest.raises(GGUFError, match=f"{path}: found something else than a regular file"):
            load_gguf(path)


W = tensor("w", (32, 2), 2)
V = tensor("v", (4,))
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header at byte 0: found a file of 0 bytes, accepted is at least the 24"),
    "header cut": (build()[:23], "header at byte 0: found a file of 23 bytes"),
    "magic": (build(magic=b"GGML"), "magic at byte 0: found b'GGML', accepted is b'GGUF'"),
    "version 0": (build(version=u32(0)), "version at byte 4: found 0, accepted is 2 or 3"),
    "version 1": (build(version=u32(1)), "version at byte 4: found 1, accepted is 2 or 3"),
    "version 4": (build(version=u32(4)), "version at byte 4: found 4, accepted is 2 or 3"),
    "big-endian": (
        build(version=struct.pack(">I", 3)),
        "version at byte 4: found 3 in a big-endian file, accepted is 2 or 3, little-endian",
    ),
    "tensor count": (
        build(tensor_count=1),
        "tensor count at byte 8: found a count of 1, accepted is at most 0",
    ),
    "key count": (
        build(key_count=2),
        "key count at byte 16: found a count of 2, accepted is at most 0, for 0 bytes are left",
    ),
    "key count by one": (
        build(keys=(key("abc", STRING, text("0123456789")),), key_count=2),
        "name of key 1 at byte 57: found 8 bytes to read, accepted is at most the 0 left",
    ),
    "key type": (
        build(keys=(key("k", 13, b"0123"),)),
        "key 'k' at byte 33: found a value of type 13, accepted is a type from 0 to 12",
    ),
    "array type": (
        build(keys=(key("k", ARRAY, array(99, 0)),)),
        "key 'k' at byte 37: found a value of type 99, accepted is a type from 0 to 12",
    ),
    "nested array": (
        build(keys=(key("k", ARRAY, array(ARRAY, 1, array(U8, 0))),)),
        "key 'k' at byte 37: found an array of arrays, accepted is an array of numbers or strings",
    ),
    "key twice": (
        build(keys=(key("k", U8, b"\0"), key("k", U8, b"\1"))),
        "key 'k' at byte 38: found the key a second time, accepted is every key once",
    ),
    "key not UTF-8": (
        build(keys=(text(b"a\xff") + u32(U8) + b"\0",)),
        "name of key 0 at byte 33: found a string with invalid start byte, accepted is UTF-8",
    ),
    "long key": (
        build(keys=(key("k" * 65536, U8, b"\0"),)),
        "name of key 0 at byte 24: found 65536 bytes, accepted is at most 65535",
    ),
    "value cut": (
        build(keys=(key("name", U64, b"1234"),)),
        "key 'name' at byte 40: found 8 bytes to read, accepted is at most the 4 left",
    ),
    "text cut": (
        build(keys=(key("k", STRING, u64(5) + b"1234"),)),
        "key 'k' at byte 45: found 5 bytes to read, accepted is at most the 4 left",
    ),
    "texts cut": (
        build(keys=(key("k", ARRAY, array(STRING, 2, text("0123456789") + u64(5) + b"1234")),)),
        "key 'k' at byte 75: found 5 bytes to read, accepted is at most the 4 left",
    ),
    "numbers cut": (
        build(keys=(key("k", ARRAY, array(I32, 4, bytes(15))),)),
        "key 'k' at byte 41: found a count of 4, accepted is at most 3, for 15 bytes are left",
    ),
    "alignment type": (
        build(keys=(key("general.alignment", U64, u64(32)),)),
        "key 'general.alignment' at byte 53: found a value of type 10, accepted is one u32",
    ),
    "alignment array": (
        build(keys=(key("general.alignment", ARRAY, array(U32, 1, u32(32))),)),
        "key 'general.alignment' at byte 65: found a value of type 4, accepted is one u32",
    ),
    "alignment 0": (
        build(keys=(key("general.alignment", U32, u32(0)),)),
        "key 'general.alignment' at byte 53: found 0, accepted is a power of two",
    ),
    "alignment 48": (
        build(keys=(key("general.alignment", U32, u32(48)),)),
        "key 'general.alignment' at byte 53: found 48, accepted is a power of two",
    ),
    "alignment beyond the file": (
        build(keys=(key("general.alignment", U32, u32(2**31)),), tensors=(V,), data=bytes(64)),
        "tensor 'v' at byte 57: found data from byte 2147483648 to 2147483664, accepted is data",
    ),
    "tensor twice": (
        build(tensors=(V, tensor("v", (4,), 0, 32)), data=bytes(64)),
        "tensor 'v' at byte 57: found the tensor a second time, accepted is every name once",
    ),
    "no dimensions": (
        build(tensors=(tensor("v", (), rank=0),), data=bytes(64)),
        "tensor 'v' at byte 33: found 0 dimensions, accepted is 1 to 4",
    ),
    "5 dimensions": (
        build(tensors=(tensor("v", (1,) * 5),), data=bytes(64)),
        "tensor 'v' at byte 33: found 5 dimensions, accepted is 1 to 4",
    ),
    "dimension 0": (
        build(tensors=(tensor("w", (32, 0), 2),), data=bytes(64)),
        "tensor 'w' at byte 24: found dimensions (32, 0), accepted is none of size 0",
    ),
    "partial block": (
        build(tensors=(tensor("w", (33, 2), 2),), data=bytes(64)),
        "tensor 'w' at byte 24: found dimensions (33, 2) in Q4_0, accepted is a first dimension",
    ),
    "offset not aligned": (
        build(tensors=(tensor("v", (4,), 0, 16),), data=bytes(64)),
        "tensor 'v' at byte 49: found offset 16, accepted is a multiple of the alignment, 32",
    ),
    "offset beyond the end": (
        build(tensors=(tensor("v", (4,), 0, 64),), data=bytes(64)),
        "tensor 'v' at byte 24: found data from byte 128 to 144, accepted is data inside",
    ),
    "data cut": (
        build(tensors=(W,), data=bytes(35)),
        "tensor 'w' at byte 24: found data from byte 96 to 132, accepted is data inside",
    ),
    "overlap": (
        build(tensors=(W, tensor("v", (4,), 0, 32)), data=bytes(64)),
        "tensor 'v' at byte 65: found data from byte 160 on, inside tensor 'w' (128 to 164)",
    ),
    "overlap with an unknown format": (
        build(tensors=(W, tensor("v", (4,), 77, 32)), data=bytes(64)),
        "tensor 'v' at byte 65: found data from byte 160 on, inside tensor 'w'",
    ),
    "the same data": (
        build(tensors=(V, tensor("u", (4,))), data=bytes(64)),
        "found data from byte 96 on, inside tensor 'v' (96 to 112)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_names_itself_the_place_and_what_it_wants(
    load: Callable[[bytes], GGUFFile], tmp_path: Path, case: str
) -> None:
    data, message = BAD[case]
    with pytest.raises(GGUFError) as error:
        load(data)
    assert str(error.value).startswith(f"{tmp_path / 'model.gguf'}: ")
    assert message in str(error.value)


def test_every_truncation_of_a_header_is_an_error(
    load: Callable[[bytes], GGUFFile], small: Path
) -> None:
    whole = small.read_bytes()
    data = min(info.start for info in load_gguf(small)._infos.values())
    for size in [*range(0, data, 7), *range(data, len(whole), 997)]:
        with pytest.raises(GGUFError, match=r"at byte \d+: found .*, accepted is"):
            load(whole[:size])


def test_damaged_values_raise_when_asked_for(load: Callable[[bytes], GGUFFile]) -> None:
    model = load(
        build(
            keys=(
                key("bool", BOOL, b"\2"),
                key("bools", ARRAY, array(BOOL, 3, b"\0\1\7")),
                key("text", STRING, text(b"ab\xff")),
                key("texts", ARRAY, array(STRING, 2, text("a") + text(b"\x80"))),
                key("good", U8, b"\5"),
            )
        )
    )
    for name, message in {
        "bool": "key 'bool' at byte 40: found a bool of 2, accepted is 0 or 1",
        "bools": "key 'bools' at byte 72: found a bool of 7, accepted is 0 or 1",
        "text": "key 'text' at byte 99: found a string with invalid start byte, accepted is UTF-8",
        "texts": "key 'texts' at byte 146: found a string with invalid start byte",
    }.items():
        for _ in range(2):
            with pytest.raises(GGUFError) as error:
                model.metadata[name]
            assert message in str(error.value)
    assert model.metadata["good"] == 5


def test_a_long_name_does_not_fill_the_message(load: Callable[[bytes], GGUFFile]) -> None:
    with pytest.raises(GGUFError) as error:
        load(build(tensors=(tensor("\x1b[31m" + "n" * 60000, (3,), 2),), data=bytes(64)))
    assert len(str(error.value)) < 500
    assert "\x1b" not in str(error.value)


def malicious() -> dict[str, bytes]:
    cases: dict[str, bytes] = {}
    for count in HUGE:
        cases |= {
            f"{count} tensors": build(tensor_count=count),
            f"{count} keys": build(key_count=count),
            f"{count} bytes of key": build(keys=(u64(count) + bytes(64),)),
            f"{count} bytes of text": build(keys=(key("k", STRING, u64(count) + bytes(64)),)),
            f"{count} bytes in texts": build(
                keys=(key("k", ARRAY, array(STRING, 2, text("a") + u64(count) + bytes(64))),)
            ),
            f"{count} bytes of name": build(tensors=(u64(count) + bytes(64),)),
            f"offset {count}": build(tensors=(tensor("v", (4,), 0, count & -32),), data=bytes(64)),
            f"dimensions {count}": build(tensors=(tensor("w", (count,) * 4),), data=bytes(64)),
            # products that a 64-bit integer would take for 0, 4 or 64 bytes
            f"{count} of 4": build(tensors=(tensor("w", (4, count)),), data=bytes(64)),
            f"{count} of blocks": build(tensors=(tensor("w", (256, count), 14),), data=bytes(64)),
        }
        for kind in [*SIZES, STRING, ARRAY, 99]:
            arrays = key("k", ARRAY, array(kind, count, bytes(64)))
            cases[f"{count} items of type {kind}"] = build(keys=(arrays,))
    for rank in (5, 2**31, 2**32 - 1):
        cases[f"rank {rank}"] = build(tensors=(tensor("w", (1,) * 4, rank=rank),), data=bytes(64))
    deep = b"".join(array(ARRAY, 1) for _ in range(100_000))
    cases["deep arrays"] = build(keys=(key("k", ARRAY, deep),))
    return cases


def test_no_count_is_believed(load: Callable[[bytes], GGUFFile]) -> None:
    cases = malicious()
    started = time.monotonic()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for name, data in cases.items():
            with pytest.raises(GGUFError, match=r"at byte \d+: found .*, accepted is"):
                pytest.fail(f"accepted: {name}: {load(data)}")
        assert tracemalloc.get_traced_memory()[1] - before < MB
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < 5


# Fuzzing


def mutate(rng: random.Random, data: bytes, header: int) -> bytes:
    """Damage a file in one to four ways, mostly in its header."""
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        size = len(damaged)
        at = rng.randrange(min(header, size) if rng.random() < 0.9 else size)
        kind = rng.randrange(8)
        if kind <= 1:
            damaged[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            damaged[at] = rng.randrange(256)
        elif kind == 3:
            damaged[at : at + 8] = u64(rng.choice([0, 1, 3, 255, 2**31, *HUGE, size, size - at]))
        elif kind == 4:
            damaged[at : at + 4] = u32(rng.choice([0, 1, 2, 4, 8, 9, 12, 2**31, 2**32 - 1]))
        elif kind == 5:
            del damaged[at : at + rng.choice([1, 4, 8, 100, size])]
        elif kind == 6:
            damaged[at:at] = rng.randbytes(rng.choice([1, 4, 8, 100]))
        else:
            source = rng.randrange(size)
            damaged[at : at + 32] = damaged[source : source + 32]
        if not damaged:
            break
    return bytes(damaged)


def use_everything(model: GGUFFile) -> int:
    """Ask for every value and use every tensor; returns how many could be used."""
    used = 0
    for name in model.metadata:
        try:
            model.metadata[name]
            used += 1
        except GGUFError:
            pass
    for name in model:
        try:
            found = model[name]
        except GGUFError:
            continue
        used += 1
        if isinstance(found, QuantizedTensor):
            k, n = found.shape
            assert found.dequantize().shape == (k, n)
            assert found.rows([0, n - 1]).shape == (2, k)
            assert (np.ones((1, k), np.float32) @ found).shape == (1, n)
            assert found.has_finite_scales in (True, False)
            assert found._resident.blocks(INTERLEAVED16).size >= found.nbytes
        else:
            assert found.dtype == np.float32
            found.sum(dtype=np.float64)
    return used


@pytest.fixture
def _own_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for small weights that is there before a test measures, and holds no other's."""
    memory = np.empty(layouts._SHARED_BYTES, np.uint8)
    monkeypatch.setattr(layouts, "_shared", layouts._Shared(memory))


@pytest.mark.process
@pytest.mark.usefixtures("_own_shared_memory")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a sum over Inf and NaN
def test_mutations_of_a_real_file_are_read_or_refused(
    load: Callable[[bytes], GGUFFile], small: Path
) -> None:
    rng = random.Random(20240229)
    whole = small.read_bytes()
    header = min(info.start for info in load_gguf(small)._infos.values())
    outcomes = {"read": 0, "refused": 0}
    messages: list[str] = []
    slowest_s = 0.0
    use_everything(load(whole))  # what is worked out once, and kept
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(1000):
            data = mutate(rng, whole, header)
            started = time.monotonic()
            try:
                model = load(data)
            except GGUFError as error:
                messages.append(str(error))
                outcomes["refused"] += 1
            else:
                use_everything(model)
                outcomes["read"] += 1
            slowest_s = max(slowest_s, time.monotonic() - started)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert outcomes["read"] > 100
    assert outcomes["refused"] > 100
    assert all("accepted is" in message and len(message) < 1500 for message in messages)
    assert slowest_s < 5  # a machine may be busy, but nothing may hang
    assert peak < 4 * MB


# A real model


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return model_file()


@pytest.mark.serial
@pytest.mark.model
def test_a_real_model_opens_within_100_ms(smollm2: Path) -> None:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        load_gguf(smollm2)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.1


@pytest.mark.model
def test_a_real_model_is_what_gguf_reads(smollm2: Path) -> None:
    model = load_gguf(smollm2)
    wanted = {tensor_.name: tensor_ for tensor_ in gguf.GGUFReader(smollm2).tensors}
    assert model.keys() == wanted.keys()
    for name, found in model.items():
        stored = wanted[name]
        if isinstance(found, QuantizedTensor):
            assert found.shape == tuple(stored.shape.tolist())
            assert found.format == stored.tensor_type.name
            assert np.array_equal(found.raw, stored.data)
        else:
            assert np.array_equal(found, stored.data)
    assert model.metadata["general.architecture"] == "llama"
    tokens = model.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, tuple)
    assert len(tokens) == 49152
    assert tokens[:2] == ("<|endoftext|>", "<|im_start|>")
