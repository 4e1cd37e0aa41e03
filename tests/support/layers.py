"""The order in which the modules and packages of q4jit import each other."""

from typing import Final

LAYERS: Final = (
    "errors",
    "version",
    "files",
    "checked_json",
    "config",
    "locks",
    "progress",
    "targets",
    "floats",
    "precision",
    "conversions",
    "sizes",
    "weights",
    "frontend",
    "plan",
    "compilers",
    "runtime",
    "threads",
    "arrays",
    "pipeline",
    "cpu",
    "hip",
    "backends",
    "dispatch",
    "dispatcher",
    "torch",
    "transformers",
    "bundling",
    "tools",
    "__init__",
    "__main__",
)
"""Bottom first. A package is one layer; its modules may import each other without cycles."""
