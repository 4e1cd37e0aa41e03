"""`load_gguf` and `GGUFFile`, a mapping of the tensors in a GGUF file."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from q4jit.errors import MissingNameError
from q4jit.weights.gguf.metadata import Metadata
from q4jit.weights.gguf.part import read_part
from q4jit.weights.gguf.split import joined
from q4jit.weights.gguf.table import table
from q4jit.weights.gguf.tensors import Tensor, TensorEntry, TensorInfo, entry_of, read_tensor
from q4jit.weights.mapped import give_back


class GGUFFile(Mapping[str, Tensor]):
    """The tensors of a GGUF model by name, read in place from read-only memory maps.

    A tensor of two dimensions is a `QuantizedTensor` (also in the formats F16 and F32), one of
    three an `ExpertTensor`, and one of one dimension a read-only f32 array. The same name always
    gives the same object. Tensors keep the map alive, so the file may be closed or deleted while
    they are in use, but not truncated or overwritten. The parts of a split model are one mapping.
    An unknown name raises MissingNameError.

    The mapping has every tensor that q4jit can read, so `dict(model)` and `model.items()` work for
    any file. `model.tensors` and `print(model)` list the others as well; `model[name]` of one of
    them raises GGUFError with the reason.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        name = os.fspath(path)
        self._absolute = str(Path(name).absolute())  # now: the working directory may change
        self._path = name
        self._parts = joined(read_part(name))
        self._metadata = self._parts[0].metadata  # the first part has the model's keys
        self._part_of = {name: part for part in self._parts for name in part.infos}
        self._entries = {name: entry_of(self._info(name)) for name in self._part_of}
        self._readable = {name: None for name, entry in self._entries.items() if entry.readable}
        self._tensors: dict[str, Tensor] = {}

    @property
    def paths(self) -> tuple[str, ...]:
        """The path of each file in order: several if the model is split."""
        return tuple(part.path for part in self._parts)

    @property
    def metadata(self) -> Metadata:
        """The file's keys and values."""
        return self._metadata

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Name, shape and format of every tensor, also of those that q4jit cannot read."""
        return MappingProxyType(self._entries)

    def give_back(self, name: str) -> None:
        """Give the pages of a tensor's data back to the system, once it has been copied.

        Pages that were read count as memory of the process until then. The tensor stays valid:
        later reads get the bytes from the file again. A `Weight` and kernels that repack a tensor
        give them back by themselves. Raises MissingNameError, and GGUFError if the file is closed.
        """
        if name not in self._part_of:
            raise MissingNameError(self._path, "tensor", name, self._entries)
        info = self._info(name)
        give_back(self._part_of[name].reader.view[info.start : info.end])

    def close(self) -> None:
        """Release the maps. Tensors that were read before stay valid."""
        for part in self._parts:
            part.reader.close()
        self._tensors.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the file's path: a worker on this machine maps the same file."""
        return load_gguf, (self._absolute,)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._part_of:
            raise MissingNameError(self._path, "tensor", name, self._readable)
        tensor = self._tensors.get(name)
        if tensor is None:
            new = read_tensor(self._part_of[name].reader, self._info(name))
            tensor = self._tensors.setdefault(name, new)  # two threads get the same object
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._readable

    def __iter__(self) -> Iterator[str]:
        return iter(self._readable)

    def __len__(self) -> int:
        return len(self._readable)

    def __repr__(self) -> str:
        others = len(self._entries) - len(self)
        more = f" (and {others} that cannot be read)" if others else ""
        keys = len(self.metadata)
        files = f" in {len(self._parts)} files" if len(self._parts) > 1 else ""
        return f"<GGUFFile {self._path}: {len(self)} tensors{more}{files}, {keys} keys>"

    def __str__(self) -> str:
        return "\n".join([repr(self)[1:-1], *table(tuple(self._entries.values()))])

    def _info(self, name: str) -> TensorInfo:
        return self._part_of[name].infos[name]


def load_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Map a GGUF file (version 2 or 3, little-endian) read-only and check its whole header.

    If the file is one part of a split model (`model-00001-of-00003.gguf`), all parts in its folder
    are joined. Raises GGUFError, which names the file, the key or tensor, and the byte, and for
    missing parts and parts of different models; raises OSError if a file cannot be opened.
    """
    return GGUFFile(path)
