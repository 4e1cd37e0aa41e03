"""Convert a model's Q4_1 weights to Q4_0, and keep the result in the cache folder."""

import contextlib
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from q4jit import QuantizedTensor, files, quantize
from q4jit.config import cache_dir
from q4jit.weights.formats import FORMATS

__all__ = ["requantized"]

FROM, TO = "Q4_1", "Q4_0"
RECIPE = "2"  # increase it if the same source gives other bytes
CHECKSUM_BYTES = hashlib.sha256().digest_size
LEFTOVER_AGE_S = 24 * 3600

Progress = Callable[[Iterable[str]], Iterable[str]]
Weights = Mapping[str, QuantizedTensor]


def requantized(path: Path, tensors: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Return the tensors of the file at `path`, with those in Q4_1 converted to Q4_0.

    The conversion runs once per contents; its result is kept in the cache folder. progress: wraps
    the names of the tensors to convert, as tqdm does.
    """
    sources = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, QuantizedTensor) and tensor.format == FROM
    }
    if not sources:
        return dict(tensors)
    kept = f"{path.stem}.{TO}.{_digest(sources)}"
    converted = _read(kept, sources)
    if converted is None:
        converted = {
            name: quantize(sources[name].dequantize(), TO) for name in progress(list(sources))
        }
        _write(kept, converted)
    return {name: converted.get(name, tensor) for name, tensor in tensors.items()}


def _digest(sources: Weights) -> str:
    """Return a hash of everything that the conversion reads.

    A file's path, size and time would be faster to compare, but another file can have the same
    ones. Hashing takes a twentieth of the time of the conversion.
    """
    digest = hashlib.sha256(RECIPE.encode())
    for name, tensor in sources.items():
        digest.update(f"\n{len(name)} {name} {tensor.shape} ".encode())
        digest.update(tensor.raw.data)
    return digest.hexdigest()


def _read(kept: str, sources: Weights) -> dict[str, QuantizedTensor] | None:
    """Return the weights of a kept file; None if it is missing, damaged or of another user."""
    sizes = [FORMATS[TO].column_bytes(k) * n for k, n in (w.shape for w in sources.values())]
    try:
        with _folder() as folder:
            data = files.read_own(folder, kept, sum(sizes) + CHECKSUM_BYTES)
    except (OSError, files.UnsuitableError):  # `_write` mends it, or prints the reason
        return None
    checksum, blocks = data[:CHECKSUM_BYTES], memoryview(data)[CHECKSUM_BYTES:]
    if len(blocks) != sum(sizes) or hashlib.sha256(blocks).digest() != checksum:
        return None
    ends = list(itertools.accumulate(sizes))
    return {
        name: QuantizedTensor.from_bytes(blocks[end - size : end], shape=w.shape, format=TO)
        for (name, w), size, end in zip(sources.items(), sizes, ends, strict=True)
    }


def _write(kept: str, converted: Weights) -> None:
    """Keep weights as a checksum and their blocks. If that fails, the next run converts again."""
    blocks = b"".join(w.raw.data for w in converted.values())
    try:
        with _folder() as folder:
            files.remove_leftovers(folder, time.time() - LEFTOVER_AGE_S)
            files.write_own(folder, kept, hashlib.sha256(blocks).digest() + blocks)
    except OSError as error:
        print(f"cannot keep the {TO} weights: {error}", file=sys.stderr)


@contextlib.contextmanager
def _folder() -> Iterator[int]:
    """Open the folder of kept weights, which must be as private as that of kernels.

    Raises OSError.
    """
    directory = cache_dir()
    if directory is None:
        raise FileNotFoundError("there is no cache folder; set Q4JIT_CACHE_DIR")
    models = directory / "models"
    files.make_private(models)
    with files.opened_folder(models) as folder:
        status = os.fstat(folder)
        if files.is_foreign(status) or files.is_writable_by_others(status):
            raise PermissionError(f"another user could change the files in {models}")
        yield folder
