"""Models that are split into several files: joined, or refused with the reason."""

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from q4jit.errors import GGUFError, MissingNameError
from q4jit.weights.gguf.file import load_gguf
from q4jit.weights.tensor import QuantizedTensor
from tests.support.gguf_files import STRING, U16, U64, build, key, tensor, text, u64

NAMES = ("a", "b", "c")


def keys(number: int, count: int, tensors: int | None = None) -> tuple[bytes, ...]:
    """Return the keys of a part as `llama-gguf-split` writes them."""
    no, parts = struct.pack("<H", number), struct.pack("<H", count)
    split = key("split.no", U16, no), key("split.count", U16, parts)
    return split if tensors is None else (*split, key("split.tensors.count", U64, u64(tensors)))


def part(number: int, count: int = 3, tensors: int | None = 3, name: str = "") -> bytes:
    """Return a file with one vector of four numbers, which are `number`."""
    more = (key("general.name", STRING, text("whole")),) if number == 0 else ()
    vector = tensor(name or NAMES[number], (4,))
    data = np.full(4, number, "<f4").tobytes() + bytes(16)
    return build(keys=(*more, *keys(number, count, tensors)), tensors=(vector,), data=data)


def path_of(folder: Path, number: int, count: int = 3) -> Path:
    return folder / f"m-{number + 1:05}-of-{count:05}.gguf"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Return a folder with the three parts of a model."""
    for number in range(3):
        path_of(tmp_path, number).write_bytes(part(number))
    return tmp_path


def refusal(path: Path) -> str:
    with pytest.raises(GGUFError) as caught:
        load_gguf(path)
    assert len(str(caught.value)) < 700
    return str(caught.value)


@pytest.mark.parametrize("opened", range(3))
def test_any_part_opens_the_whole_model(whole: Path, opened: int) -> None:
    path = path_of(whole, opened)
    model = load_gguf(path)
    assert list(model) == list(NAMES)
    for number, name in enumerate(NAMES):
        assert np.array_equal(model[name], np.full(4, number))
    assert model.metadata["general.name"] == "whole"
    assert model.paths == tuple(str(path_of(whole, number)) for number in range(3))
    assert repr(model) == f"<GGUFFile {path}: 3 tensors in 3 files, 4 keys>"
    assert list(pickle.loads(pickle.dumps(model))) == list(NAMES)
    with pytest.raises(MissingNameError, match=f"{path.name}: no tensor named 'd'"):
        model["d"]
    first = model["a"]
    model.close()
    assert np.array_equal(first, np.zeros(4))
    with pytest.raises(GGUFError, match=r"m-00003-of-00003\.gguf: the file is closed"):
        model["c"]


def test_a_model_that_gguf_has_split_is_joined(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=2)
    writer.add_uint32("n", 7)
    weights = {f"w{i}": np.full((3, 8), i, np.float32) for i in range(5)}
    for name, w in weights.items():
        writer.add_tensor(name, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (last,) = tmp_path.glob("*-00003-of-00003.gguf")
    model = load_gguf(last)
    assert list(model) == list(weights)
    assert model.metadata["n"] == 7
    for name, w in weights.items():
        tensor_ = model[name]
        assert isinstance(tensor_, QuantizedTensor)
        assert np.array_equal(tensor_.dequantize().T, w)


def test_a_link_is_joined_with_the_parts_beside_it(whole: Path, tmp_path: Path) -> None:
    """Download caches keep the files elsewhere, under other names."""
    links = tmp_path / "snapshot"
    links.mkdir()
    for number in range(3):
        path_of(links, number).symlink_to(path_of(whole, number).rename(whole / f"blob{number}"))
    assert list(load_gguf(path_of(links, 1))) == list(NAMES)


def test_missing_parts_are_named(whole: Path) -> None:
    path_of(whole, 0).unlink()
    path_of(whole, 2).unlink()
    assert refusal(path_of(whole, 1)) == (
        f"{path_of(whole, 1)}: expected a whole model, got part 2 of 3; missing beside it: "
        "m-00001-of-00003.gguf, m-00003-of-00003.gguf; put all parts into one folder"
    )


def test_the_message_about_many_missing_parts_is_short(tmp_path: Path) -> None:
    path = path_of(tmp_path, 0, 65535)
    path.write_bytes(part(0, 65535))
    assert "m-00005-of-65535.gguf and 65530 more; put" in refusal(path)


def test_a_renamed_part_is_refused(tmp_path: Path) -> None:
    for name, right in {
        "m.gguf": "m-00002-of-00003.gguf",
        "m-00001-of-00003.gguf": "m-00002-of-00003.gguf",
        "m-00002-of-00004.gguf": "m-00002-of-00003.gguf",
        "m-00002-of-00003.bin": "m-00002-of-00003.gguf",
    }.items():
        (tmp_path / name).write_bytes(part(1))
        assert f"expected a file named {right}, because it is part 2 of 3, got {name};" in refusal(
            tmp_path / name
        )
        (tmp_path / name).unlink()


def test_a_number_beyond_the_parts_is_refused(tmp_path: Path) -> None:
    path = path_of(tmp_path, 3)
    counts = key("split.count", U16, struct.pack("<H", 3))
    huge = key("split.no", U16, bytes(2)), key("split.count", U64, u64(10**12))
    for keys_, got in ((keys(3, 3), "3 and 3"), ((counts,), "no number and 3"), (huge, "0 and 10")):
        path.write_bytes(build(keys=keys_))
        assert f"expected split.no below split.count, and split.count up to 99999, got {got}" in (
            refusal(path)
        )
        path.unlink()


def test_a_file_in_one_part_is_a_whole_model(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    text_ = key("split.count", STRING, text("3"))
    for keys_ in ((text_,), keys(0, 1), keys(0, 0), keys(0, 1, 0)):
        path.write_bytes(build(keys=keys_))
        assert len(load_gguf(path)) == 0
        path.unlink()


INCONSISTENT: dict[str, tuple[Callable[[], bytes], str]] = {
    "another count": (
        lambda: part(2, 4),
        "m-00003-of-00003.gguf: key 'split.count': expected 3, got 4",
    ),
    "another number": (
        lambda: part(1, name="c"),
        "m-00003-of-00003.gguf: key 'split.no': expected 2, got 1",
    ),
    "a whole model": (
        lambda: build(tensors=(tensor("c", (4,)),), data=bytes(32)),
        "m-00003-of-00003.gguf: key 'split.no': expected 2, got no such key",
    ),
    "a number in words": (
        lambda: build(keys=(key("split.no", STRING, text("2")),)),
        "m-00003-of-00003.gguf: key 'split.no': expected 2, got another value",
    ),
    "a tensor twice": (
        lambda: part(2, name="a"),
        "m-00003-of-00003.gguf: tensor 'a': expected a tensor in one part only, got the same name",
    ),
    "another number of tensors": (
        lambda: part(2, tensors=4),
        "m-00003-of-00003.gguf: key 'split.tensors.count': expected 3, got 4",
    ),
    "a tensor that is missing": (
        lambda: build(keys=keys(2, 3, 3)),
        "m-00001-of-00003.gguf: key 'split.tensors.count': expected 2, got 3",
    ),
    "a damaged file": (
        lambda: part(2)[:-17],
        "m-00003-of-00003.gguf: tensor 'c' at byte 110: expected data in the file's",
    ),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_parts_that_do_not_belong_together_are_refused(whole: Path, case: str) -> None:
    data, message = INCONSISTENT[case]
    path_of(whole, 2).write_bytes(data())
    assert message in refusal(path_of(whole, 0))
    assert f"{whole}/m-0000" in refusal(path_of(whole, 0))


def test_only_files_of_the_folder_are_read(tmp_path: Path) -> None:
    """Nothing in a file decides which other files are opened."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "..-00001-of-00002.gguf").write_bytes(part(0, 2, 2))
    (tmp_path / "-00002-of-00002.gguf").write_bytes(part(1, 2, 2))
    assert "missing beside it: ..-00002-of-00002.gguf;" in refusal(
        folder / "..-00001-of-00002.gguf"
    )


def test_a_part_that_is_no_file_is_refused(whole: Path) -> None:
    path_of(whole, 2).unlink()
    path_of(whole, 2).mkdir()
    assert refusal(path_of(whole, 0)) == f"{path_of(whole, 2)} is not a regular file"
