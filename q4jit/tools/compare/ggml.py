"""ggml's product on the CPU, through the C interface of a library that the user names.

Weights are stored in ggml's repack buffer type, its fastest form, if it supports them. The
functions are declared in `ggml.h`, `ggml-backend.h` and `ggml-cpu.h`, which `llama-cpp-python`
installs.
"""

import contextlib
import ctypes
import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import expected
from q4jit.weights.tensor import QuantizedTensor

_LIBRARIES: Final = ("libggml-base.so", "libggml-cpu.so")
_F32: Final = 0  # GGML_TYPE_F32
_WEIGHTS: Final = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
_NAN_BYTE: Final = 0xFF  # four of them are an f32 NaN

# LLVM's name of a feature → the function that says whether the library was built for it
_BUILT_WITH: Final = {
    "avx2": "ggml_cpu_has_avx2",
    "avx512f": "ggml_cpu_has_avx512",
    "avx512vnni": "ggml_cpu_has_avx512_vnni",
    "avxvnni": "ggml_cpu_has_avx_vnni",
    "dotprod": "ggml_cpu_has_dotprod",
    "i8mm": "ggml_cpu_has_matmul_int8",
}

# name → type of the result, types of the arguments; P is an opaque pointer
_P, _Z, _I = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_FUNCTIONS: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    **dict.fromkeys(_BUILT_WITH.values(), (_I, ())),
    "ggml_free": (None, (_P,)),
    "ggml_tensor_overhead": (_Z, ()),
    "ggml_graph_overhead_custom": (_Z, (_Z, ctypes.c_bool)),
    "ggml_new_tensor_2d": (_P, (_P, _I, ctypes.c_int64, ctypes.c_int64)),
    "ggml_mul_mat": (_P, (_P, _P, _P)),
    "ggml_new_graph_custom": (_P, (_P, _Z, ctypes.c_bool)),
    "ggml_build_forward_expand": (None, (_P, _P)),
    "ggml_backend_cpu_init": (_P, ()),
    "ggml_backend_cpu_set_n_threads": (None, (_P, _I)),
    "ggml_backend_cpu_reg": (_P, ()),
    "ggml_backend_cpu_buffer_type": (_P, ()),
    "ggml_backend_reg_dev_get": (_P, (_P, _Z)),
    "ggml_backend_reg_get_proc_address": (_P, (_P, ctypes.c_char_p)),
    "ggml_backend_buft_name": (ctypes.c_char_p, (_P,)),
    "ggml_backend_buft_alloc_buffer": (_P, (_P, _Z)),
    "ggml_backend_buffer_get_base": (_P, (_P,)),
    "ggml_backend_buffer_set_usage": (None, (_P, _I)),
    "ggml_backend_buffer_free": (None, (_P,)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, (_P, _P)),
    "ggml_backend_tensor_alloc": (_I, (_P, _P, _P)),
    "ggml_backend_tensor_set": (None, (_P, _P, _Z, _Z)),
    "ggml_backend_supports_op": (ctypes.c_bool, (_P, _P)),
    "ggml_log_set": (None, (_P, _P)),
    "ggml_backend_graph_compute": (_I, (_P, _P)),
    "ggml_backend_free": (None, (_P,)),
}


_SILENT: Final = ctypes.CFUNCTYPE(None, _I, ctypes.c_char_p, _P)(lambda level, text, data: None)


class GgmlError(Exception):
    """A ggml library cannot be used; the message says why."""


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _Z), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool))


@dataclass(frozen=True, eq=False)
class GgmlProduct:
    """A graph of `number` products of one x with weights that take turns."""

    number: int
    layout: str
    _ggml: "Ggml"
    _backend: int
    _graph: int
    _output: NDArray[np.float32]

    def compute(self) -> None:
        """Run the graph. Raises GgmlError."""
        status = self._ggml.ggml_backend_graph_compute(self._backend, self._graph)
        if status != 0:
            raise GgmlError(f"ggml_backend_graph_compute returned status {status}")

    def poison(self) -> None:
        """Make the result NaN."""
        self._output.view(np.uint8)[...] = _NAN_BYTE

    def result(self) -> NDArray[np.float32]:
        """Return the result [M, N] of the graph's last product."""
        return self._output


def _libraries_at(path: Path) -> list[Path]:
    """Return the libraries at a path. Raises GgmlError, which says what is there instead."""
    folder = path if path.is_dir() else path.parent
    libraries = [folder / name for name in _LIBRARIES]
    missing = [library.name for library in libraries if not library.is_file()]
    if path.exists() and not missing:
        return libraries
    if not path.exists():
        got = "a path that does not exist"
    elif path.is_dir():
        got = f"a folder without {' and '.join(missing)}"
    else:
        got = f"a file without {' and '.join(missing)} beside it"
    raise GgmlError(expected(f"{' and '.join(_LIBRARIES)}, or their folder", got))


