"""The disk cache: its keys, and correct results after damage, crashes and foreign writes."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit import CacheWarning, QuantizedTensor, config, files, quantize, specialize
from q4jit.compilers import cache, llvm
from q4jit.dispatcher import Specialized
from q4jit.targets import Target, find_target
from tests.support import child

V3 = find_target("cpu:x86-64-v3")
FLAGS = llvm.fingerprint(V3)


def key(target: Target = V3, fingerprint: str = FLAGS, text: str = "define void @f()") -> str:
    return cache.cache_key(target, fingerprint, text)


# --- keys -----------------------------------------------------------------------------------------


def test_the_same_compilation_has_the_same_key() -> None:
    assert key() == key(find_target("cpu:x86-64-v3"), llvm.fingerprint(V3))
    features = frozenset(sorted(V3.features, reverse=True))
    assert key(replace(V3, features=features)) == key()


DIFFERENT: dict[str, Callable[[], str]] = {
    "text": lambda: key(text="define void @f() "),
    "one feature less": lambda: key(replace(V3, features=V3.features - {"f16c"})),
    "one feature more": lambda: key(replace(V3, features=V3.features | {"avxvnni"})),
    "a feature that is hidden": lambda: key(replace(V3, lacks=frozenset({"avxvnni"}))),
    "name of the CPU": lambda: key(replace(V3, cpu_name="znver5")),
    "architecture": lambda: key(replace(V3, arch="x86-64")),
    "back end": lambda: key(replace(V3, backend="hip")),
    "version of the compiler": lambda: key(fingerprint=FLAGS.replace("llvm 2", "llvm 3")),
    "a flag": lambda: key(fingerprint=FLAGS.replace("-O3", "-O2")),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_change_changes_the_key(what: str) -> None:
    assert DIFFERENT[what]() != key()


def test_the_schema_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    monkeypatch.setattr(cache, "SCHEMA", cache.SCHEMA + "1")
    assert key() != before


def test_moving_text_from_one_field_to_the_next_changes_the_key() -> None:
    assert key(fingerprint="ab", text="c") != key(fingerprint="a", text="bc")
    assert key(fingerprint="a", text="text:1:b") != key(fingerprint="atext:1:b", text="")
    assert key(fingerprint="a", text="b") != key(fingerprint="b", text="a")


def test_the_fingerprint_names_versions_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "-O3" in FLAGS
    assert "-mattr=+avx,+avx2,+bmi," in FLAGS
    monkeypatch.setattr("llvmlite.__version__", "0.0.0")
    assert llvm.fingerprint(V3) != FLAGS


# --- a function and its directory -----------------------------------------------------------------


class Case:
    """A function that is specialised anew for each use, so that it always reads the disk."""

    def __init__(self, directory: Path) -> None:
        rng = np.random.default_rng(3)
        self.directory = directory
        self.w = quantize(rng.standard_normal((32, 16)).astype(np.float32), "Q4_0")
        self.x = rng.standard_normal((2, 32)).astype(np.float32)

    def use(self) -> Specialized[[NDArray[Any], QuantizedTensor], NDArray[Any]]:
        """Call the function and check its result, whatever the state of the cache."""
        function = specialize(lambda x, w: x @ w * 3)
        y = function(self.x, self.w)
        np.testing.assert_allclose(y, function.py_func(self.x, self.w), rtol=1e-5, atol=1e-5)
        return function

    def compiles(self) -> int:
        """Use the function; return how many kernels were compiled instead of read."""
        return self.use().stats.compiles

    def entry(self, suffix: str) -> Path:
        """Return the only file with a suffix; the pool's files are elsewhere, see `case`."""
        (path,) = self.directory.glob(f"*{suffix}")
        return path


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the test start as a process does that has used no cache directory yet."""
    monkeypatch.setattr(cache, "_caches", {})
    cache._warn_of_no_home.cache_clear()
    yield
    cache._warn_of_no_home.cache_clear()


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> Case:
    """Return a case with a directory of its own, which does not exist yet."""
    made = Case(tmp_path / "deep" / "cache")
    made.use()  # starts the thread pool; its kernel goes to another directory
    monkeypatch.setattr(cache, "_caches", {})
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(made.directory))
    return made


def test_a_second_function_reads_the_kernel_of_the_first(case: Case) -> None:
    assert case.compiles() == 1
    assert case.compiles() == 0
    assert case.directory.stat().st_mode & 0o777 == 0o700
    assert {path.suffix for path in case.directory.iterdir()} == {".ll", ".o", ".sha256"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in case.directory.iterdir())
    assert case.entry(".ll").read_text() == case.use().inspect_source()


def test_cache_false_keeps_a_function_off_the_disk(case: Case) -> None:
    for _ in range(2):
        function = specialize(lambda x, w: x @ w * 3, cache=False)
        function(case.x, case.w)
        assert function.stats.compiles == 1
    assert not case.directory.exists()


DAMAGE: dict[str, Callable[[Case], object]] = {
    "empty object": lambda case: case.entry(".o").write_bytes(b""),
    "truncated object": lambda case: truncate(case.entry(".o")),
    "one bit of the object": lambda case: flip(case.entry(".o")),
    "longer object": lambda case: lengthen(case.entry(".o")),
    "empty checksum": lambda case: case.entry(".sha256").write_bytes(b""),
    "truncated checksum": lambda case: truncate(case.entry(".sha256")),
    "one bit of the checksum": lambda case: flip(case.entry(".sha256")),
    "binary checksum": lambda case: case.entry(".sha256").write_bytes(b"\xff" * 64),
    "no checksum": lambda case: case.entry(".sha256").unlink(),
    "no object": lambda case: case.entry(".o").unlink(),
    "object and checksum of another key": lambda case: disguise(case.entry(".o")),
}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def disguise(path: Path) -> None:
    """Replace an entry by the complete entry of another text or schema."""
    other = path.read_bytes()[:-1] + b"\1"
    path.write_bytes(other)
    path.with_suffix(".sha256").write_text(cache._checksum("0" * 64, other))


@pytest.mark.process
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_compiled_again_and_replaced(case: Case, damage: str) -> None:
    assert case.compiles() == 1
    whole = {path.name: path.read_bytes() for path in case.directory.iterdir()}
    DAMAGE[damage](case)
    assert case.compiles() == 1
    assert {path.name: path.read_bytes() for path in case.directory.iterdir()} == whole
    assert case.compiles() == 0


def test_an_entry_of_another_schema_is_a_miss(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert case.compiles() == 1
    monkeypatch.setattr(cache, "SCHEMA", "newer")
    assert case.compiles() == 1
    assert case.compiles() == 0
    monkeypatch.undo()
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(case.directory))
    assert case.compiles() == 0  # entries of both schemas coexist


# --- directories that cannot be used --------------------------------------------------------------


def one_warning(case: Case, match: str, uses: int = 3) -> None:
    """Check that every use compiles and gives the right result, and that only one warns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = [case.compiles() for _ in range(uses)]
    assert [warning.category for warning in caught] == [CacheWarning]
    assert match in str(caught[0].message)
    assert "Q4JIT_CACHE_DIR" in str(caught[0].message)
    assert compiled == [1] * uses


