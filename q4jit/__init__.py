"""q4jit compiles a NumPy function around a quantised matrix product into one fused kernel."""

from q4jit.dispatcher import specialize
from q4jit.errors import (
    ArgumentError,
    CacheWarning,
    CompileError,
    ConfigError,
    DeviceError,
    FormatError,
    GGUFError,
    MissingNameError,
    Q4JitError,
    SpecializationWarning,
    TargetError,
    TraceError,
    TuningError,
)
from q4jit.threads import get_num_threads, set_num_threads
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.gguf.file import load_gguf
from q4jit.weights.indexed import vecmat
from q4jit.weights.quantize import quantize
from q4jit.weights.tensor import QuantizedTensor

__all__ = [
    "ArgumentError",
    "CacheWarning",
    "CompileError",
    "ConfigError",
    "DeviceError",
    "ExpertTensor",
    "FormatError",
    "GGUFError",
    "MissingNameError",
    "Q4JitError",
    "QuantizedTensor",
    "SpecializationWarning",
    "TargetError",
    "TraceError",
    "TuningError",
    "get_num_threads",
    "load_gguf",
    "quantize",
    "set_num_threads",
    "specialize",
    "vecmat",
]

__version__: str


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from q4jit.version import version  # late: reading package metadata takes milliseconds

    globals()["__version__"] = version()
    return version()
