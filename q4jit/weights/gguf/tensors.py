"""The table of tensors: its entries are checked first, and tensors are read on access."""

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
# Names of formats that q4jit does not read, for messages.
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
    """An entry of the tensor table: its position `at`, and its data from `start` to `end`."""

    name: str
    at: int
    dims: tuple[int, ...]
    ggml_type: int
    start: int
    end: int


def read_tensors(reader: Reader, count: int, alignment: int) -> dict[str, TensorInfo]:
    """Read the table of tensors, and check that their data is in the file and does not overlap."""
    infos: dict[str, TensorInfo] = {}
    for i in range(count):
        at = reader.at
        name = reader.name(f"name of tensor {i}")
        if name in infos:
            got = "a second tensor of this name"
            raise reader.error(at, tensor_name(name), "every name once", got)
        infos[name] = _read_info(reader, name, at, alignment)
    if not infos:
        return infos
    data_at = -(-reader.at // alignment) * alignment
    absolute = {name: _absolute(reader, info, data_at) for name, info in infos.items()}
    _check_overlap(reader, absolute)
    return absolute


def _read_info(reader: Reader, name: str, at: int, alignment: int) -> TensorInfo:
    """Read one entry, with start and end counted from the start of the data."""
    subject = tensor_name(name)
    rank = reader.u32(subject)
    if not 1 <= rank <= _MAX_DIMENSIONS:
        dimensions = f"1 to {_MAX_DIMENSIONS} dimensions"
        raise reader.error(reader.at - 4, subject, dimensions, str(rank))
    dims = tuple(reader.u64(subject) for _ in range(rank))
    if 0 in dims:
        raise reader.error(at, subject, "dimensions of at least 1", str(dims))
    ggml_type = reader.u32(subject)
    offset = reader.u64(subject)
    if offset % alignment:
        multiple = f"an offset that is a multiple of the alignment, {alignment}"
        raise reader.error(reader.at - 8, subject, multiple, str(offset))
    fmt = _FORMAT_OF_TYPE.get(ggml_type)
    # if the size of the format is unknown, at least one byte must be in the file
    size = _data_bytes(reader, subject, at, fmt, dims) if fmt else 1
    return TensorInfo(name, at, dims, ggml_type, offset, offset + size)


def _data_bytes(reader: Reader, subject: str, at: int, fmt: Format, dims: tuple[int, ...]) -> int:
    if dims[0] % fmt.block_elements:
        multiple = f"a first dimension that is a multiple of {fmt.block_elements} for {fmt.name}"
        raise reader.error(at, subject, multiple, f"dimensions {dims}")
    return fmt.column_bytes(dims[0]) * prod(dims[1:])


def _absolute(reader: Reader, info: TensorInfo, data_at: int) -> TensorInfo:
    """Return an entry with start and end counted from byte 0; check that they are in the file."""
    start, end = data_at + info.start, data_at + info.end
    if end > reader.size:
        inside = f"data in the file's {reader.size} bytes"
        raise reader.error(info.at, tensor_name(info.name), inside, f"bytes {start} to {end}")
    return TensorInfo(info.name, info.at, info.dims, info.ggml_type, start, end)


def _check_overlap(reader: Reader, infos: dict[str, TensorInfo]) -> None:
    previous: TensorInfo | None = None
    for info in sorted(infos.values(), key=lambda info: (info.start, info.end)):
        if previous is not None and info.start < previous.end:
            other = f"{tensor_name(previous.name)} from {previous.start} to {previous.end}"
            got = f"data at byte {info.start}, inside {other}"
            raise reader.error(info.at, tensor_name(info.name), "tensors that do not overlap", got)
        previous = info


def read_tensor(reader: Reader, info: TensorInfo) -> Tensor:
    """Return a tensor in place. Raises GGUFError for a format or rank that q4jit cannot read."""
    subject = tensor_name(info.name)
    fmt = _FORMAT_OF_TYPE.get(info.ggml_type)
    if fmt is None:
        name = _OTHER_TYPES.get(info.ggml_type, "unknown")
        formats = f"one of the formats {', '.join(FORMATS)}"
        raise reader.error(info.at, subject, formats, f"{name} (ggml type {info.ggml_type})")
    if prod(info.dims[2:]) != 1:
        raise reader.error(info.at, subject, "one or two dimensions", str(info.dims))
    data = reader.view[info.start : info.end]
    if len(info.dims) == 1:
        return _read_vector(fmt, data)
    k, n = info.dims[:2]
    return QuantizedTensor.from_bytes(data, shape=(k, n), format=fmt.name)


def _read_vector(fmt: Format, data: memoryview) -> NDArray[np.float32]:
    columns = np.frombuffer(data, np.uint8).reshape(1, -1)
    if fmt.name == "F32":
        in_place: NDArray[np.float32] = columns[0].view("<f4")
        if in_place.flags.aligned:
            return in_place
    vector: NDArray[np.float32] = decode(fmt, columns)[0]
    vector.flags.writeable = False
    return vector
