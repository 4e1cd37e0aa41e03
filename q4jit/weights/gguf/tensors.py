"""The table of tensors: its entries are checked first, and tensors are read on access."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import expected
from q4jit.weights.decode import decode
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.formats import Format
from q4jit.weights.gguf.reader import Reader, tensor_name
from q4jit.weights.gguf.types import data_bytes, format_of, has_whole_blocks, type_name
from q4jit.weights.tensor import QuantizedTensor

Tensor: TypeAlias = QuantizedTensor | ExpertTensor | NDArray[np.float32]

_MAX_DIMENSIONS: Final = 64  # ggml has at most 4; more than 3 are only listed


@dataclass(frozen=True)
class TensorInfo:
    """An entry of the tensor table: its position `at`, and its data from `start` to `end`.

    Attributes:
        has_utf8_name: whether its name is UTF-8; other bytes are escaped in `name`.
    """

    name: str
    at: int
    dims: tuple[int, ...]
    ggml_type: int
    start: int
    end: int
    has_utf8_name: bool = True

    @property
    def data_bytes(self) -> int | None:
        """The bytes that type and dimensions ask for; None if they are unknown."""
        return data_bytes(self.ggml_type, self.dims)


@dataclass(frozen=True)
class TensorEntry:
    """What a file says about one of its tensors.

    Attributes:
        name: its name; bytes that are not UTF-8 are escaped as in Python.
        shape: the dimensions, the contiguous one first: (K, N) for a matrix, (K, N, E) for the
            matrices of E experts.
        format: the name of the format, for example "Q4_0"; "unknown" for one without a name here.
        ggml_type: the number of the format.
        nbytes: bytes of the data. If the format is unknown, all bytes up to the next tensor.
        problem: why q4jit cannot read the tensor; empty if it can.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    ggml_type: int
    nbytes: int
    problem: str

    @property
    def readable(self) -> bool:
        """Whether the file's mapping has this tensor."""
        return not self.problem

    @property
    def rank(self) -> int:
        """The number of dimensions; ones after the second do not count."""
        return rank_of(self.shape)


def rank_of(dims: tuple[int, ...]) -> int:
    """Return the number of dimensions; ones after the second do not count."""
    rank = len(dims)
    while rank > 2 and dims[rank - 1] == 1:
        rank -= 1
    return rank


def entry_of(info: TensorInfo) -> TensorEntry:
    """Return what users see of an entry of the table."""
    problem = problem_of(info)
    return TensorEntry(
        info.name,
        info.dims,
        type_name(info.ggml_type),
        info.ggml_type,
        info.end - info.start,
        expected(*problem) if problem else "",
    )


def read_tensors(reader: Reader, count: int, alignment: int) -> dict[str, TensorInfo]:
    """Read the table of tensors, and check that their data is in the file and does not overlap."""
    infos: dict[str, TensorInfo] = {}
    for i in range(count):
        info = _read_info(reader, i, alignment)
        if info.name in infos:
            got = "a second tensor of this name"
            raise reader.error(info.at, tensor_name(info.name), "every name once", got)
        infos[info.name] = info
    if not infos:
        return infos
    data_at = -(-reader.at // alignment) * alignment
    absolute = {name: _absolute(reader, info, data_at) for name, info in infos.items()}
    stored = sorted(
        (info for info in absolute.values() if info.start < info.end),
        key=lambda info: (info.start, info.end),
    )
    _check_overlap(reader, stored)
    ends = [*(info.start for info in stored[1:]), reader.size]
    for info, end in zip(stored, ends[: len(stored)], strict=True):
        if info.data_bytes is None:
            absolute[info.name] = replace(info, end=end)
    return absolute


def _read_info(reader: Reader, i: int, alignment: int) -> TensorInfo:
    """Read entry number `i`, with start and end counted from the start of the data.

    Of a tensor whose size is unknown, at least one byte must be in the file.
    """
    at = reader.at
    name = reader.name(f"name of tensor {i}")
    subject = tensor_name(name.text)
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
    size = data_bytes(ggml_type, dims)
    end = offset + (1 if size is None else size)
    return TensorInfo(name.text, at, dims, ggml_type, offset, end, name.is_utf8)


def _absolute(reader: Reader, info: TensorInfo, data_at: int) -> TensorInfo:
    """Return an entry with start and end counted from byte 0; check that they are in the file."""
    start, end = data_at + info.start, data_at + info.end
    if start < end and end > reader.size:
        inside = f"data in the file's {reader.size} bytes"
        raise reader.error(info.at, tensor_name(info.name), inside, f"bytes {start} to {end}")
    return replace(info, start=start, end=end)


def _check_overlap(reader: Reader, stored: Sequence[TensorInfo]) -> None:
    """Raise GGUFError if the data of two tensors overlap; they are sorted by their start."""
    for previous, info in pairwise(stored):
        if info.start < previous.end:
            other = f"{tensor_name(previous.name)} from {previous.start} to {previous.end}"
            got = f"data at byte {info.start}, inside {other}"
            raise reader.error(info.at, tensor_name(info.name), "tensors that do not overlap", got)


def read_tensor(reader: Reader, info: TensorInfo) -> Tensor:
    """Return a tensor in place. Raises GGUFError for a format or rank that q4jit cannot read."""
    problem = problem_of(info)
    if problem is not None:
        raise reader.error(info.at, tensor_name(info.name), *problem)
    fmt = format_of(info.ggml_type)
    assert fmt is not None  # otherwise there is a problem
    data = reader.view[info.start : info.end]
    if len(info.dims) == 1:
        return _read_vector(fmt, data)
    k, n = info.dims[:2]
    if rank_of(info.dims) == 3:
        return ExpertTensor.from_bytes(data, shape=(info.dims[2], k, n), format=fmt.name)
    return QuantizedTensor.from_bytes(data, shape=(k, n), format=fmt.name)


def problem_of(info: TensorInfo) -> tuple[str, str] | None:
    """Return why q4jit cannot read a tensor: what it expects, and what it got; None if it can."""
    fmt, dims = format_of(info.ggml_type), info.dims
    if not info.has_utf8_name:
        return "a name in UTF-8", "other bytes"
    if fmt is None:
        got = f"{type_name(info.ggml_type)} (ggml type {info.ggml_type})"
        return "a format that q4jit reads", got
    if 0 in dims:
        return "dimensions of at least 1", str(dims)
    if not 1 <= rank_of(dims) <= 3:
        return "one to three dimensions", str(dims) if dims else "none: a single number"
    if not has_whole_blocks(fmt, dims):
        multiple = f"a first dimension that is a multiple of {fmt.block_elements} for {fmt.name}"
        return multiple, f"dimensions {dims}"
    return None


def _read_vector(fmt: Format, data: memoryview) -> NDArray[np.float32]:
    columns = np.frombuffer(data, np.uint8).reshape(1, -1)
    if fmt.name == "F32":
        in_place: NDArray[np.float32] = columns[0].view("<f4")
        if in_place.flags.aligned:
            return in_place
    vector: NDArray[np.float32] = decode(fmt, columns)[0]
    vector.flags.writeable = False
    return vector
