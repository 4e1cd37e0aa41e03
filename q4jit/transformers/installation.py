"""`install`: lets `from_pretrained(..., gguf_file=...)` of transformers run weights packed."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from q4jit.locks import BUILD
from q4jit.transformers.interface import check_interface

_installed: Final[list[ExitStack]] = []  # closing it undoes the changes


def install() -> None:
    """Let transformers load GGUF files of Qwen3.5, its MoE and LFM2 packed, with q4jit's kernels.

    Afterwards `AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)` gives a model whose
    linear layers, experts and embedding are q4jit's. It needs neither the package `kernels` nor a
    network, and works on a CPU and on GPUs of CUDA and ROCm. Other architectures are loaded as
    before; `from_gguf` runs them packed. Installing twice changes nothing.

    Raises ImportError without transformers or accelerate, and for a version of transformers whose
    private interface is not known to work.
    """
    with BUILD:
        if _installed:
            return
        check_interface()
        from q4jit.transformers import hooks  # late: it imports what was just checked

        with ExitStack() as changes:
            hooks.put(changes)
            _installed.append(changes.pop_all())


def uninstall() -> None:
    """Undo `install`. Models that were loaded before keep their modules."""
    with BUILD:
        while _installed:
            _installed.pop().close()


@contextmanager
def installed() -> Iterator[None]:
    """Install for the duration of a block. Raises the errors of `install`."""
    was_installed = bool(_installed)
    install()
    try:
        yield
    finally:
        if not was_installed:
            uninstall()
