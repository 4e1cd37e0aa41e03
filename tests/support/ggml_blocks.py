"""Blocks that ggml's own quantiser wrote, and the floats that ggml decodes them to.

`tests/data/ggml_blocks.npz` holds them. To write it again, pass the folder of libggml-base.so, for
example of llama-cpp-python:

    python -m tests.support.ggml_blocks .venv-bench/lib/python3.11/site-packages/llama_cpp/lib
"""

import ctypes
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.weights.formats import FORMATS
from tests.support.paths import ROOT

PATH: Final = ROOT / "tests" / "data" / "ggml_blocks.npz"
COLUMNS: Final = 2
K: Final = 512


def load_blocks(name: str) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return ggml's columns of a format, uint8 [COLUMNS, column_bytes], and their values."""
    with np.load(PATH, allow_pickle=False) as stored:
        return stored[f"{name}_blocks"], stored[f"{name}_values"]


class _TypeTraits(ctypes.Structure):
    """The start of `ggml_type_traits` (ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def _quantised(library: Any, name: str) -> dict[str, NDArray[Any]]:
    fmt = FORMATS[name]
    values = np.random.default_rng(fmt.ggml_type).standard_normal((COLUMNS, K)).astype(np.float32)
    values[0, :32] = 0  # a block, or a sub-block, of zeros
    blocks = np.zeros((COLUMNS, fmt.column_bytes(K)), np.uint8)
    size = library.ggml_quantize_chunk(
        fmt.ggml_type,
        values.ctypes,
        blocks.ctypes,
        ctypes.c_int64(0),
        ctypes.c_int64(COLUMNS),
        ctypes.c_int64(K),
        None,
    )
    assert size == blocks.nbytes, (name, size)
    decoded = np.zeros((COLUMNS, K), np.float32)
    traits = library.ggml_get_type_traits(fmt.ggml_type).contents
    assert traits.type_size == fmt.block_bytes, name
    if name == "F32":
        decoded = blocks.view(np.float32)
    else:
        traits.to_float(blocks.ctypes.data, decoded.ctypes.data, decoded.size)
    return {f"{name}_blocks": blocks, f"{name}_values": decoded}


def main() -> None:
    """Write the file."""
    folder = Path(sys.argv[1])
    library = ctypes.CDLL(str(folder / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    arrays: dict[str, NDArray[Any]] = {}
    for name in FORMATS:
        arrays |= _quantised(library, name)
    np.savez_compressed(PATH, allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
