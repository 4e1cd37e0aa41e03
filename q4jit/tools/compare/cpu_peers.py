"""Products of other libraries on the CPU: NumPy's BLAS, PyTorch and ggml."""

import contextlib
import ctypes
import functools
import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.arrays.host_tensors import host_tensor
from q4jit.floats import FloatType
from q4jit.targets import Target
from q4jit.tools.compare.arena import AbsentError, Entrant, Running
from q4jit.tools.compare.cpu_times import running_of, timed_us
from q4jit.tools.compare.ggml import Ggml, GgmlError
from q4jit.tools.compare.torch_products import int4_weight, load_torch, tensor_error
from q4jit.tools.compare.work import TimedCall
from q4jit.weights.decode import decode
from q4jit.weights.reference import rotated_copies
from q4jit.weights.tensor import QuantizedTensor

# products in one graph of ggml, which starts its threads anew for each graph: this many, or fewer
# if they exceed this many operations
_GRAPH_PRODUCTS: Final = 16
_GRAPH_OPERATIONS: Final = 10_000_000_000


class CpuPeers:
    """The products of other libraries, all with the same number of threads."""

    def __init__(self, threads: int, target: Target, ggml: Path | None, rotated_bytes: int) -> None:
        """Take the conditions of the run.

        ggml: ggml's library or its folder; None if the user named no library.
        rotated_bytes: how many bytes of weights exceed every cache; 0 for one weight in the cache.
        """
        self._threads = threads
        self._target = target
        self._ggml_path = ggml
        self._rotated_bytes = rotated_bytes

    def makers(self) -> dict[str, Callable[[], Entrant]]:
        """Return one function per peer, which makes it or raises AbsentError."""
        return {
            "numpy f32": lambda: self._numpy("numpy f32", self._dense),
            "dequantise + matmul": lambda: self._numpy("dequantise + matmul", self._decoding),
            "torch int4": self._torch,
            "ggml": self._ggml,
        }

    def _numpy(
        self, name: str, open_: Callable[[TimedCall], AbstractContextManager[Running]]
    ) -> Entrant:
        _limit_blas(self._threads)
        return Entrant(name, "f32", open_)

    @contextlib.contextmanager
    def _dense(self, work: TimedCall) -> Iterator[Running]:
        (w,) = work.weights
        x, note = _in_f32(work)
        transposed = decode(w.block_format, w.raw)
        out = np.empty((len(work.x), w.shape[1]), np.float32)
        count = rotated_copies(self._rotated_bytes, transposed.nbytes)
        copies = [transposed, *(transposed.copy() for _ in range(count - 1))]
        calls = [functools.partial(np.matmul, x, copy.T, out=out) for copy in copies]
        yield running_of(calls, (out,), work, note)

    @contextlib.contextmanager
    def _decoding(self, work: TimedCall) -> Iterator[Running]:
        out = np.empty((len(work.x), work.weights[0].shape[1]), np.float32)
        x, note = _in_f32(work)

        def call(w: QuantizedTensor) -> None:
            np.matmul(x, w.dequantize(), out=out)

        yield running_of([functools.partial(call, w) for (w,) in work.copies], (out,), work, note)

    def _torch(self) -> Entrant:
        torch = load_torch()
        if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            raise AbsentError(f"torch {torch.__version__} has no _weight_int4pack_mm_for_cpu")
        torch.set_num_threads(self._threads)
        return Entrant("torch int4", "i8", functools.partial(self._int4, torch))

    @contextlib.contextmanager
    def _int4(self, torch: Any, work: TimedCall) -> Iterator[Running]:
        dtype = torch.float16 if work.dtype == "f16" else torch.bfloat16
        q, scales = int4_weight(torch, work.weights[0], dtype)
        convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        packed = convert(torch.from_numpy(q.astype(np.int32)), 1)
        x = host_tensor(work.x).to(dtype)
        latest: list[Any] = [torch.zeros(len(work.x), work.weights[0].shape[1])]

        def call(packed: Any, scales: Any) -> None:
            latest[0] = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales)

        def poison() -> None:
            latest[0].fill_(math.nan)

        calls = [
            functools.partial(call, packed.clone(), scales.clone()) for _ in range(len(work.copies))
        ]
        with torch.no_grad():
            yield Running(
                functools.partial(timed_us, calls),
                poison,
                lambda: tensor_error(work, latest[0]),
                "" if work.dtype == "f16" else _noted(work, "bf16"),
            )

    def _ggml(self) -> Entrant:
        if self._ggml_path is None:
            raise AbsentError("no library was given; use --ggml PATH")
        try:
            library = Ggml(self._ggml_path)
        except GgmlError as error:
            raise AbsentError(str(error)) from None
        return Entrant("ggml", "i8", functools.partial(self._on_ggml, library))

    @contextlib.contextmanager
    def _on_ggml(self, library: Ggml, work: TimedCall) -> Iterator[Running]:
        weights = [w for (w,) in work.copies]
        missing = library.missing(self._target.features)
        without = "".join(f", built without {name}" for name in missing)
        try:
            number = min(_GRAPH_PRODUCTS, -(-_GRAPH_OPERATIONS // work.operations))
            x, note = _in_f32(work)
            opened = library.product(x, weights, max(len(weights), number), self._threads)
            with opened as product:
                yield Running(
                    lambda: timed_us([product.compute]) / product.number,
                    product.poison,
                    lambda: work.error([product.result()]),
                    ", ".join(filter(None, [f"{product.layout}{without}", note])),
                )
        except GgmlError as error:
            raise AbsentError(str(error)) from None


def _in_f32(work: TimedCall) -> tuple[NDArray[np.float32], str]:
    """Return x in f32, for a library that takes no other type, and the note that says so."""
    return work.x.astype(np.float32), _noted(work, "f32")


def _noted(work: TimedCall, dtype: FloatType) -> str:
    return "" if work.dtype == dtype else f"x in {dtype}"


def _limit_blas(threads: int) -> None:
    """Set the number of threads of NumPy's OpenBLAS. Raises AbsentError for another BLAS."""
    module = importlib.import_module("numpy._core._multiarray_umath")
    library = ctypes.CDLL(module.__file__)
    for suffix in ("64_", ""):
        for prefix in ("scipy_openblas", "openblas"):
            if hasattr(library, f"{prefix}_set_num_threads{suffix}"):
                getattr(library, f"{prefix}_set_num_threads{suffix}")(threads)
                return
    raise AbsentError("cannot set the number of BLAS threads: this NumPy does not use OpenBLAS")