class Ggml:
    """ggml's libraries `base` and `cpu`, whose functions are attributes."""

    def __init__(self, path: Path) -> None:
        """Load the libraries. path: one of them, or their folder. Raises GgmlError."""
        try:
            self._libraries = [
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
                for library in _libraries_at(path)
            ]
        except OSError as error:
            raise GgmlError(f"cannot load the libraries: {error}") from None
        init = self._function("ggml_init")
        init.restype, init.argtypes = _P, (_InitParams,)
        self._init = init
        self.ggml_log_set(ctypes.cast(_SILENT, _P), None)  # else one line per weight

    def __getattr__(self, name: str) -> Any:
        if name not in _FUNCTIONS:
            raise AttributeError(name)
        function = self._function(name)
        function.restype, function.argtypes = _FUNCTIONS[name]
        setattr(self, name, function)
        return function

    def _function(self, name: str) -> Any:  # a ctypes function
        for library in self._libraries:
            if hasattr(library, name):
                return getattr(library, name)
        raise GgmlError(
            f"{' and '.join(_LIBRARIES)} have no function {name}; use another version of ggml"
        )

    def missing(self, features: Collection[str]) -> list[str]:
        """Return the features of a CPU that ggml could use but was built without."""
        return [
            feature
            for feature, name in _BUILT_WITH.items()
            if feature in features and not getattr(self, name)()
        ]

    @contextlib.contextmanager
    def product(
        self,
        x: NDArray[np.float32],
        weights: Sequence[QuantizedTensor],
        number: int,
        threads: int,
    ) -> Iterator[GgmlProduct]:
        """Make `number` products of x [M, K] with `weights` [K, N] in turns. Raises GgmlError."""
        (m, k), n = x.shape, weights[0].shape[1]
        with contextlib.ExitStack() as closing:
            backend = self._checked("ggml_backend_cpu_init")
            closing.callback(self.ggml_backend_free, backend)
            self.ggml_backend_cpu_set_n_threads(backend, threads)
            size = number + len(weights) + 1  # tensors of the graph
            overhead_bytes = self.ggml_graph_overhead_custom(size, False)
            context = self._context(closing, size, overhead_bytes)
            # ggml lists the innermost dimension first: x is M rows of K elements
            activations = self._checked("ggml_new_tensor_2d", context, _F32, k, m)
            self._allocate(closing, [activations], 4 * m * k)
            values = np.ascontiguousarray(x)
            self.ggml_backend_tensor_set(activations, values.ctypes.data, 0, values.nbytes)
            tensors, layout = self._store(closing, backend, weights, activations)
            graph = self._checked("ggml_new_graph_custom", context, size, False)
            outputs = []
            for i in range(number):
                tensor = tensors[i % len(tensors)]
                outputs.append(self._checked("ggml_mul_mat", context, tensor, activations))
                self.ggml_build_forward_expand(graph, outputs[-1])
            # all results at one address: the other entrants overwrite one array too
            address = self._allocate(closing, outputs, 4 * m * n)
            memory = (ctypes.c_float * (m * n)).from_address(address)
            output = np.frombuffer(memory, np.float32).reshape(m, n)
            yield GgmlProduct(number, layout, self, backend, graph, output)

    def _store(
        self,
        closing: contextlib.ExitStack,
        backend: int,
        weights: Sequence[QuantizedTensor],
        activations: int,
    ) -> tuple[list[int], str]:
        """Return the weights in the fastest buffer type that ggml supports, and the type's name."""
        (k, n), ggml_type = weights[0].shape, weights[0].block_format.ggml_type
        plain = self._checked("ggml_backend_cpu_buffer_type")
        for kind in (self._repacked() or plain, plain):
            context = self._context(closing, len(weights) + 1)
            tensors = [
                self._checked("ggml_new_tensor_2d", context, ggml_type, k, n) for _ in weights
            ]
            memory = self._checked("ggml_backend_alloc_ctx_tensors_from_buft", context, kind)
            closing.callback(self.ggml_backend_buffer_free, memory)
            self.ggml_backend_buffer_set_usage(memory, _WEIGHTS)
            probe = self._checked("ggml_mul_mat", context, tensors[0], activations)
            if self.ggml_backend_supports_op(backend, probe):  # otherwise storing crashes
                break
        else:
            raise GgmlError(f"ggml has no product with {weights[0].format} [{k}, {n}]")
        for tensor, w in zip(tensors, weights, strict=True):
            raw = np.ascontiguousarray(w.raw)
            self.ggml_backend_tensor_set(tensor, raw.ctypes.data, 0, raw.nbytes)
        return tensors, self.ggml_backend_buft_name(kind).decode()

    def _checked(self, name: str, *arguments: Any) -> int:
        pointer: int | None = getattr(self, name)(*arguments)
        if not pointer:
            raise GgmlError(f"{name} returned a null pointer")
        return pointer

    def _context(self, closing: contextlib.ExitStack, tensors: int, more_bytes: int = 0) -> int:
        size_bytes = self.ggml_tensor_overhead() * tensors + more_bytes
        context: int | None = self._init(_InitParams(size_bytes, None, True))
        if not context:
            raise GgmlError("ggml_init returned a null pointer")
        closing.callback(self.ggml_free, context)
        return context

    def _allocate(
        self, closing: contextlib.ExitStack, tensors: Sequence[int], size_bytes: int
    ) -> int:
        """Allocate memory, let all tensors start at its first byte, and return the address."""
        kind = self.ggml_backend_cpu_buffer_type()
        memory = self._checked("ggml_backend_buft_alloc_buffer", kind, size_bytes)
        closing.callback(self.ggml_backend_buffer_free, memory)
        base = self._checked("ggml_backend_buffer_get_base", memory)
        for tensor in tensors:
            status = self.ggml_backend_tensor_alloc(memory, tensor, base)
            if status != 0:
                raise GgmlError(f"ggml_backend_tensor_alloc returned status {status}")
        return base

    @functools.cache  # noqa: B019 - the library stays loaded until the process ends
    def _repacked(self) -> int | None:
        """Return the buffer type that repacks weights; None if this CPU has none."""
        registry = self._checked("ggml_backend_cpu_reg")
        device = self._checked("ggml_backend_reg_dev_get", registry, 0)
        name = b"ggml_backend_dev_get_extra_bufts"
        address: int | None = self.ggml_backend_reg_get_proc_address(registry, name)
        if not address:
            return None
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)(device)
        for kind in iter(kinds or ()):
            if not kind:  # a null pointer ends the list
                return None
            if self.ggml_backend_buft_name(kind) == b"CPU_REPACK":
                return int(kind)
        return None
