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
    TargetError,
    TraceError,
    TuningError,
)
from q4jit.weights.gguf.file import load_gguf
from q4jit.weights.quantize import quantize
from q4jit.weights.tensor import QuantizedTensor

__all__ = [
    "ArgumentError",
    "CacheWarning",
    "CompileError",
    "ConfigError",
    "DeviceError",
    "FormatError",
    "GGUFError",
    "MissingNameError",
    "Q4JitError",
    "QuantizedTensor",
    "TargetError",
    "TraceError",
    "TuningError",
    "load_gguf",
    "quantize",
    "specialize",
]
