"""Write one tensor of a GGUF file in the layout that kernels read."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import ArgumentError, expected
from q4jit.tools.aot.folder import OutputFolder, checksums
from q4jit.tools.aot.layout import describe_layout
from q4jit.version import version
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.gguf.file import load_gguf
from q4jit.weights.layouts import GGUF, pack
from q4jit.weights.tensor import QuantizedTensor


def pack_tensor(path: str, name: str, layout: str, out: Path, *, force: bool = False) -> Any:
    """Write a tensor of a GGUF file in a layout to `out`, and its description to `out`.json.

    The matrices of an expert tensor follow each other. Returns the description. Raises GGUFError,
    MissingNameError, ArgumentError for a vector and for an `out` that is the GGUF file itself,
    FileExistsError (see `build`) and OSError.
    """
    if not out.name or out.name == "..":
        raise ArgumentError(expected("a path for a file", f"{str(out)!r}", where="output"))
    description_name = f"{out.name}.json"
    for written in (out, out.with_name(description_name)):
        if written.exists() and written.samefile(path):
            raise ArgumentError(f"{written} is the input file {path}; choose another output file")
    with load_gguf(path) as file:
        tensor = file[name]
    if isinstance(tensor, np.ndarray):
        vector = f"a vector of {tensor.size} elements"
        raise ArgumentError(expected("a matrix", vector, where=f"tensor {name} of {path}"))
    matrices = list(tensor) if isinstance(tensor, ExpertTensor) else [tensor]
    fmt, shape = matrices[0].block_format, matrices[0].shape
    data = np.concatenate([_packed(w, layout) for w in matrices])
    description = {
        "q4jit": version(),
        "tensor": name,
        "format": fmt.name,
        "K": shape[0],
        "N": shape[1],
        "finite_scales": all(w.has_finite_scales for w in matrices),
        "weight": describe_layout(fmt, layout, shape),
    }
    if isinstance(tensor, ExpertTensor):  # the file has a weight for each
        description["experts"] = len(matrices)
    files = {out.name: data.data}
    description["files"] = checksums(files)
    with OutputFolder(out.parent, description_name, out) as folder:
        folder.check([out.name], force=force)
        folder.write(files, description)
    return description


def _packed(w: QuantizedTensor, layout: str) -> NDArray[np.uint8]:
    return w.raw.reshape(-1) if layout == GGUF else pack(w.block_format, layout, w.raw)
