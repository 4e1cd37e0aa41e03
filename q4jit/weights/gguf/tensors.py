"""The table of tensors: its entries are checked first, and tensors are read on access."""

from dataclasses import dataclass
from math import prod
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import expected
from q4jit.weights.formats import FORMATS, Format, decode
from q4jit.weights.gguf.reader import Reader, tensor_name
from q4jit.weights.tensor import QuantizedTensor

Tensor: TypeAlias = QuantizedTensor | NDArray[np.float32]

_MAX_DIMENSIONS: Final = 64  # ggml has at most 4; more than 2 are only listed

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


@dataclass(frozen=True)
class TensorEntry:
    """What a file says about one of its tensors.

    Attributes:
        shape: the dimensions, the contiguous one first: (K, N) for a matrix.
        format: the name of the format, for example "Q4_0"; "unknown" for one without a name here.
        problem: why q4jit cannot read the tensor; empty if it can.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    problem: str

    @property
    def readable(self) -> bool:
        """Whether the file's mapping has this tensor."""
        return not self.problem


def entry_of(info: TensorInfo) -> TensorEntry:
    """Return what users see of an entry of the table."""
    problem = problem_of(info)
    text = expected(*problem) if problem else ""
    return TensorEntry(info.name, info.dims, format_name(info.ggml_type), text)


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
    if rank > _MAX_DIMENSIONS:
        dimensions = f"at most {_MAX_DIMENSIONS} dimensions"
        raise reader.error(reader.at - 4, subject, dimensions, str(rank))
    dims = tuple(reader.u64(subject) for _ in range(rank))
    ggml_type = reader.u32(subject)
    offset = reader.u64(subject)
    if offset % alignment:
        multiple = f"an offset that is a multiple of the alignment, {alignment}"
        raise reader.error(reader.at - 8, subject, multiple, str(offset))
    size = _data_bytes(_FORMAT_OF_TYPE.get(ggml_type), dims)
    return TensorInfo(name, at, dims, ggml_type, offset, offset + size)


def _data_bytes(fmt: Format | None, dims: tuple[int, ...]) -> int:
    """Return the bytes of a tensor, or 1 if they are unknown: at least one must be in the file."""
    if 0 in dims:
        return 0
    if fmt is None or not _has_whole_blocks(fmt, dims):
        return 1
    return fmt.column_bytes(dims[0] if dims else 1) * prod(dims[1:])


def _has_whole_blocks(fmt: Format, dims: tuple[int, ...]) -> bool:
    return (dims[0] if dims else 1) % fmt.block_elements == 0


def _absolute(reader: Reader, info: TensorInfo, data_at: int) -> TensorInfo:
    """Return an entry with start and end counted from byte 0; check that they are in the file."""
    start, end = data_at + info.start, data_at + info.end
    if end > reader.size:
        inside = f"data in the file's {reader.size} bytes"
        raise reader.error(info.at, tensor_name(info.name), inside, f"bytes {start} to {end}")
    return TensorInfo(info.name, info.at, info.dims, info.ggml_type, start, end)


def _check_overlap(reader: Reader, infos: dict[str, TensorInfo]) -> None:
    previous: TensorInfo | None = None
    stored = (info for info in infos.values() if info.start < info.end)
    for info in sorted(stored, key=lambda info: (info.start, info.end)):
        if previous is not None and info.start < previous.end:
            other = f"{tensor_name(previous.name)} from {previous.start} to {previous.end}"
            got = f"data at byte {info.start}, inside {other}"
            raise reader.error(info.at, tensor_name(info.name), "tensors that do not overlap", got)
        previous = info


def read_tensor(reader: Reader, info: TensorInfo) -> Tensor:
    """Return a tensor in place. Raises GGUFError for a format or rank that q4jit cannot read."""
    problem = problem_of(info)
    if problem is not None:
        raise reader.error(info.at, tensor_name(info.name), *problem)
    fmt = _FORMAT_OF_TYPE[info.ggml_type]
    data = reader.view[info.start : info.end]
    if len(info.dims) == 1:
        return _read_vector(fmt, data)
    k, n = info.dims[:2]
    return QuantizedTensor.from_bytes(data, shape=(k, n), format=fmt.name)


def problem_of(info: TensorInfo) -> tuple[str, str] | None:
    """Return why q4jit cannot read a tensor: what it expects, and what it got; None if it can."""
    fmt, dims = _FORMAT_OF_TYPE.get(info.ggml_type), info.dims
    if fmt is None:
        formats = f"one of the formats {', '.join(FORMATS)}"
        return formats, f"{format_name(info.ggml_type)} (ggml type {info.ggml_type})"
    if 0 in dims:
        return "dimensions of at least 1", str(dims)
    if not dims or prod(dims[2:]) != 1:
        return "one or two dimensions", str(dims) if dims else "none: a single number"
    if not _has_whole_blocks(fmt, dims):
        multiple = f"a first dimension that is a multiple of {fmt.block_elements} for {fmt.name}"
        return multiple, f"dimensions {dims}"
    return None


def format_name(ggml_type: int) -> str:
    """Return the name of a tensor's format, or "unknown"."""
    fmt = _FORMAT_OF_TYPE.get(ggml_type)
    return fmt.name if fmt else _OTHER_TYPES.get(ggml_type, "unknown")


def _read_vector(fmt: Format, data: memoryview) -> NDArray[np.float32]:
    columns = np.frombuffer(data, np.uint8).reshape(1, -1)
    if fmt.name == "F32":
        in_place: NDArray[np.float32] = columns[0].view("<f4")
        if in_place.flags.aligned:
            return in_place
    vector: NDArray[np.float32] = decode(fmt, columns)[0]
    vector.flags.writeable = False
    return vector
