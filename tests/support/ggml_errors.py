r"""What ggml's quantiser makes of normal data, recorded to compare `quantize` with.

`make bench` builds ggml in .venv-bench. Then this command prints `GGML_ERRORS` anew:

    .venv/bin/python -m tests.support.ggml_errors \
        .venv-bench/lib/python3.*/site-packages/llama_cpp/lib
"""

import ctypes
import sys
from pathlib import Path
from typing import Final

import gguf
import numpy as np
from gguf import quants
from numpy.typing import NDArray

DEVIATIONS: Final = (1.0, 0.02, 1e-3)

# By deviation: at 0.001, most scales of Q6_K are denormal in f16.
# llama-cpp-python 0.3.36 (ggml 0.25.3), ggml_quantize_chunk without an importance matrix.
GGML_ERRORS: Final = {
    "IQ4_NL": (0.00583, 0.00583, 0.00583),
    "Q4_K": (0.005065, 0.005064, 0.005095),
    "Q5_K": (0.001302, 0.001303, 0.001368),
    "Q6_K": (0.0003139, 0.0003149, 0.0004202),
}


def normal_columns(deviation: float) -> NDArray[np.float32]:
    """Return the data: f32 [64, 2048]."""
    normal = np.random.default_rng(19).standard_normal((64, 2048))
    return (deviation * normal).astype(np.float32)


def relative_error(name: str, encoded: NDArray[np.uint8], columns: NDArray[np.float32]) -> float:
    """Return the mean squared error of columns [n, K] in a format, by the mean of their squares."""
    values = quants.dequantize(encoded, gguf.GGMLQuantizationType[name]).astype(np.float64)
    return float(np.square(values - columns).mean() / np.square(columns, dtype=np.float64).mean())


def ggml_quantise(library: Path, name: str, columns: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return columns [n, K] as ggml quantises them: uint8 [n, column_bytes]."""
    chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    sizes = [ctypes.c_int64] * 3
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_void_p]
    kind = gguf.GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    n, k = columns.shape
    out = np.empty((n, k // elements * size), np.uint8)
    written = chunk(kind.value, columns.ctypes.data, out.ctypes.data, 0, n, k, None)
    assert written == out.nbytes
    return out


def main() -> None:
    """Print the errors of the library in the folder that the first argument names."""
    library = Path(sys.argv[1]) / "libggml-base.so"
    for name in ("IQ4_NL", "Q4_K", "Q5_K", "Q6_K"):
        errors = []
        for deviation in DEVIATIONS:
            columns = normal_columns(deviation)
            encoded = ggml_quantise(library, name, columns)
            errors.append(f"{relative_error(name, encoded, columns):.4g}")
        sys.stdout.write(f'    "{name}": ({", ".join(errors)}),\n')


if __name__ == "__main__":
    main()
