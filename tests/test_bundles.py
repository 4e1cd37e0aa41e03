"""q4jit runs from a zip file, and in a bundle that has no Python interpreter."""

import py_compile
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import q4jit
from q4jit.compilers import find, programs
from q4jit.compilers.nvrtc import NvRtc
from q4jit.errors import TargetError
from q4jit.targets import find_target
from tests.support import child
from tests.support.paths import ROOT

PACKAGE = Path(str(q4jit.__file__)).parent


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return q4jit as a zip file, with the files of the wheel."""
    path = tmp_path_factory.mktemp("zip") / "app.zip"
    folders = {PACKAGE: "q4jit", ROOT / "templates": "q4jit/templates"}
    with zipfile.ZipFile(path, "w") as out:
        for folder, name in folders.items():
            for file in folder.rglob("*"):
                if file.is_file() and "__pycache__" not in file.parts:
                    out.write(file, Path(name) / file.relative_to(folder))
    return path


def run(program: str, archive: Path) -> "subprocess.CompletedProcess[str]":
    python, *rest = child.command(program)
    env = child.environment(PYTHONPATH=str(archive))
    return child.finish([python, "-P", *rest], env)  # not the checkout in the working directory


def test_a_zip_file_has_all_that_calls_and_texts_need(archive: Path) -> None:
    program = """
    import q4jit
    from q4jit.compilers.programs import python_program
    from q4jit.hip import tunings
    assert "app.zip" in q4jit.__file__
    check()
    assert "kernel" in product.inspect_source("hip:gfx1100")
    assert "prelude/amd" not in product.inspect_source("hip:gfx1100")
    assert tunings.shipped("sm_90") and not tunings.shipped("gfx900")
    for name in ("hiprtc_child.py", "nvrtc_child.py"):
        assert "import" in open(python_program(name)[-1]).read()
    from q4jit.tools.cli.main import main
    from q4jit.tools import provenance
    assert provenance.version() in ("unknown", "0.1.0") and provenance.commit() is None
    """
    done = run(program, archive)
    assert done.returncode == 0, done.stderr


def test_an_error_in_a_zip_file_names_the_template(archive: Path) -> None:
    program = """
    from q4jit.hip.templates import environment
    try:
        environment().get_template("kernel/missing.hip.j2")
    except Exception as error:
        print(error)
    """
    done = run(program, archive)
    assert "app.zip/q4jit/templates/kernel/missing.hip.j2" in done.stdout, done.stderr


def test_errors_show_the_users_line_where_modules_have_no_files(tmp_path: Path) -> None:
    """As in a bundle: code names other paths than `__file__`, and has no source."""
    for path in PACKAGE.rglob("*.py"):
        inside = Path("q4jit", path.relative_to(PACKAGE))
        compiled = str(tmp_path / inside.with_suffix(".pyc"))
        py_compile.compile(str(path), compiled, str(inside), doraise=True)
    program = """
    import q4jit
    assert q4jit.__file__.endswith("__init__.pyc")
    def wrong(x):
        return np.mean(x) if x > 0 else x
    for function in (wrong, lambda x: np.clip(x, 0, "one")):
        try:
            specialize(function)(x_small)
        except q4jit.TraceError as error:
            print(str(error).partition("\\n\\n")[2])
    """
    done = run(program, tmp_path)
    assert [line.rpartition(", in ")[2] for line in done.stdout.splitlines()] == [
        "wrong",
        "<lambda>",
    ], done.stderr
    assert done.stdout.count("File '<string>'") == 2


def test_a_bundle_is_not_started_as_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert not list(find._hiprtcs())
    with pytest.raises(TargetError, match="bundle without an interpreter"):
        programs.python_program("nvrtc_child.py")


def test_nvrtc_in_a_bundle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(NvRtc, "archs", lambda self: ("sm_90",))
    with pytest.raises(TargetError, match="bundle without an interpreter"):
        NvRtc().compile_object("", find_target("hip:sm_90"))


def test_pyinstaller_finds_the_hook() -> None:
    from q4jit.bundling import hook_directories

    (folder,) = map(Path, hook_directories())
    assert "collect_data_files" in (folder / "hook-q4jit.py").read_text(encoding="utf-8")