def test_a_file_where_the_directory_should_be(case: Case) -> None:
    case.directory.parent.mkdir()
    case.directory.write_text("here")
    one_warning(case, "cannot be created or read")
    assert case.directory.read_text() == "here"


def test_a_directory_that_cannot_be_created(case: Case) -> None:
    case.directory.parent.write_text("a file")
    one_warning(case, "cannot be created or read")


@pytest.mark.process
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_nothing_is_executed_from_a_directory_that_others_can_write(case: Case, mode: int) -> None:
    case.use()
    case.entry(".o").write_bytes(b"never read")
    case.directory.chmod(mode)
    cache._caches.clear()
    one_warning(case, f"can be written by other users (mode {mode & 0o777:04o}, expected 0700)")
    assert case.entry(".o").read_bytes() == b"never read"  # and never written


def test_a_directory_that_others_can_read_is_used(case: Case) -> None:
    case.use()
    case.directory.chmod(0o755)
    cache._caches.clear()
    assert case.compiles() == 0


@pytest.mark.process
def test_nothing_is_executed_from_a_directory_of_another_user(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.use()
    cache._caches.clear()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    one_warning(case, f"belongs to user {os.getuid()}")


@pytest.mark.process
def test_nothing_is_executed_that_another_user_planted(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the directory was open to others, who left a file; now its mode is correct
    case.use()
    planted = case.entry(".o")
    case.entry(".sha256").chmod(0o600)
    real = files.is_foreign
    monkeypatch.setattr(files, "is_foreign", lambda s: s.st_ino == planted.stat().st_ino or real(s))
    with pytest.warns(CacheWarning, match="another user could have changed"):
        assert case.compiles() == 1
    monkeypatch.undo()
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(case.directory))
    assert case.compiles() == 0


@pytest.mark.process
def test_an_object_that_others_can_write_is_replaced(case: Case) -> None:
    case.use()
    case.entry(".o").chmod(0o666)
    with pytest.warns(CacheWarning, match="another user could have changed"):
        assert case.compiles() == 1
    assert case.entry(".o").stat().st_mode & 0o777 == 0o600
    assert case.compiles() == 0


@pytest.mark.process
@pytest.mark.parametrize("suffix", [".sha256", ".ll"])
def test_other_files_that_others_can_write_are_replaced(case: Case, suffix: str) -> None:
    case.use()
    case.entry(suffix).chmod(0o666)
    if suffix == ".sha256":  # the source is never read
        with pytest.warns(CacheWarning, match=r"another user could have changed \w+\.sha256"):
            assert case.compiles() == 1
        assert case.entry(suffix).stat().st_mode & 0o777 == 0o600
    assert case.compiles() == 0


def a_folder(path: Path) -> None:
    path.mkdir()


def a_full_folder(path: Path) -> None:
    path.mkdir()
    path.joinpath("file").write_text("of a user")


def a_link(path: Path) -> None:
    path.symlink_to(path.rename(path.with_name("elsewhere")))


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def a_huge_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def a_socket(path: Path) -> None:
    home = Path.cwd()
    os.chdir(path.parent)  # the path of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(home)


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.process
@pytest.mark.parametrize("suffix", [".o", ".sha256", ".ll"])
@pytest.mark.parametrize(
    "put", [a_folder, a_full_folder, a_link, a_dangling_link, a_loop, a_huge_file, a_socket, a_fifo]
)
def test_whatever_is_in_the_place_of_a_file_is_replaced(
    case: Case, put: Callable[[Path], None], suffix: str
) -> None:
    case.use()
    path = case.entry(suffix)
    whole = path.read_bytes()
    if put is not a_link:
        path.unlink()
    put(path)
    if suffix == ".ll":  # written only with its object
        case.entry(".o").unlink()
    assert case.compiles() == 1
    assert path.read_bytes() == whole
    assert path.lstat().st_mode & 0o777 == 0o600
    assert case.compiles() == 0
    moved = [child for folder in case.directory.glob(".moved-*") for child in folder.iterdir()]
    assert [path.name for path in moved] == ["file"] * (put is a_full_folder)


@pytest.mark.process
@pytest.mark.parametrize("mask", [0o000, 0o077, 0o777])
def test_new_directories_are_private_whatever_the_umask(case: Case, mask: int) -> None:
    case.directory = case.directory.parent / "one" / "two"
    before = os.umask(mask)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("Q4JIT_CACHE_DIR", str(case.directory))
            case.use()
    finally:
        os.umask(before)
    for folder in (case.directory, case.directory.parent, case.directory.parent.parent):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in case.directory.iterdir())


