"""Run a function in several processes of this machine that gloo or NCCL connects."""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
from torch import distributed
from torch.multiprocessing.spawn import ProcessException, spawn

TIMEOUT_S: Final = 120  # only a hang takes longer


def run_processes(
    size: int, function: Callable[..., None], *arguments: Any, backend: str = "gloo"
) -> None:
    """Call `function(*arguments)` in `size` new processes, the members of a process group.

    backend: "nccl" gives each process a GPU. The function and its arguments are pickled, so it is
    one of a module; it learns its rank from `torch.distributed.get_rank()`. Raises AssertionError
    with the traceback of the first process that fails, and TimeoutError after two minutes. No
    process outlives the call.
    """
    with tempfile.TemporaryDirectory(prefix="q4jit-gloo-") as name:
        folder = Path(name)
        context: Any = spawn(
            _member, (size, folder, function, arguments, backend), nprocs=size, join=False
        )
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while not context.join(max(0, deadline - time.monotonic()), grace_period=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{size} processes did not end in {TIMEOUT_S} s")
        except ProcessException as error:
            # PyTorch reports the process that ended first, which may be one that lost its peer.
            with suppress(FileNotFoundError):  # of a process that was killed
                raise AssertionError((folder / "failure").read_text("utf-8")) from error
            raise
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _member(
    rank: int,
    size: int,
    folder: Path,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    backend: str,
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo looks up the machine's name
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        backend,
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT_S / 2),  # before the caller gives up: it has a traceback
    )
    try:
        function(*arguments)
        distributed.barrier()  # nobody leaves while another one may still need it
    except BaseException:
        with suppress(FileExistsError), (folder / "failure").open("x", encoding="utf-8") as file:
            file.write(f"rank {rank} of {size} failed\n{traceback.format_exc()}")
        raise
    # Gloo's threads may still run while the interpreter ends, which then aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
