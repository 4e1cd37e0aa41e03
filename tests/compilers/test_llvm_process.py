"""After many compilations LLVM runs in another process, with the same results."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from q4jit.compilers import llvm, llvm_process
from q4jit.errors import CompileError
from q4jit.targets import find_target
from tests.support import child

V3 = find_target("cpu:x86-64-v3")
TEXT = f'target triple = "{V3.triple}"\ndefine i32 @f(i32 %x) {{\n  ret i32 %x\n}}\n'


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile in another process from the first compilation on."""
    monkeypatch.setattr(llvm, "MOST_COMPILATIONS_HERE", 0)
    monkeypatch.setattr(llvm_process, "_state", llvm_process._State())
    yield
    if worker := llvm_process._state.worker:
        worker.stop()


def worker_process() -> int:
    assert llvm_process._state.worker is not None
    return llvm_process._state.worker._process.pid


def test_both_processes_make_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    here = llvm.compile_object(TEXT, V3), llvm.compile_assembly(TEXT, V3)
    monkeypatch.setattr(llvm, "MOST_COMPILATIONS_HERE", 0)
    monkeypatch.setattr(llvm_process, "_state", llvm_process._State())
    assert (llvm.compile_object(TEXT, V3), llvm.compile_assembly(TEXT, V3)) == here
    assert llvm_process._state.worker is not None
    llvm_process._state.worker.stop()


@pytest.mark.usefixtures("elsewhere")
def test_the_error_is_the_same() -> None:
    with pytest.raises(CompileError, match=r"(?s)llvmlite failed: llc .*expected top-level entity"):
        llvm.compile_object("not LLVM IR", V3)
    first = worker_process()
    assert llvm.compile_object(TEXT, V3)
    assert worker_process() == first


@pytest.mark.usefixtures("elsewhere")
def test_the_process_is_replaced_after_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llvm_process, "MOST_COMPILATIONS", 2)
    processes = []
    for _ in range(5):
        llvm.compile_object(TEXT, V3)
        processes.append(worker_process())
    assert [processes.count(p) for p in dict.fromkeys(processes)] == [2, 2, 1]
    assert not Path(f"/proc/{processes[0]}").exists()


@pytest.mark.usefixtures("elsewhere")
def test_a_crash_is_an_error_and_the_next_compilation_works() -> None:
    llvm.compile_object(TEXT, V3)
    os.kill(worker_process(), signal.SIGSEGV)
    time.sleep(0.1)
    with pytest.raises(CompileError, match="LLVM's process crashed: exit status -11"):
        llvm.compile_object(TEXT, V3)
    assert llvm.compile_object(TEXT, V3)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("command", [("/nonexistent",), ("false",)])
def test_without_another_process_this_one_compiles(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llvm_process, "python_program", lambda name: command)
    assert llvm.compile_object(TEXT, V3)
    assert not llvm_process._state.usable
    assert llvm.compile_object(TEXT, V3)


@pytest.mark.process
def test_memory_stays_level_and_forks_and_exits_leave_no_process() -> None:
    output = child.run(
        """
        from pathlib import Path
        from q4jit.compilers import llvm, llvm_process
        llvm.MOST_COMPILATIONS_HERE = 20
        def compile_one(i):
            specialize(lambda x, w: x @ w + i * 0.5, cache=False)(x_small, small)
        def resident_kib():
            return 4 * int(Path("/proc/self/statm").read_text().split()[1])
        check()
        for i in range(30):
            compile_one(i)
        before = resident_kib()
        for i in range(60):
            compile_one(i)
        grown = (resident_kib() - before) / 60
        assert grown < 100, grown  # 540 in one process
        pid = llvm_process._state.worker._process.pid
        def in_fork():
            assert llvm_process._state.worker is None
            compile_one(1)
            assert llvm_process._state.worker._process.pid != pid
            llvm_process._state.worker.stop()
        reap(in_child(in_fork))
        compile_one(2)
        assert llvm_process._state.worker._process.pid == pid
        print(pid)
        """
    )
    assert not Path(f"/proc/{int(output)}").exists()
