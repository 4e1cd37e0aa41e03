"""The provenance of a report."""

from pathlib import Path

from q4jit.tools.provenance import commit


def test_the_commit_is_read_from_the_files_of_git(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit(tmp_path) is None
    (git / "packed-refs").write_text(
        "# pack-refs\nabc refs/heads/maintenance\ndef refs/heads/main\n"
    )
    assert commit(tmp_path) == "def"
    (git / "refs" / "heads" / "main").write_text("123\n")
    assert commit(tmp_path) == "123"
    (git / "HEAD").write_text("456\n")
    assert commit(tmp_path) == "456"
