"""Write one tensor of a GGUF file in the layout that kernels read."""

from pathlib import Path
from typing import Any

import numpy as np

from q4jit.errors import ArgumentError, expected
from q4jit.tools.aot.folder import OutputFolder, checksums
from q4jit.tools.aot.layout import describe_layout
from q4jit.version import version
from q4jit.weights.gguf.file import load_gguf
from q4jit.weights.layouts import GGUF, pack
from q4jit.weights.tensor import QuantizedTensor


def pack_tensor(path: str, name: str, layout: str, out: Path, *, force: bool = False) -> Any:
    """Write a tensor of a GGUF file in a layout to `out`, and its description to `out`.json.

    Returns the description. Raises GGUFError, MissingNameError, ArgumentError for a vector and
    for an `out` that is the GGUF file itself, FileExistsError (see `build`) and OSError.
    """
    if not out.name or out.name == "..":
        raise ArgumentError(expected("a path for a file", f"{str(out)!r}", where="output"))
    description_name = f"{out.name}.json"
    for written in (out, out.with_name(description_name)):
        if written.exists() and written.samefile(path):
            raise ArgumentError(f"{written} is the input file {path}; choose another output file")
    with load_gguf(path) as file:
        tensor = file[name]
    if not isinstance(tensor, QuantizedTensor):
        kind = "a vector" if isinstance(tensor, np.ndarray) else "experts"
        got = f"{kind} of shape {tensor.shape}"
        raise ArgumentError(expected("a matrix", got, where=f"tensor {name} of {path}"))
    fmt = tensor.block_format
    data = tensor.raw.reshape(-1) if layout == GGUF else pack(fmt, layout, tensor.raw)
    description = {
        "q4jit": version(),
        "tensor": name,
        "format": fmt.name,
        "K": tensor.shape[0],
        "N": tensor.shape[1],
        "finite_scales": tensor.has_finite_scales,
        "weight": describe_layout(fmt, layout, tensor.shape),
    }
    files = {out.name: data.data}
    description["files"] = checksums(files)
    with OutputFolder(out.parent, description_name, out) as folder:
        folder.check([out.name], force=force)
        folder.write(files, description)
    return description
