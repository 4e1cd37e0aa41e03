"""The GGUF reader: values, refusals, and damaged files, which must never cost memory or time."""

import gc
import os
import pickle
import random
import struct
import time
import tracemalloc
from collections import Counter
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
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.formats import FORMATS
from q4jit.weights.gguf.file import GGUFFile, load_gguf
from q4jit.weights.layouts import INTERLEAVED16
from q4jit.weights.reference import random_weight
from q4jit.weights.tensor import QuantizedTensor
from tests.support.gguf_files import (
    ARRAY,
    BOOL,
    I32,
    SIZES,
    STRING,
    U8,
    U32,
    U64,
    array,
    build,
    header_bytes,
    key,
    tensor,
    text,
    u32,
    u64,
)
from tests.support.tools import gemma_file, model_file

MB = 1 << 20
HUGE = [2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**32, 2**61 + 1]


@pytest.fixture
def load(tmp_path: Path) -> Callable[[bytes], GGUFFile]:
    """Return a function that writes bytes to a file and loads it."""
    path = tmp_path / "model.gguf"

    def write_and_load(data: bytes) -> GGUFFile:
        path.unlink(missing_ok=True)  # a mapped file must not be overwritten
        path.write_bytes(data)
        return load_gguf(path)

    return write_and_load


# --- a small file with everything, written by gguf ------------------------------------------------


