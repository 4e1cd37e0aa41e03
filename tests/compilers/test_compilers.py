"""The compilers of HIP text: reproducible bytes, useful errors, and crashes that stay outside."""

import hashlib
import importlib.util
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from q4jit.compilers import hiprtc, llvm, nvrtc
from q4jit.compilers.cache import Compiler
from q4jit.compilers.clang import Clang, pinned_flags
from q4jit.compilers.codeobject import disassemble, kernel_infos
from q4jit.compilers.find import find_compiler
from q4jit.compilers.hiprtc import HipRtc
from q4jit.compilers.nvrtc import NvRtc
from q4jit.errors import CompileError, ConfigError, TargetError
from q4jit.targets import Target, host_target
from tests.support.compilers import chosen, the_clang, the_compiler, the_hipcc, the_nvrtc
from tests.support.hip_cases import RECORDED
from tests.support.hip_texts import hip_text
from tests.support.paths import ROOT
from tests.support.tools import require_tool

GFX90A = Target("hip", "gfx90a")


# gemv_dot of 16 rows is not compared: hiprtc 5.2.3 loads further ahead and uses 1.5 times as many
# registers for it, without spills.
NAMED = {kernel.name: kernel for kernel in RECORDED}
COMPARED = [NAMED[name] for name in ("gemv 1 Q4_0", "gemv 16 Q8_0", "gemv_dot 1 Q4_0")]
COMPARED += [NAMED[name] for name in ("tile Q4_0", "tile Q4_1 f16")]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save repros in the test's folder; a shell needs quotes for its name."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for name in ("ROCM_PATH", "ROCM_HOME", "HIP_PATH"):
        monkeypatch.delenv(name, raising=False)


EACH = [
    ("hipcc", "gfx90a"),
    ("hipcc", "gfx1030"),
    ("clang", "gfx1100"),
    ("ziglang", "gfx90a"),
    ("ziglang", "gfx1201"),
    ("hiprtc", "gfx90a"),
    ("hiprtc", "gfx1030"),
    ("nvrtc", "sm_90"),
]
ONE_ARCH = [("hipcc", "gfx90a"), ("ziglang", "gfx1201"), ("hiprtc", "gfx90a"), ("nvrtc", "sm_90")]


# --- output ---------------------------------------------------------------------------------------

REPEAT = """
import hashlib
from tests.support.hip_texts import hip_text
from tests.support.compilers import the_compiler
compiler, target = the_compiler({name!r}, {arch!r})
text = hip_text(target) + {more!r}
print(hashlib.sha256(compiler.compile_object(text, target)).hexdigest(), end="")
"""


