"""The element types of array arguments, and how many dimensions they may have."""

from typing import Final

import numpy as np

F32: Final = np.dtype(np.float32)
FLOATS: Final = "float32, float16 or bfloat16"
"""The dtypes of activations, as errors name them."""
IDS: Final = (np.dtype(np.int32), np.dtype(np.int64))
ID_NAMES: Final = frozenset(map(str, IDS))
"""The same as names, which PyTorch's dtypes have too."""
MOST_DIMENSIONS: Final = 64  # as in NumPy 2
MOST_LEADING: Final = 32  # NumPy broadcasts at most this many