def stored_columns(name: str, n: int = 5, k: int = 256) -> NDArray[np.uint8]:
    return random_weight(name, k, n).raw


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
        writer.add_tensor(f"{name}.weight", stored_columns(name), raw_dtype=kind)
    writer.add_tensor("norm", np.arange(7, dtype=np.float32))
    writer.add_tensor("half", np.arange(-3, 4, dtype=np.float16))
    writer.add_tensor(
        "vector.q8", stored_columns("Q8_0", 1)[0], raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    upper = np.arange(-3, 4, dtype=np.float32).view(np.uint8).reshape(-1, 4)[:, 2:]
    bf16 = gguf.GGMLQuantizationType.BF16
    writer.add_tensor("brain", np.ascontiguousarray(upper).reshape(-1), raw_dtype=bf16)
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
    tensor_ = model[name]
    assert isinstance(tensor_, QuantizedTensor)
    return tensor_


def vector(model: Mapping[str, Any], name: str) -> NDArray[np.float32]:
    tensor_ = model[name]
    assert isinstance(tensor_, np.ndarray)
    return tensor_


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_is_a_quantized_tensor(small: Path, name: str) -> None:
    model = load_gguf(small)
    w = matrix(model, f"{name}.weight")
    assert (w.shape, w.format) == ((256, 5), name)
    stored = stored_columns(name)
    np.testing.assert_array_equal(w.raw, stored)
    np.testing.assert_array_equal(
        w.dequantize().T, quants.dequantize(stored, gguf.GGMLQuantizationType[name])
    )
    assert model[f"{name}.weight"] is w


def test_a_vector_is_a_read_only_f32_array(small: Path) -> None:
    model = load_gguf(small)
    assert vector(model, "norm").tolist() == [0, 1, 2, 3, 4, 5, 6]
    for name in ("half", "brain"):
        assert vector(model, name).tolist() == [-3, -2, -1, 0, 1, 2, 3]
    wanted = quants.dequantize(stored_columns("Q8_0", 1), gguf.GGMLQuantizationType.Q8_0)[0]
    np.testing.assert_array_equal(vector(model, "vector.q8"), wanted)
    for name in ("norm", "half", "brain", "vector.q8"):
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
        assert metadata[name] == wanted
        assert type(metadata[name]) is type(wanted)
    arrays = {"a.ints": [1, -2, 3], "a.floats": [0.5, -1.5], "a.bools": [True, False, True]}
    for name, values in arrays.items():
        numbers = metadata[name]
        assert isinstance(numbers, np.ndarray)
        assert numbers.tolist() == values
        assert not numbers.flags.writeable
    assert list(metadata)[0] == "general.architecture"  # noqa: RUF015 - the file's order
    assert set(metadata) >= set(scalars) | set(arrays)
    assert repr(metadata).endswith(f"{len(metadata)} keys>")


def test_a_file_is_a_mapping(small: Path) -> None:
    model = load_gguf(str(small))
    assert list(model)[:2] == ["F32.weight", "F16.weight"]
    assert len(model) == len(FORMATS) + 5
    assert "norm" in model
    assert "nothing" not in model
    assert dict(model) == dict(model.items())
    assert list(model.values()) == [model[name] for name in model]
    assert model.get("nothing") is None
    assert model.metadata.get("nothing", 3) == 3
    counted = f"{len(model)} tensors (and 1 that cannot be read), "
    assert repr(model).startswith(f"<GGUFFile {small}: {counted}")
    assert model.paths == (str(small),)
    assert repr(model).endswith(f"{len(model.metadata)} keys>")


def test_all_tensors_of_a_file_are_listed(small: Path) -> None:
    model = load_gguf(small)
    entries = model.tensors
    assert list(entries)[-3:] == ["brain", "experts", "foreign"]
    assert [name for name, entry in entries.items() if entry.readable] == list(model)
    assert (entries["Q4_0.weight"].shape, entries["Q4_0.weight"].format) == ((256, 5), "Q4_0")
    experts, foreign = entries["experts"], entries["foreign"]
    assert (experts.shape, experts.format, experts.readable) == ((4, 3, 2), "F32", True)
    assert (foreign.shape, foreign.format, foreign.nbytes) == ((3, 2), "I32", 24)
    assert (foreign.ggml_type, foreign.readable) == (26, False)
    assert foreign.problem == "expected a format that q4jit reads, got I32 (ggml type 26)"
    with pytest.raises(TypeError):
        entries["new"] = experts  # type: ignore[index]  # read-only
    lines = str(model).splitlines()
    assert len(lines) == 1 + len(entries)
    assert lines[0].startswith(f"GGUFFile {small}: {len(model)} tensors (and 1 that")
    assert lines[1].split() == ["F32.weight", "256", "×", "5", "F32", "5,120", "bytes"]
    assert lines[-2].split() == ["experts", "4", "×", "3", "×", "2", "F32", "96", "bytes"]
    assert lines[-1].endswith(f"24 bytes  not readable: {foreign.problem}")


def test_the_list_of_a_hostile_file_is_short(load: Callable[[bytes], GGUFFile]) -> None:
    names = [f"\x1b{'n' * 2000}{i}" for i in range(1200)]
    entries = tuple(tensor(name, (0,) * 60) for name in names)
    text_ = str(load(build(tensors=entries)))
    assert len(text_.splitlines()) == 1002
    assert max(map(len, text_.splitlines())) < 350
    assert "\x1b" not in text_


def test_a_missing_name(small: Path) -> None:
    model = load_gguf(small)
    for ask, message in (
        (lambda: model["norms"], f"{small}: no tensor named 'norms' ({len(model)} tensors). Did"),
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


@pytest.mark.parametrize(
    "names",
    [
        [f"{i:03}{'n' * 65_532}" for i in range(190)],  # 12 MiB of the longest names
        [f"{'ab' * 100}{i}" for i in range(60_000)],
        [f"{i}" for i in range(700_000)],
    ],
    ids=["long", "alike", "many"],
)
def test_names_of_a_hostile_file_cost_little(names: list[str]) -> None:
    for name in ("token_embd.weight", names[0][:-1], "ab" * 30_000):
        started = time.monotonic()
        message = str(MissingNameError("f", "tensor", name, names))
        assert time.monotonic() - started < 3
        assert len(message) < 1200


def test_a_similar_name_is_found_among_many() -> None:
    names = [f"blk.{i}.{part}.weight" for i in range(200) for part in ("ffn_up", "attn_q")]
    for asked, wanted in (
        ("blk.150.ffn_u.weight", "'blk.150.ffn_up.weight'"),
        ("BLK.7.attn_q.weigth", "'blk.7.attn_q.weight'"),
        ("xblk.199.ffn_up.weight", "'blk.199.ffn_up.weight'"),
    ):
        assert wanted in str(MissingNameError("f", "tensor", asked, names))
    assert len(str(MissingNameError("f", "tensor", tuple(range(10_000)), names))) < 1200


def test_an_unreadable_tensor_does_not_affect_the_others(small: Path) -> None:
    model = load_gguf(small)
    with pytest.raises(
        GGUFError,
        match=r"small\.gguf: tensor 'foreign' at byte \d+: expected a format that q4jit reads, "
        r"got I32 \(ggml type 26\)$",
    ):
        model["foreign"]
    assert vector(model, "norm").size == 7


ODD: dict[str, tuple[tuple[int, ...], int, int, str]] = {  # dimensions, type, bytes, message
    "no dimensions": ((), 0, 4, "one to three dimensions, got none: a single number"),
    "no dimensions in blocks": ((), 2, 32, "one to three dimensions, got none: a single number"),
    "4 dimensions": ((1, 2, 1, 3), 0, 24, "one to three dimensions, got (1, 2, 1, 3)"),
    "5 dimensions": ((1, 1, 1, 2, 1), 0, 8, "one to three dimensions, got (1, 1, 1, 2, 1)"),
    "no elements": ((32, 0), 2, 0, "dimensions of at least 1, got (32, 0)"),
    "an empty vector": ((0,), 0, 0, "dimensions of at least 1, got (0,)"),
    "no elements, many columns": ((0, 2**63), 77, 0, "a format that q4jit reads, got unknown"),
    "a partial block": ((33, 2), 2, 32, "multiple of 32 for Q4_0, got dimensions (33, 2)"),
    "an unknown format": ((3,), 77, 32, "got unknown (ggml type 77)"),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_tensor_is_listed_and_only_its_use_is_refused(
    load: Callable[[bytes], GGUFFile], case: str
) -> None:
    dims, kind, nbytes, message = ODD[case]
    good = tensor("w", (4, 2), 0, 32)
    model = load(build(tensors=(tensor("odd", dims, kind), good), data=bytes(64)))
    assert matrix(model, "w").shape == (4, 2)
    assert list(model) == ["w"]
    entry = model.tensors["odd"]
    assert (entry.shape, entry.ggml_type, entry.nbytes) == (dims, kind, nbytes)
    with pytest.raises(GGUFError, match=r"tensor 'odd' at byte 24: expected ") as caught:
        model["odd"]
    assert message in str(caught.value)
    assert message in entry.problem


@pytest.mark.parametrize("kind", gguf.GGMLQuantizationType, ids=lambda kind: kind.name)
def test_every_type_of_ggml_is_listed(
    load: Callable[[bytes], GGUFFile], kind: gguf.GGMLQuantizationType
) -> None:
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    if kind.name == "Q8_1":
        size = 36  # ggml's own size: gguf still has that of f32 scales
    model = load(build(tensors=(tensor("t", (elements, 3), int(kind)),), data=bytes(3 * size)))
    entry = model.tensors["t"]
    assert (entry.format, entry.nbytes) == (kind.name, 3 * size)
    assert entry.readable == (kind.name in FORMATS) == ("t" in model)
    if not entry.readable:
        with pytest.raises(GGUFError, match=f"got {kind.name} \\(ggml type {int(kind)}\\)"):
            model["t"]
    with pytest.raises(GGUFError, match=r"tensor 't' at byte 24: expected data in the file's"):
        load(build(tensors=(tensor("t", (elements, 4), int(kind)),), data=bytes(3 * size)))


def test_names_in_another_encoding(load: Callable[[bytes], GGUFFile]) -> None:
    tensors = tensor(b"w\xe4", (2, 2)), tensor("w", (2, 3), 0, 32)
    keys = key(b"k\xe4", U8, b"\5"), key("k", U8, b"\6")
    model = load(build(keys=keys, tensors=tensors, data=bytes(64)))
    assert dict(model.metadata) == {r"k\xe4": 5, "k": 6}
    assert list(model) == ["w"]
    entry = model.tensors[r"w\xe4"]
    assert (entry.shape, entry.format, entry.nbytes) == ((2, 2), "F32", 16)
    assert entry.problem == "expected a name in UTF-8, got other bytes"
    with pytest.raises(GGUFError, match=r"expected a name in UTF-8, got other bytes$"):
        model[r"w\xe4"]


def test_a_tensor_of_three_dimensions_has_a_matrix_per_expert(
    load: Callable[[bytes], GGUFFile],
) -> None:
    data = np.arange(24, dtype="<f4")
    entries = tensor("experts", (4, 3, 2)), tensor("one", (4, 3, 1), 0, 96)
    model = load(build(tensors=entries, data=data.tobytes() + bytes(64)))
    experts = model["experts"]
    assert isinstance(experts, ExpertTensor)
    assert experts.shape == (2, 4, 3)
    assert experts is model["experts"]
    for w, wanted in zip(experts, data.reshape(2, 3, 4), strict=True):
        assert np.array_equal(w.dequantize().T, wanted)
    assert matrix(model, "one").shape == (4, 3)


def test_an_empty_tensor_overlaps_nothing(load: Callable[[bytes], GGUFFile]) -> None:
    entries = tensor("w", (16,)), tensor("none", (0,), 0, 32)  # inside w
    assert vector(load(build(tensors=entries, data=bytes(64))), "w").size == 16


def test_data_of_an_unknown_format_must_be_in_the_file(
    load: Callable[[bytes], GGUFFile],
) -> None:
    model = load(build(tensors=(tensor("t", (2**40, 7), 77),), data=bytes(32)))
    with pytest.raises(GGUFError, match=r"tensor 't' at byte 24: .*got unknown \(ggml type 77\)"):
        model["t"]
    with pytest.raises(GGUFError, match=r"tensor 't' at byte 24: .*got bytes 128 to"):
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


# --- lifetime -------------------------------------------------------------------------------------


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
        assert tensor_.raw.tobytes() == stored_columns(name).tobytes()
    assert isinstance(norm, np.ndarray)
    assert norm.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert metadata["a.texts"] is texts


def test_a_closed_file_is_refused(small: Path) -> None:
    model = load_gguf(small)
    model.close()
    model.close()
    assert "norm" in model
    with pytest.raises(GGUFError, match=r"small\.gguf: the file is closed"):
        model["norm"]
    with pytest.raises(GGUFError, match=r"small\.gguf: the file is closed"):
        model.metadata["n.text"]


def test_tensors_are_not_copied_from_the_map(tmp_path: Path) -> None:
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
def test_a_hundred_cycles_leak_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "cycle.gguf"
    # too large for the pool, whose memory small weights share
    size = 4096 * FORMATS["Q4_0"].column_bytes(2048)
    path.write_bytes(build(tensors=(tensor("w", (2048, 4096), 2),), data=bytes(size)))
    x = np.ones((1, 2048), np.float32)

    def cycle() -> None:
        w = matrix(load_gguf(path), "w")
        w._resident.blocks(INTERLEAVED16)
        x @ w

    gc.disable()  # memory must be freed without the collector
    try:
        for _ in range(10):
            cycle()
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        before = resident_bytes()
        for _ in range(100):
            cycle()
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
        assert resident_bytes() - before < 3 * size  # 100 leaked copies would be 200 times `size`
    finally:
        gc.enable()


# --- damaged files --------------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_gguf(tmp_path / "nothing.gguf")


def test_a_folder_and_a_pipe_are_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe):
        with pytest.raises(GGUFError, match=f"{path} is not a regular file"):
            load_gguf(path)


def test_a_pickled_file_is_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small(tmp_path / "small.gguf")
    monkeypatch.chdir(tmp_path)
    model = load_gguf("small.gguf")
    monkeypatch.chdir("/")  # before it is pickled
    data = pickle.dumps(model)
    again = pickle.loads(data)
    assert len(data) < 300
    assert list(again) == list(model)
    assert list(again.metadata) == list(model.metadata)


def test_what_was_opened_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check of the path would not see a device that takes the file's place afterwards."""
    regular = Path(__file__).stat()
    monkeypatch.setattr(Path, "stat", lambda path, **_: regular)
    with pytest.raises(GGUFError, match="not a regular file"):
        load_gguf("/dev/null")


W = tensor("w", (32, 2), 2)
V = tensor("v", (4,))
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header at byte 0: expected at least 24 bytes, got a file of 0 bytes"),
    "header cut": (
        build()[:23],
        "header at byte 0: expected at least 24 bytes, got a file of 23 bytes",
    ),
    "magic": (build(magic=b"GGML"), "magic at byte 0: expected b'GGUF', got b'GGML'"),
    "version 0": (
        build(version=u32(0)),
        "version at byte 4: expected 2 or 3 in a little-endian file, got 0",
    ),
    "version 1": (
        build(version=u32(1)),
        "version at byte 4: expected 2 or 3 in a little-endian file, got 1",
    ),
    "version 4": (
        build(version=u32(4)),
        "version at byte 4: expected 2 or 3 in a little-endian file, got 4",
    ),
    "big-endian": (
        build(version=struct.pack(">I", 3)),
        "version at byte 4: expected 2 or 3 in a little-endian file, got 3 in a big-endian file",
    ),
    "tensor count": (
        build(tensor_count=1),
        "tensor count at byte 8: expected at most 0 items in the 8 bytes that are left, got 1",
    ),
    "key count": (
        build(key_count=2),
        "key count at byte 16: expected at most 0 items in the 0 bytes that are left, got 2",
    ),
    "key count by one": (
        build(keys=(key("abc", STRING, text("0123456789")),), key_count=2),
        "name of key 1 at byte 57: expected at most the 0 bytes that are left, got 8",
    ),
    "key type": (
        build(keys=(key("k", 13, b"0123"),)),
        "key 'k' at byte 33: expected a type from 0 to 12, got 13",
    ),
    "array type": (
        build(keys=(key("k", ARRAY, array(99, 0)),)),
        "key 'k' at byte 37: expected a type from 0 to 12, got 99",
    ),
    "nested array": (
        build(keys=(key("k", ARRAY, array(ARRAY, 1, array(U8, 0))),)),
        "key 'k' at byte 37: expected an array of numbers or strings, got an array of arrays",
    ),
    "key twice": (
        build(keys=(key("k", U8, b"\0"), key("k", U8, b"\1"))),
        "key 'k' at byte 38: expected every key once, got a second key of this name",
    ),
    "long key": (
        build(keys=(key("k" * 65536, U8, b"\0"),)),
        "name of key 0 at byte 24: expected at most 65535 bytes, got 65536 bytes",
    ),
    "value cut": (
        build(keys=(key("name", U64, b"1234"),)),
        "key 'name' at byte 40: expected at most the 4 bytes that are left, got 8",
    ),
    "text cut": (
        build(keys=(key("k", STRING, u64(5) + b"1234"),)),
        "key 'k' at byte 45: expected at most the 4 bytes that are left, got 5",
    ),
    "texts cut": (
        build(keys=(key("k", ARRAY, array(STRING, 2, text("0123456789") + u64(5) + b"1234")),)),
        "key 'k' at byte 75: expected at most the 4 bytes that are left, got 5",
    ),
    "numbers cut": (
        build(keys=(key("k", ARRAY, array(I32, 4, bytes(15))),)),
        "key 'k' at byte 41: expected at most 3 items in the 15 bytes that are left, got 4",
    ),
    "alignment type": (
        build(keys=(key("general.alignment", U64, u64(32)),)),
        "key 'general.alignment' at byte 53: expected one u32 (type 4), got a value of type 10",
    ),
    "alignment array": (
        build(keys=(key("general.alignment", ARRAY, array(U32, 1, u32(32))),)),
        "key 'general.alignment' at byte 65: expected one u32 (type 4), got an array",
    ),
    "alignment 0": (
        build(keys=(key("general.alignment", U32, u32(0)),)),
        "key 'general.alignment' at byte 53: expected a power of two, got 0",
    ),
    "alignment 48": (
        build(keys=(key("general.alignment", U32, u32(48)),)),
        "key 'general.alignment' at byte 53: expected a power of two, got 48",
    ),
    "alignment beyond the file": (
        build(keys=(key("general.alignment", U32, u32(2**31)),), tensors=(V,), data=bytes(64)),
        "tensor 'v' at byte 57: expected data in the file's 160 bytes, got bytes 2147483648",
    ),
    "tensor twice": (
        build(tensors=(V, tensor("v", (4,), 0, 32)), data=bytes(64)),
        "tensor 'v' at byte 57: expected every name once, got a second tensor of this name",
    ),
    "65 dimensions": (
        build(tensors=(tensor("v", (1,) * 65),), data=bytes(64)),
        "tensor 'v' at byte 33: expected at most 64 dimensions, got 65",
    ),
    "offset not aligned": (
        build(tensors=(tensor("v", (4,), 0, 16),), data=bytes(64)),
        "tensor 'v' at byte 49: expected an offset that is a multiple of the alignment, 32, got 16",
    ),
    "offset beyond the end": (
        build(tensors=(tensor("v", (4,), 0, 64),), data=bytes(64)),
        "tensor 'v' at byte 24: expected data in the file's 128 bytes, got bytes 128 to 144",
    ),
    "data cut": (
        build(tensors=(W,), data=bytes(35)),
        "tensor 'w' at byte 24: expected data in the file's 131 bytes, got bytes 96 to 132",
    ),
    "overlap": (
        build(tensors=(W, tensor("v", (4,), 0, 32)), data=bytes(64)),
        "tensors that do not overlap, got data at byte 160, inside tensor 'w' from 128 to 164",
    ),
    "overlap with an unknown format": (
        build(tensors=(W, tensor("v", (4,), 77, 32)), data=bytes(64)),
        "expected tensors that do not overlap, got data at byte 160, inside tensor 'w'",
    ),
    "the same data": (
        build(tensors=(V, tensor("u", (4,))), data=bytes(64)),
        "got data at byte 96, inside tensor 'v' from 96 to 112",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_refused_with_its_position(
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
    data = header_bytes(small)
    for size in [*range(0, data, 7), *range(data, len(whole), 997)]:
        with pytest.raises(GGUFError, match=r"at byte \d+: expected .*, got"):
            load(whole[:size])


def test_damaged_values_raise_on_access(load: Callable[[bytes], GGUFFile]) -> None:
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
        "bool": "key 'bool' at byte 40: expected 0 or 1 as a bool, got 2",
        "bools": "key 'bools' at byte 72: expected 0 or 1 as a bool, got 7",
        "text": "key 'text' at byte 99: expected UTF-8, got invalid start byte",
        "texts": "key 'texts' at byte 146: expected UTF-8, got invalid start byte",
    }.items():
        for _ in range(2):
            with pytest.raises(GGUFError) as error:
                model.metadata[name]
            assert message in str(error.value)
    assert model.metadata["good"] == 5


def test_a_long_name_does_not_fill_the_message(load: Callable[[bytes], GGUFFile]) -> None:
    with pytest.raises(GGUFError) as error:
        load(build(tensors=(tensor("\x1b[31m" + "n" * 60000, (4,), 0, 3),), data=bytes(64)))
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
            # products that overflow a 64-bit integer to 0, 4 or 64 bytes
            f"{count} of 4": build(tensors=(tensor("w", (4, count)),), data=bytes(64)),
            f"{count} of blocks": build(tensors=(tensor("w", (256, count), 14),), data=bytes(64)),
        }
        for kind in [*SIZES, STRING, ARRAY, 99]:
            arrays = key("k", ARRAY, array(kind, count, bytes(64)))
            cases[f"{count} items of type {kind}"] = build(keys=(arrays,))
    for rank in (65, 2**31, 2**32 - 1):
        cases[f"rank {rank}"] = build(tensors=(tensor("w", (1,) * 4, rank=rank),), data=bytes(64))
    deep = b"".join(array(ARRAY, 1) for _ in range(100_000))
    cases["deep arrays"] = build(keys=(key("k", ARRAY, deep),))
    return cases


def test_every_count_is_checked(load: Callable[[bytes], GGUFFile]) -> None:
    cases = malicious()
    started = time.monotonic()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for name, data in cases.items():
            with pytest.raises(GGUFError, match=r"at byte \d+: expected .*, got"):
                pytest.fail(f"loaded: {name}: {load(data)}")
        assert tracemalloc.get_traced_memory()[1] - before < MB
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < 5


# --- fuzzing --------------------------------------------------------------------------------------


def mutate(rng: random.Random, data: bytes, header: int) -> bytes:
    """Damage a file one to four times, mostly in its header."""
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
    """Read every value, use every tensor, and return how many were readable."""
    used = 0
    for name in model.metadata:
        try:
            model.metadata[name]
            used += 1
        except GGUFError:
            pass
    for name in model:
        try:
            tensor_ = model[name]
        except GGUFError:
            continue
        used += 1
        if isinstance(tensor_, QuantizedTensor):
            k, n = tensor_.shape
            assert tensor_.dequantize().shape == (k, n)
            assert tensor_.rows([0, n - 1]).shape == (2, k)
            assert (np.ones((1, k), np.float32) @ tensor_).shape == (1, n)
            assert tensor_.has_finite_scales in (True, False)
            assert tensor_._resident.blocks(INTERLEAVED16).size >= tensor_.nbytes
        elif isinstance(tensor_, ExpertTensor):
            assert len(tensor_) == tensor_.shape[0]
            assert sum(w.nbytes for w in tensor_) == tensor_.nbytes
            assert tensor_[0].dequantize().shape == tensor_.shape[1:]
        else:
            assert tensor_.dtype == np.float32
            tensor_.sum(dtype=np.float64)
    return used


@pytest.fixture
def _empty_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test an empty pool for small weights, allocated before it measures memory."""
    memory = np.empty(layouts._POOL_BYTES, np.uint8)
    monkeypatch.setattr(layouts, "_pool", layouts._Pool(memory))


@pytest.mark.process
@pytest.mark.usefixtures("_empty_pool")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a sum over Inf and NaN
def test_mutations_of_a_real_file_are_read_or_refused(
    load: Callable[[bytes], GGUFFile], small: Path
) -> None:
    rng = random.Random(20240229)
    whole = small.read_bytes()
    header = header_bytes(small)
    outcomes = {"read": 0, "refused": 0}
    messages: list[str] = []
    slowest_s = 0.0
    use_everything(load(whole))  # fills the caches
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
    assert all("expected" in message and len(message) < 1500 for message in messages)
    assert slowest_s < 5  # generous: only a hang is a failure
    assert peak < 4 * MB


# --- a real model ---------------------------------------------------------------------------------


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
def test_a_real_model_equals_what_gguf_reads(smollm2: Path) -> None:
    model = load_gguf(smollm2)
    wanted = {stored.name: stored for stored in gguf.GGUFReader(smollm2).tensors}
    assert model.keys() == wanted.keys()
    for name, tensor_ in model.items():
        stored = wanted[name]
        if isinstance(tensor_, QuantizedTensor):
            assert tensor_.shape == tuple(stored.shape.tolist())
            assert tensor_.format == stored.tensor_type.name
            assert np.array_equal(tensor_.raw, stored.data)
        else:
            assert np.array_equal(tensor_, stored.data)
    assert model.metadata["general.architecture"] == "llama"
    tokens = model.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, tuple)
    assert len(tokens) == 49152
    assert tokens[:2] == ("<|endoftext|>", "<|im_start|>")


@pytest.mark.model
def test_every_tensor_of_a_model_in_q4_k_m_is_listed() -> None:
    path = gemma_file()
    model = load_gguf(path)
    layer = (
        "attn_k attn_k_norm attn_norm attn_output attn_q attn_q_norm attn_v ffn_down ffn_gate "
        "ffn_norm ffn_up post_attention_norm post_ffw_norm"
    ).split()
    names = [f"blk.{i}.{name}.weight" for i in range(18) for name in layer]
    assert set(model.tensors) == {"token_embd.weight", "output_norm.weight", *names}
    assert list(model) == list(model.tensors)
    counts = Counter((entry.format, entry.shape) for entry in model.tensors.values())
    assert counts == {
        ("F32", (640,)): 73,
        ("F32", (256,)): 36,
        ("Q8_0", (640, 262144)): 1,
        ("Q8_0", (640, 256)): 9,
        ("Q5_0", (640, 256)): 27,
        ("Q5_0", (640, 1024)): 18,
        ("Q5_0", (640, 2048)): 36,
        ("Q4_K", (1024, 640)): 18,
        ("Q4_K", (2048, 640)): 9,
        ("Q6_K", (2048, 640)): 9,
    }
    # they fill the file from the first to its end, so all their sizes are right
    stored = sum(-(-entry.nbytes // 32) * 32 for entry in model.tensors.values())
    assert header_bytes(path) + stored == path.stat().st_size
    assert model.metadata["general.architecture"] == "gemma3"
    tokens = model.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, tuple)
    assert len(tokens) == 262144
