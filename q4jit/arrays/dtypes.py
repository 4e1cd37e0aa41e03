"""The element types of array arguments."""

from typing import Final

import numpy as np

F32: Final = np.dtype(np.float32)
IDS: Final = (np.dtype(np.int32), np.dtype(np.int64))
