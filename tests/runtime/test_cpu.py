"""Code is put into executable memory, or an error names what prevents it."""

import ctypes
import sys

import pytest

from q4jit import TargetError
from q4jit.compilers import cache, llvm
from q4jit.runtime import cpu
from q4jit.runtime.cpu import LoadedObject
from q4jit.targets import host_target
from tests.support import child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels run on Linux")

EMPTY = "define void @empty() {\n  ret void\n}\n"


def load() -> LoadedObject:
    target = host_target()
    text = f'target triple = "{target.triple}"\n{EMPTY}'
    return LoadedObject(cache.fetch(target, llvm, "empty", text).object_bytes, ("empty",), target)


@pytest.mark.process
@pytest.mark.parametrize("calls_before", [0, 1])
def test_a_refusal_of_executable_memory_is_explained(calls_before: int) -> None:
    """The policy may be set before the first kernel or after it."""
    output = child.run(
        f"""
        import ctypes
        from q4jit import TargetError
        if {calls_before}:
            check()
        PR_SET_MDWE = 65  # since Linux 6.3
        if ctypes.CDLL(None).prctl(PR_SET_MDWE, 1, 0, 0, 0):
            print("not supported")
            raise SystemExit
        for _ in range(2):
            try:
                check(specialize(lambda x, w: x @ w * 2 / 2))
            except TargetError as error:
                print(error)
        if {calls_before}:
            check()
        """
    )
    if output == "not supported\n":
        pytest.skip("this kernel has no PR_SET_MDWE")
    first, second = output.splitlines()  # and LLVM prints nothing
    assert first == second
    assert "may not make memory executable" in first
    assert "SELinux" in first
    assert "Q4JIT_DISABLE_JIT=1" in first


def test_a_lack_of_memory_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def mprotect(self, *_: object) -> int:
            ctypes.set_errno(12)  # ENOMEM
            return -1

    monkeypatch.setattr(cpu, "_libc", Libc)
    with pytest.raises(TargetError, match=r"Cannot allocate memory; free memory, or raise"):
        load()


def test_an_object_that_llvm_cannot_link_raises_our_error() -> None:
    target = host_target()
    text = f'target triple = "{target.triple}"\n{EMPTY}'
    object_bytes = llvm.compile_object(text, target)
    with pytest.raises(TargetError, match="cannot put a kernel into memory"):
        LoadedObject(object_bytes, ("missing",), target)