@pytest.mark.process
def test_the_directory_is_checked_at_every_use(case: Case) -> None:
    assert case.compiles() == 1
    assert case.compiles() == 0
    case.directory.chmod(0o777)
    one_warning(case, "can be written by other users (mode 0777, expected 0700)")


@pytest.mark.process
def test_a_directory_that_is_swapped_for_that_of_another_user_is_not_used(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.use()
    theirs = case.directory.with_name("theirs")
    shutil.copytree(case.directory, theirs)
    case.directory.rename(case.directory.with_name("ours"))
    case.directory.symlink_to(theirs)
    inode, real = theirs.stat().st_ino, files.is_foreign
    monkeypatch.setattr(files, "is_foreign", lambda s: s.st_ino == inode or real(s))
    one_warning(case, "belongs to user")


@pytest.mark.process
def test_a_check_and_its_use_see_the_same_directory(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its check, swap the directory for one with planted objects: they are not read."""
    case.use()
    real = cache._directory_problem

    def swap(status: os.stat_result) -> str:
        problem = real(status)
        case.directory.rename(case.directory.with_name("checked"))
        case.directory.mkdir(0o777)
        for path in case.directory.with_name("checked").iterdir():
            case.directory.joinpath(path.name).mkdir()
        return problem

    monkeypatch.setattr(cache, "_directory_problem", swap)
    assert case.compiles() == 0


@pytest.mark.process
@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE]
)
@pytest.mark.parametrize("at", ["create", "write", "replace"])
def test_a_disk_that_cannot_be_written(
    case: Case, monkeypatch: pytest.MonkeyPatch, code: int, at: str
) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    if at == "create":
        real_open = os.open

        def open_(name: Any, flags: int, *mode: int, dir_fd: int | None = None) -> int:
            opened: Callable[..., int] = refuse if flags & os.O_CREAT else real_open
            return opened(name, flags, *mode, dir_fd=dir_fd)

        monkeypatch.setattr(os, "open", open_)
    elif at == "replace":
        monkeypatch.setattr(os, "replace", refuse)
    else:
        real = os.fdopen

        def fill(handle: int, mode: str) -> Any:
            file = real(handle, mode, buffering=0)
            return _Full(file, refuse)

        monkeypatch.setattr(os, "fdopen", fill)
    one_warning(case, "cannot be written")
    monkeypatch.undo()
    assert not list(case.directory.iterdir())


class _Full:
    """A file whose disk is full after the first bytes."""

    def __init__(self, file: Any, refuse: Callable[..., Any]) -> None:
        self.file = file
        self.refuse = refuse

    def __enter__(self) -> "_Full":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.file.write(data[: len(data) // 2])
        return int(self.refuse())


AS_NOBODY = """
import pathlib, tempfile, warnings
warnings.simplefilter("always")
os.environ["Q4JIT_CACHE_DIR"] = str(pathlib.Path(sys.argv[1]))
check(specialize(lambda x, w: x @ w, cache=False))  # imports everything that a call needs
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
check(specialize(lambda x, w: x @ w * 1.5 / 1.5))
check(specialize(lambda x, w: x @ w * 1.5 / 1.5))
"""


@pytest.mark.process
@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_directory_without_permission(mode: int) -> None:
    """Use a new directory: only its user may enter pytest's."""
    base = Path(tempfile.mkdtemp())
    try:
        base.chmod(0o755)
        locked = base / "locked"
        locked.mkdir()
        if os.geteuid() == 0:
            os.chown(locked, 65534, 65534)
        locked.chmod(mode)
        command = [*child.command(AS_NOBODY), str(locked)]
        done = child.finish(command, child.environment(Q4JIT_NUM_THREADS="1"))
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("CacheWarning") == 1, done.stderr
        locked.chmod(0o700)
        assert not list(locked.iterdir())
    finally:
        shutil.rmtree(base)


@pytest.mark.process
def test_a_directory_that_vanishes_is_made_again(case: Case) -> None:
    case.use()
    shutil.rmtree(case.directory)
    assert case.compiles() == 1
    assert case.directory.stat().st_mode & 0o777 == 0o700
    assert case.compiles() == 0


def test_a_relative_directory_is_resolved_once(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("Q4JIT_CACHE_DIR", "relative")
    assert case.compiles() == 1
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert case.compiles() == 0
    assert not list(Path().iterdir())


# --- the choice of the directory ------------------------------------------------------------------


def test_the_users_cache_directory_is_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("Q4JIT_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert config.cache_dir() == tmp_path / "home" / ".cache" / "q4jit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert config.cache_dir() == tmp_path / "xdg" / "q4jit"
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(tmp_path / "ours"))
    assert config.cache_dir() == tmp_path / "ours"


def test_a_user_without_a_home(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("Q4JIT_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    one_warning(case, "no home directory")


@pytest.mark.process
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can change its user")
def test_a_user_without_an_entry_in_the_password_database() -> None:
    program = """
    import warnings
    warnings.simplefilter("always")
    check(specialize(lambda x, w: x @ w, cache=False))
    os.setgroups([])
    os.setgid(54321)
    os.setuid(54321)
    check()
    """
    unset: dict[str, Any] = {"HOME": None, "XDG_CACHE_HOME": None, "Q4JIT_CACHE_DIR": None}
    output = child.run(program, **unset, Q4JIT_NUM_THREADS="1")
    assert output.count("CacheWarning") == 1


def test_a_home_that_cannot_be_written(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("Q4JIT_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/dev/null/nobody")
    one_warning(case, "cannot be created or read")


# --- other processes ------------------------------------------------------------------------------


def whole_entries(directory: Path) -> int:
    """Check that every entry is complete; return how many there are."""
    objects = sorted(directory.glob("*.o"))
    for path in objects:
        wanted = cache._checksum(path.stem, path.read_bytes())
        assert path.with_suffix(".sha256").read_text() == wanted
        assert path.with_suffix(".ll").read_text()
    return len(objects)


MANY = """
functions = [specialize(lambda x, w, i=i: x @ w + i) for i in range(6)]
gate = sys.argv[1]
while not os.path.exists(gate):
    time.sleep(0.001)
for i, function in enumerate(functions):
    y = function(x_small, small, i)
    np.testing.assert_allclose(y, expected_small + i, rtol=1e-4, atol=1e-4)
print(sum(function.stats.compiles for function in functions))
"""


@pytest.mark.process
def test_many_processes_share_a_directory(tmp_path: Path) -> None:
    directory, gate = tmp_path / "cache", tmp_path / "gate"
    env = child.environment(Q4JIT_CACHE_DIR=str(directory), Q4JIT_NUM_THREADS="2")
    command = [*child.command(MANY), str(gate)]
    pipe = subprocess.PIPE
    many = [
        subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True) for _ in range(8)
    ]
    try:
        time.sleep(1)  # most of them wait at the gate by then
        gate.touch()
        for process in many:
            out, errors = process.communicate(timeout=child.TIMEOUT_S)
            assert process.returncode == 0, errors
            assert not errors
            assert 0 <= int(out) <= 6
    finally:
        for process in many:
            process.kill()
    assert whole_entries(directory) == 7  # six functions and the pool
    assert not list(directory.glob(".new-*"))
    done = child.finish(command, env)
    assert done.stdout.split() == ["0"], done.stderr


ENDLESS = """
for i in range(1000):
    function = specialize(lambda x, w, i: x @ w + i)
    y = function(x_small, small, i)
    np.testing.assert_allclose(y, expected_small + i, rtol=1e-4, atol=1e-4)
    print(i, flush=True)
"""


@pytest.mark.process
def test_kill_9_at_any_moment_leaves_the_cache_usable(tmp_path: Path) -> None:
    """Kill the process at random moments between its first and about its tenth kernel."""
    directory = tmp_path / "cache"
    env = child.environment(Q4JIT_CACHE_DIR=str(directory), Q4JIT_NUM_THREADS="2")
    moments = np.random.default_rng().uniform(0, 0.15, 20)
    for moment in moments:
        with subprocess.Popen(
            child.command(ENDLESS), env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"0\n"  # the cache still gives the right kernel
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
    for path in directory.glob("*.o"):
        assert path.with_suffix(".sha256").exists()
    output = child.run(ENDLESS.replace("1000", "3"), Q4JIT_CACHE_DIR=str(directory))
    assert output.split() == ["0", "1", "2"]
    whole_entries(directory)


def test_old_leftovers_of_killed_writers_are_removed(case: Case) -> None:
    case.directory.mkdir(parents=True, mode=0o700)
    old, new = case.directory / ".new-old", case.directory / ".new-new"
    for path in (old, new):
        path.write_bytes(b"half an obj")
    os.utime(old, (0, 0))
    assert case.compiles() == 1
    assert case.compiles() == 0
    assert not old.exists()
    assert new.exists()  # its writer may still be running


def test_an_interrupt_while_writing_leaves_no_half_entry(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        case.use()
    monkeypatch.undo()
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(case.directory))
    assert not list(case.directory.iterdir())
    assert case.compiles() == 1
    assert case.compiles() == 0


@pytest.mark.process
def test_ctrl_c_at_any_moment_leaves_function_and_cache_usable(tmp_path: Path) -> None:
    """Interrupt first calls after growing delays; the longest allows a complete call."""
    child.run(
        """
        import signal
        interrupted = 0
        for i in range(40):
            function = specialize(lambda x, w, i: x @ w + i)
            signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.004 * (i % 20))
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            try:
                function(x_small, small, i)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    pass
            y = function(x_small, small, i)
            np.testing.assert_allclose(y, expected_small + i, rtol=1e-4, atol=1e-4)
        assert interrupted > 5, interrupted
        check()
        """,
        Q4JIT_CACHE_DIR=str(tmp_path / "cache"),
        Q4JIT_NUM_THREADS="3",
    )
    whole_entries(tmp_path / "cache")


def test_a_cached_kernel_starts_no_compiler(tmp_path: Path) -> None:
    program = """
    product(x_small, small)
    print(product.stats.compiles, {"jinja2", "subprocess"} & set(sys.modules))
    """
    settings = {"Q4JIT_CACHE_DIR": str(tmp_path / "kernels"), "Q4JIT_NUM_THREADS": "2"}
    assert child.run(program, **settings) == "1 set()\n"
    assert child.run(program, **settings) == "0 set()\n"
