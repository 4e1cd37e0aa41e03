"""The table of tensors: each entry checked against the file, and read when it is asked for."""

from dataclasses import dataclass
from math import prod
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from q4jit.weights.formats import FORMATS, Format, decode
from q4jit.weights.gguf.reader import Reader, tensor_name
from q4jit.weights.tensor import QuantizedTensor

Tensor: TypeAlias = QuantizedTensor | NDArray[np.float32]

_MAX_DIMENSIONS: Final = 4

_FORMAT_OF_TYPE: Final = {fmt.ggml_type: fmt for fmt in FORMATS.values()}
# Only names, for messages about what q4jit does not read.
_OTHER_TYPES: Final = {
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the tensor table; `at` is where the entry lies, start and end where the data."""

    name: str
    at: int
    dims: tuple[int, ...]
    ggml_type: int
    start: int
    end: int


def read_tensors(reader: Reader, count: int, alignment: int) -> dict[str, TensorInfo]:
    """Read the table of tensors, checking that each lies inside the file and apart from others."""
    infos: dict[str, TensorInfo] = {}
    for i in range(count):
        at = reader.at
        name = reader.name(f"name of tensor {i}")
        if name in infos:
            raise reader.error(at, tensor_name(name), "the tensor a second time", "every name once")
        infos[name] = _read_info(reader, name, at, alignment)
    if not infos:
        return infos
    data = -(-reader.at // alignment) * alignment
    placed = {name: _place(reader, info, data) for name, info in infos.items()}
    _check_overlap(reader, placed)
    return placed


def _read_info(reader: Reader, name: str, at: int, alignment: int) -> TensorInfo:
    """One entry of the tensor table; start and end count from the data's start as yet."""
    what = tensor_name(name)
    rank = reader.u32(what)
    if not 1 <= rank <= _MAX_DIMENSIONS:
        raise reader.error(reader.at - 4, what, f"{rank} dimensions", f"1 to {_MAX_DIMENSIONS}")
    dims = tuple(reader.u64(what) for _ in range(rank))
    if 0 in dims:
        raise reader.error(at, what, f"dimensions {dims}", "none of size 0")
    ggml_type = reader.u32(what)
    offset = reader.u64(what)
    if offset % alignment:
        raise reader.error(
            reader.at - 8, what, f"offset {offset}", f"a multiple of the alignment, {alignment}"
        )
    fmt = _FORMAT_OF_TYPE.get(ggml_type)
    # Of a format without a known size at least one byte must lie inside the file.
    size = _data_bytes(reader, what, at, fmt, dims) if fmt else 1
    return TensorInfo(name, at, dims, ggml_type, offset, offset + size)


def _data_bytes(reader: Reader, what: str, at: int, fmt: Format, dims: tuple[int, ...]) -> int:
    if dims[0] % fmt.block_elements:
        raise reader.error(
            at,
            what,
            f"dimensions {dims} in {fmt.name}",
            f"a first dimension that is a multiple of {fmt.block_elements}",
        )
    return fmt.column_bytes(dims[0]) * prod(dims[1:])


def _place(reader: Reader, info: TensorInfo, data: int) -> TensorInfo:
    """Make an entry's start and end absolute, and check that they lie inside the file."""
    start, end = data + info.start, data + info.end
    if end > reader.size:
        raise reader.error(
            info.at,
            tensor_name(info.name),
            f"data from byte {start} to {end}",
            f"data inside the file's {reader.size} bytes",
        )
    return TensorInfo(info.name, info.at, info.dims, info.ggml_type, start, end)


def _check_overlap(reader: Reader, infos: dict[str, TensorInfo]) -> None:
    previous: TensorInfo | None = None
    for info in sorted(infos.values(), key=lambda info: (info.start, info.end)):
        if previous is not None and info.start < previous.end:
            raise reader.error(
                info.at,
                tensor_name(info.name),
                f"data from byte {info.start} on, inside {tensor_name(previous.name)} "
                f"({previous.start} to {previous.end})",
                "tensors that do not overlap",
            )
        previous = info


def read_tensor(reader: Reader, info: TensorInfo) -> Tensor:
    """Read one tensor in place. Raises GGUFError for a format or rank that q4jit cannot read."""
    what = tensor_name(info.name)
    fmt = _FORMAT_OF_TYPE.get(info.ggml_type)
    if fmt is None:
        name = _OTHER_TYPES.get(info.ggml_type, "unknown")
        raise reader.error(
            info.at, what, f"format {name} (ggml type {info.ggml_type})", ", ".join(FORMATS)
        )
    if prod(info.dims[2:]) != 1:
        raise reader.error(info.at, what, f"dimensions {info.dims}", "one or two dimensions")
    data = reader.view[info.start : info.end]
    if len(info.dims) == 1:
        return _read_vector(fmt, data)
    k, n = info.dims[:2]
    return QuantizedTensor.from_bytes(data, shape=(k, n), format=fmt.name)


def _read_vector(fmt: Format, data: memoryview) -> NDArray[np.float32]:
    rows = np.frombuffer(data, np.uint8).reshape(1, -1)
    if fmt.name == "F32":
        in_place: NDArray[np.float32] = rows[0].view("<f4")
        if in_place.flags.aligned:
            return in_place
    vector: NDArray[np.float32] = decode(fmt, rows)[0]
    vector.flags.writeable = False
    return vector
