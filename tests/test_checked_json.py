"""JSON from files of other programs."""

import os
from pathlib import Path

import pytest

from q4jit.checked_json import read_json
from q4jit.errors import FormatError


def test_what_was_opened_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check of the path would not see a device that takes the file's place afterwards."""
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    with pytest.raises(FormatError, match="/dev/null: expected a regular file, got crw"):
        read_json(Path("/dev/null"), "a report")


def test_a_pipe_and_a_huge_file_are_refused_at_once(tmp_path: Path) -> None:
    pipe, sparse = tmp_path / "pipe", tmp_path / "sparse"
    os.mkfifo(pipe)
    with pytest.raises(FormatError, match="expected a regular file, got prw"):
        read_json(pipe, "a report")
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FormatError, match=r"expected at most 67,108,864 bytes, got 1,099"):
        read_json(sparse, "a report")


@pytest.mark.parametrize("data", [b"{", b"\xff", b"", b"[" * 100_000])
def test_other_contents_are_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"expected a report, got text that is not JSON \("):
        read_json(path, "a report")


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing", "a report")
