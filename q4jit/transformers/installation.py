"""`install`: lets `from_pretrained(..., gguf_file=...)` of transformers run weights packed."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from q4jit.locks import BUILD
from q4jit.transformers.interface import check_interface

_BY_CALL: Final = "install"
_users: Final[set[object]] = set()  # `_BY_CALL` after `install`, and the blocks of `installed`
_changes: Final = ExitStack()  # closing it undoes the changes


def install() -> None:
    """Let transformers load GGUF files of Qwen3.5, its MoE and LFM2 packed, with q4jit's kernels.

    Afterwards `AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)` gives a model whose
    linear layers, experts and embedding are q4jit's. It needs neither the package `kernels` nor a
    network, and works on a CPU and on GPUs of CUDA and ROCm. Other architectures are loaded as
    before; `from_gguf` runs them packed. Installing twice changes nothing.

    Raises ImportError without transformers or accelerate, and for a version of transformers whose
    private interface is not known to work.
    """
    _add(_BY_CALL)


def uninstall() -> None:
    """Undo `install`. Models that were loaded before keep their modules.

    If `from_gguf` is loading a model in another thread, this takes effect when it has ended.
    """
    _remove(_BY_CALL)


@contextmanager
def installed() -> Iterator[None]:
    """Install for the duration of a block. Raises the errors of `install`.

    Blocks of several threads may overlap.
    """
    block = object()
    _add(block)
    try:
        yield
    finally:
        _remove(block)


def _add(user: object) -> None:
    with BUILD:
        if not _users:
            check_interface()
            from q4jit.transformers import hooks  # late: it imports what was just checked

            with ExitStack() as changes:  # undoes them if one fails
                hooks.put(changes)
                _changes.push(changes.pop_all())
        _users.add(user)


def _remove(user: object) -> None:
    with BUILD:
        _users.discard(user)
        if not _users:
            _changes.close()