@pytest.mark.ratchet
@pytest.mark.parametrize(("name", "arch"), EACH)
def test_bytes_depend_on_no_path_and_no_environment(name: str, arch: str, tmp_path: Path) -> None:
    compiler, target = the_compiler(name, arch)
    device = "__device__" if name == "nvrtc" else "__attribute__((device))"
    # __FILE__ of hiprtc is in a folder with a random name
    more = "" if name == "hiprtc" else f"{device} const char* volatile file = __FILE__;\n"
    wanted = hashlib.sha256(compiler.compile_object(hip_text(target) + more, target)).hexdigest()
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        environment = {
            "PYTHONPATH": str(ROOT),
            "PYTHONHASHSEED": seed,
            "TMPDIR": str(tmp_path / seed),
            # hipcc and clang would obey these; HIP_PATH would make hipcc use another clang
            "HIPCC_COMPILE_FLAGS_APPEND": "-O0",
            "CCC_OVERRIDE_OPTIONS": "x-O3 +-O0",
            "HIP_PATH": "/nonsense",
        }
        done = subprocess.run(
            [sys.executable, "-c", REPEAT.format(name=name, arch=arch, more=more)],
            cwd=tmp_path / seed,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == wanted, done.stderr


@pytest.mark.ratchet
@pytest.mark.parametrize("arch", ["gfx90a", "gfx1030", "gfx1100"])
def test_hipcc_and_its_clang_produce_the_same_bytes(arch: str) -> None:
    for kernel in COMPARED:
        for source in kernel.sources(arch):
            by_hipcc, by_clang = (
                compiler.compile_object(source.text, source.target)
                for compiler in (the_hipcc(), the_clang())
            )
            assert by_hipcc == by_clang, (kernel.name, source.symbol)


def counts(code_object: bytes) -> dict[str, int]:
    """Return how many instructions of each kind a code object has."""
    kinds = {"load": r"(?:global|flat|buffer)_load_", "dot": r"v_dot", "matrix": r"v_mfma_"}
    text = disassemble(code_object)
    return {kind: len(re.findall(rf"(?m)^\s+{name}", text)) for kind, name in kinds.items()}


@pytest.mark.ratchet
@pytest.mark.parametrize("arch", ["gfx90a", "gfx1030"])
def test_hiprtc_and_hipcc_agree(arch: str) -> None:
    require_tool("llvm-objdump-15", "llvm-15")
    seen = set()
    for kernel in COMPARED:
        for source in kernel.sources(arch):
            by_hiprtc, by_hipcc = (
                compiler.compile_object(source.text, source.target)
                for compiler in (chosen("hiprtc", source.target), the_hipcc())
            )
            (info,), (wanted,) = (kernel_infos(data).values() for data in (by_hiprtc, by_hipcc))
            where = (kernel.name, info, wanted)
            assert (info.scratch_bytes, info.vgpr_spills, info.sgpr_spills) == (0, 0, 0), where
            assert info.lds_bytes == wanted.lds_bytes, where
            for kind in ("vgprs", "agprs"):
                expected = getattr(wanted, kind)
                assert getattr(info, kind) == pytest.approx(expected, rel=0.1), where
            # SGPRs belong to the wave and are allocated in groups of 8
            assert info.sgprs == pytest.approx(wanted.sgprs, rel=0.1, abs=8), where
            numbers = counts(by_hiprtc)
            assert numbers == pytest.approx(counts(by_hipcc), rel=0.1), where
            seen |= {kind for kind, number in numbers.items() if number}
    assert seen == ({"load", "dot", "matrix"} if arch == "gfx90a" else {"load", "dot"})


@pytest.mark.ratchet
@pytest.mark.parametrize(("name", "arch"), EACH)
def test_assembly_comes_from_the_same_compilation(name: str, arch: str) -> None:
    if name == "hiprtc":
        require_tool("llvm-objdump-15", "llvm-15")
    compiler, target = the_compiler(name, arch)
    assembly = compiler.compile_assembly(hip_text(target), target)
    wanted = "mul.rn.f32" if name == "nvrtc" else "v_dot4"
    assert wanted in assembly
    assert arch in assembly or name == "hiprtc"


def test_compilers_do_not_fuse_products_and_sums() -> None:
    text = 'extern "C" __attribute__((global)) void f(float* p) { p[0] = p[1] * p[2] + p[3]; }\n'
    for name in ("hipcc", "ziglang"):
        assembly = chosen(name, GFX90A).compile_assembly(text, GFX90A)
        assert "v_mul_f32" in assembly
        assert not re.search(r"v_(fma|mac|fmac)", assembly)
    compiler, target = the_compiler("nvrtc", "sm_90")
    text = 'extern "C" __global__ void f(float* p) { p[0] = p[1] * p[2] + p[3]; }\n'
    assert "fma" not in compiler.compile_assembly(text, target)


@pytest.mark.parametrize(("name", "arch"), EACH)
def test_a_fingerprint_names_compiler_version_and_arch(name: str, arch: str) -> None:
    compiler, target = the_compiler(name, arch)
    fingerprint = compiler.fingerprint(target)
    assert fingerprint == compiler.fingerprint(target)
    assert re.search(r"\d+\.\d+", fingerprint)
    assert f"={arch}" in fingerprint
    assert fingerprint.startswith(name)
    assert not re.search(r"\s/", fingerprint)  # no path of the compiler
    suffixes = (compiler.SOURCE_SUFFIX, compiler.SUFFIX)
    assert suffixes == (".hip", ".cubin" if name == "nvrtc" else ".hsaco")


def test_flags_are_pinned_in_one_place() -> None:
    fingerprints = (the_clang().fingerprint(GFX90A), chosen("hiprtc", GFX90A).fingerprint(GFX90A))
    pinned = " ".join(pinned_flags(GFX90A))
    assert [each.endswith(f" {pinned}") for each in fingerprints] == [True, True]
    assert "-ffp-contract=off" in pinned


# --- errors in the text ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arch"), ONE_ARCH)
def test_an_error_shows_the_broken_line(name: str, arch: str) -> None:
    compiler, target = the_compiler(name, arch)
    text = hip_text(target) + "int broken() { return undeclared; }\n"
    line = text.count("\n")
    with pytest.raises(CompileError) as caught:
        compiler.compile_object(text, target)
    error = caught.value
    assert error.compiler == name
    assert error.source == text
    assert error.lines == (line,)
    assert "undeclared" in error.log
    assert f"kernel.hip{'(' if name == 'nvrtc' else ':'}{line}" in error.log
    assert f"{line:5d}  int broken()" in str(error)
    assert any(arch in flag for flag in error.flags)
    assert set(error.flags) <= set(error.command)
    mapped = error.with_origins({line: "kernel/gemv.hip.j2:12", 1: "gemv.hip.j2:1"})
    assert "int broken() { return undeclared; }    <- kernel/gemv.hip.j2:12" in str(mapped)
    assert "kernel/gemv.hip.j2:1\n" not in str(mapped)
    assert (mapped.command, mapped.repro) == (error.command, error.repro)


@pytest.mark.ratchet
@pytest.mark.parametrize(("name", "arch"), ONE_ARCH)
def test_a_saved_repro_fails_like_the_compilation(name: str, arch: str, tmp_path: Path) -> None:
    compiler, target = the_compiler(name, arch)
    with pytest.raises(CompileError) as caught:
        compiler.compile_object("int broken() { return undeclared; }\n", target)
    repro = caught.value.repro
    assert repro is not None
    assert "it's here" in str(repro)
    done = subprocess.run(
        ["sh", str(repro / "repro.sh")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "undeclared" in done.stdout + done.stderr
    with pytest.raises(CompileError) as again:
        compiler.compile_object("int broken() { return undeclared; }\n", target)
    assert again.value.repro == repro  # equal failures share one folder


def test_an_error_of_llvm_has_line_command_and_repro() -> None:
    with pytest.raises(CompileError) as caught:
        llvm.compile_object("define void @f() {\n  frobnicate\n}\n", host_target())
    assert caught.value.lines == (2,)
    assert caught.value.command[0] == "llc"
    assert caught.value.repro is not None
    assert "frobnicate" in (caught.value.repro / "kernel.ll").read_text("utf-8")


def test_an_unwritable_folder_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nonsense")
    with pytest.raises(CompileError, match="frobnicate") as caught:
        llvm.compile_object("define void @f() {\n  frobnicate\n}\n", host_target())
    assert caught.value.repro is None
    assert any("cannot save a repro" in note for note in caught.value.__notes__)
    assert caught.value.with_origins({}).__notes__ == caught.value.__notes__


def test_errors_in_a_long_text_show_the_lines_around_them() -> None:
    source = "".join(f"line {i};\n" for i in range(1, 1001))
    log = "kernel.hip:500:1: error: a\nkernel.hip(20): error: b\nkernel.hip:500:9: note: c\nx:7: d"
    error = CompileError("clang", (), log + "\nkernel.hip:5000:1: no such line", source)
    assert error.lines == (500, 20)
    shown = re.findall(r"^ *(\d+)  line \1;$", str(error), re.MULTILINE)
    assert shown == [str(i) for i in (*range(16, 25), *range(496, 505))]
    assert str(error).endswith("… (1000 lines)")
    assert "line 1;" not in str(error)


# --- archs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", [the_hipcc, the_clang, lambda: chosen("hiprtc", GFX90A)])
def test_an_unknown_arch_is_refused_before_the_call(
    compiler: Callable[[], Compiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = compiler()
    assert isinstance(installed, Clang | HipRtc)
    known = installed.archs()
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(TargetError, match=r"compile for gfx1201; it knows .*gfx90a") as caught:
        installed.compile_object("", Target("hip", "gfx1201"))
    assert all(arch in str(caught.value) for arch in known)


def test_nvrtc_refuses_an_unknown_arch() -> None:
    with pytest.raises(TargetError, match=r"nvrtc cannot compile for sm_1; it knows .*sm_90"):
        the_nvrtc().compile_object("", Target("hip", "sm_1"))


def test_a_crash_of_hiprtc_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = chosen("hiprtc", GFX90A)
    monkeypatch.setattr(hiprtc, "refuse_unknown", lambda *_: None)
    target = Target("hip", "gfx1201")
    if target.arch in HipRtc().archs():
        pytest.skip("this hiprtc knows every arch")
    with pytest.raises(CompileError) as caught:
        compiler.compile_object(hip_text(target), target)
    assert caught.value.log.strip()


# --- compilers that misbehave ---------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., Clang]:
    """Return a function that makes a clang which knows gfx90a and runs a shell script instead."""

    def make(script: str, name: str = "clang", time_limit_s: float = 60) -> Clang:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            '#!/bin/sh\ncase "$*" in\n'
            "  *--version*) echo fake version 1.0; exit ;;\n"
            "  *-print-supported-cpus*) printf '\\tgfx90a\\n' >&2; exit ;;\n"
            f"esac\n{script}\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return Clang(name, (str(path),), time_limit_s=time_limit_s)

    return make


def test_a_crash_is_an_error_with_its_log(fake: Callable[..., Clang]) -> None:
    compiler = fake("echo PLEASE submit a bug report >&2; kill -SEGV $$")
    with pytest.raises(CompileError, match=r"PLEASE submit[^\n]*\ncrashed: signal SIGSEGV"):
        compiler.compile_object("", GFX90A)


def test_an_error_names_the_exit_status(fake: Callable[..., Clang]) -> None:
    with pytest.raises(CompileError, match="exit status 7"):
        fake("exit 7").compile_assembly("", GFX90A)


def test_a_compiler_that_writes_nothing_is_an_error(fake: Callable[..., Clang]) -> None:
    with pytest.raises(CompileError, match=r"wrote no kernel\.hsaco"):
        fake("exit 0").compile_object("", GFX90A)


def test_every_call_ignores_the_users_configuration_file(
    fake: Callable[..., Clang], tmp_path: Path
) -> None:
    """Check that every call has the flag, unless the driver refuses it."""
    log = tmp_path / "calls"
    knows = fake(f'echo "$*" >> {log}; touch kernel.hsaco', "clang-16")
    lacks = fake(f'echo "$*" >> {log}; touch kernel.hsaco', "clang-15")
    script = Path(lacks.program[0])
    refusal = 'case "$*" in *--no-default-config*) echo unsupported option >&2; exit 1 ;; esac'
    script.write_text(script.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{refusal}\n"))
    for compiler, wanted in ((knows, True), (lacks, False)):
        log.unlink(missing_ok=True)
        compiler.compile_object("", GFX90A)
        with_linker = Clang("clang", compiler.program, linker=("touch",))
        with pytest.raises(CompileError, match=r"touch .*--no-undefined"):
            with_linker.compile_object("", GFX90A)
        calls = log.read_text().splitlines()
        assert len(calls) == 3
        assert [call.startswith("--no-default-config ") for call in calls] == [wanted] * 3
        assert ("--no-default-config" in compiler.fingerprint(GFX90A)) == wanted


@pytest.mark.parametrize("name", ["clang", "hipcc", "ziglang"])
def test_clang_16_and_later_ignore_the_configuration_file(name: str) -> None:
    compiler, target = the_compiler(name, "gfx90a")
    fingerprint = compiler.fingerprint(target)
    version = re.search(r"clang version (\d+)", fingerprint)
    assert version is not None
    assert ("--no-default-config" in fingerprint) == (int(version[1]) >= 16)


def ends(pid: int) -> bool:
    """Return whether a process ends within five seconds."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":  # it has ended; its new parent has not waited for it yet
            return True
        time.sleep(0.05)
    return False


def test_the_time_limit_stops_a_compiler_and_its_children(
    fake: Callable[..., Clang], tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    compiler = fake(f"sleep 600 & echo $! > {pid}; echo at work; wait", time_limit_s=0.5)
    start = time.monotonic()
    with pytest.raises(CompileError, match=r"at work\nstopped after 0\.5 s"):
        compiler.compile_object("", GFX90A)
    assert time.monotonic() - start < 10
    assert ends(int(pid.read_text()))


def test_an_interrupt_stops_the_compiler(fake: Callable[..., Clang], tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    compiler = fake(f"echo $$ > {pid}; exec sleep 600")

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    compiler.archs()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            compiler.compile_object("", GFX90A)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ends(int(pid.read_text()))


# --- the choice of a compiler ---------------------------------------------------------------------

WRITES = ": > kernel.hsaco"  # all that a suitable compiler does with an empty text
NO_LLD = "echo 'clang: error: unable to execute command: lld: No such file' >&2; exit 1"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide all compilers. PATH is one folder, where `fake` puts its scripts."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("bare")
def test_no_compiler_at_all() -> None:
    with pytest.raises(TargetError) as caught:
        find_compiler(GFX90A)
    message = str(caught.value)
    assert "no compiler for hip:gfx90a" in message
    for part in (
        "hipcc: not found in ROCM_PATH/bin and PATH",
        "clang: not",
        "ziglang: not",
        "hiprtc: not",
        "pip install 'q4jit[cross]'",
    ):
        assert part in message


@pytest.mark.usefixtures("bare")
def test_the_error_lists_unsuitable_compilers(fake: Callable[..., Clang]) -> None:
    hipcc, clang = fake(WRITES, "hipcc"), fake(WRITES, "clang-19")
    Path(clang.program[0]).write_text("#!/bin/sh\necho no such target >&2; exit 1\n")
    with pytest.raises(TargetError) as caught:
        find_compiler(Target("hip", "gfx1201"))
    unsuitable = f"hipcc ({hipcc.program[0]}): does not know gfx1201; it knows gfx90a"
    assert unsuitable in str(caught.value)
    unusable = f"clang ({clang.program[0]}): does not run: no such target; exit status 1"
    assert unusable in str(caught.value)
    assert find_compiler(GFX90A) == Clang("hipcc", hipcc.program)


@pytest.mark.usefixtures("bare")
def test_the_newest_clang_is_taken(fake: Callable[..., Clang]) -> None:
    fake("", "clang-9")
    fake("", "clang-format-19")
    newest = fake(WRITES, "clang-19")
    assert find_compiler(GFX90A) == Clang("clang", newest.program)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("broken", ["hipcc", "clang-19"])
def test_a_compiler_without_its_linker_is_passed_over(
    fake: Callable[..., Clang], broken: str
) -> None:
    without_lld = fake(NO_LLD, broken)
    with pytest.raises(TargetError) as caught:
        find_compiler(GFX90A)
    assert f"({without_lld.program[0]}): does not compile an empty text" in str(caught.value)
    assert "lld: No such file; exit status 1" in str(caught.value)
    whole = fake(WRITES, "clang-15")
    assert find_compiler(GFX90A) == Clang("clang", whole.program)


@pytest.mark.usefixtures("bare")
def test_the_named_compiler_without_its_linker_is_an_error(
    fake: Callable[..., Clang], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(NO_LLD, "clang-19")
    fake(WRITES, "hipcc")
    monkeypatch.setenv("Q4JIT_HIP_COMPILER", "clang")
    with pytest.raises(TargetError, match="lld: No such file"):
        find_compiler(GFX90A)


@pytest.fixture
def rocm_hipcc(fake: Callable[..., Clang], tmp_path: Path) -> Path:
    """Put a hipcc in PATH and the same into a folder `rocm`; return the path of the second."""
    fake(WRITES, "hipcc")
    own = tmp_path / "rocm" / "bin" / "hipcc"
    own.parent.mkdir(parents=True)
    own.symlink_to(tmp_path / "bin" / "hipcc")
    return own


@pytest.mark.usefixtures("bare")
def test_the_compiler_of_rocm_path_comes_first(
    rocm_hipcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "rocm"))
    assert find_compiler(GFX90A) == Clang("hipcc", (str(rocm_hipcc),))


@pytest.mark.usefixtures("bare")
def test_a_relative_rocm_path_starts_at_the_current_folder(
    rocm_hipcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROCM_PATH", "rocm")  # compilers run in a folder of their own
    assert find_compiler(GFX90A) == Clang("hipcc", (str(rocm_hipcc),))


def test_q4jit_hip_compiler_names_the_only_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen("ziglang", GFX90A)
    monkeypatch.setenv("Q4JIT_HIP_COMPILER", "ziglang")
    assert find_compiler(GFX90A).fingerprint(GFX90A).startswith("ziglang")
    monkeypatch.setenv("Q4JIT_HIP_COMPILER", "hipcc")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(TargetError, match=r"\(Q4JIT_HIP_COMPILER=hipcc\)"):
        find_compiler(GFX90A)
    monkeypatch.setenv("Q4JIT_HIP_COMPILER", "gcc")
    with pytest.raises(ConfigError, match="one of hipcc, clang, ziglang, hiprtc, got 'gcc'"):
        find_compiler(GFX90A)
    assert find_compiler(Target("hip", "sm_90")) == NvRtc()


def test_an_error_names_a_wrong_rocm_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for root, problem in (
        (tmp_path / "missing", "got no folder"),
        (tmp_path, "got a folder without them"),
    ):
        monkeypatch.setenv("ROCM_PATH", str(root))
        with pytest.raises(TargetError, match=problem) as caught:
            find_compiler(GFX90A)
        assert str(root) in str(caught.value)
        assert "bin/hipcc" in str(caught.value)
        assert find_compiler(Target("hip", "sm_90")) == NvRtc()


def test_hipcc_from_path_ignores_the_rocm_in_rocm_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = the_hipcc().compile_object(hip_text(GFX90A), GFX90A)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libhiprtc.so").touch()
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    monkeypatch.setenv("HIP_PATH", "/nonsense")
    compiler = find_compiler(GFX90A)
    assert compiler.compile_object(hip_text(GFX90A), GFX90A) == wanted


def test_an_error_names_a_library_that_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen("hiprtc", GFX90A)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libhiprtc.so").write_text("no library")
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    monkeypatch.setenv("Q4JIT_HIP_COMPILER", "hiprtc")
    with pytest.raises(TargetError, match=r"does not run: .*libhiprtc\.so.*(invalid|too short)"):
        find_compiler(GFX90A)


def test_an_error_names_nvidias_missing_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    nvrtc._nvrtc.cache_clear()
    with pytest.raises(TargetError, match=r"cuda-bindings .*; pip install 'q4jit\[nvidia\]'"):
        find_compiler(Target("hip", "sm_90")).compile_object("", Target("hip", "sm_90"))


def test_the_time_limit_stops_nvrtc() -> None:
    the_nvrtc()
    with pytest.raises(CompileError, match=r"stopped after 0\.001 s"):
        NvRtc(time_limit_s=0.001).compile_object("", Target("hip", "sm_90"))


def test_a_failure_inside_nvrtc_is_a_compile_error(monkeypatch: pytest.MonkeyPatch) -> None:
    the_nvrtc()
    target = Target("hip", "sm_90")
    monkeypatch.setattr(nvrtc, "_flags", lambda _: ("--no-such-flag",))
    with pytest.raises(CompileError, match="NVRTC_ERROR_INVALID_OPTION"):
        NvRtc().compile_object("", target)
    failed = type("Status", (int,), {"name": "NVRTC_ERROR_INTERNAL_ERROR"})(11)
    monkeypatch.setattr(nvrtc._nvrtc(), "nvrtcVersion", lambda: (failed,))
    with pytest.raises(CompileError, match="nvrtcVersion: NVRTC_ERROR_INTERNAL_ERROR"):
        NvRtc().fingerprint(target)


@pytest.mark.parametrize("name", ["hiprtc_child.py", "nvrtc_child.py", "llvm_child.py"])
def test_the_child_programs_import_nothing_from_q4jit(name: str) -> None:
    text = Path(hiprtc.__file__).with_name(name).read_text("utf-8")
    assert not re.search(r"^\s*(from|import) q4jit", text, re.MULTILINE)
