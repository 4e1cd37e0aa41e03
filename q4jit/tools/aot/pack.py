"""A tensor of a GGUF file, written in the byte order of a layout."""

from pathlib import Path
from typing import Any

from q4jit.errors import ArgumentError
from q4jit.tools.aot.folder import OutputFolder, checksums
from q4jit.tools.aot.layout import describe_layout
from q4jit.tools.provenance import version
from q4jit.weights.gguf.file import load_gguf
from q4jit.weights.layouts import GGUF, pack
from q4jit.weights.tensor import QuantizedTensor


def pack_tensor(path: str, name: str, layout: str, out: Path, *, force: bool = False) -> Any:
    """Write a tensor of a GGUF file to `out` in a layout, and what that is to `out`.json.

    Returns the description. Raises GGUFError, MissingNameError, ArgumentError for a vector and
    for an `out` that is the file itself, FileExistsError (see `build`) and OSError.
    """
    description_name = f"{out.name}.json"
    for place in (out, out.with_name(description_name)):
        if place.exists() and place.samefile(path):
            raise ArgumentError(f"{place} is the file that is read, {path}: accepted is another")
    with load_gguf(path) as file:
        tensor = file[name]
    if not isinstance(tensor, QuantizedTensor):
        raise ArgumentError(f"{name} in {path} is a vector of {tensor.size}; accepted are matrices")
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
