"""Convert a model's Q4_1 weights to Q4_0, and keep the result as a GGUF file."""

import contextlib
import hashlib
import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from q4jit import GGUFError, QuantizedTensor, load_gguf, quantize
from q4jit.config import cache_dir

__all__ = ["requantized", "write_gguf"]

FROM, TO = "Q4_1", "Q4_0"
TO_TYPE = 2  # GGUF's number for Q4_0
RECIPE = 1  # increase it if the same source gives other bytes
STRING = 8  # GGUF's type number for a text
ALIGNMENT = 32

Progress = Callable[[Iterable[str]], Iterable[str]]


def requantized(path: Path, tensors: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Return the tensors of the file at `path`, with those in Q4_1 converted to Q4_0.

    The conversion runs once per file; its result is kept in the cache folder. progress: wraps the
    names of the tensors to convert, as tqdm does.
    """
    names = [name for name, tensor in tensors.items() if getattr(tensor, "format", "") == FROM]
    if not names:
        return dict(tensors)
    kept = _kept_file(path)
    shapes = {name: tensors[name].shape for name in names}
    converted = None if kept is None else _load(kept, shapes)
    if converted is None:
        converted = {name: quantize(tensors[name].dequantize(), TO) for name in progress(names)}
        try:
            if kept is not None:
                _write_atomically(kept, converted)
        except OSError as error:  # the next run converts again
            print(f"cannot keep the {TO} weights: {error}", file=sys.stderr)
    return {name: converted.get(name, tensor) for name, tensor in tensors.items()}


def write_gguf(file: BinaryIO, tensors: Mapping[str, QuantizedTensor]) -> None:
    """Write Q4_0 tensors as GGUF version 3. The only metadata is the architecture's name."""
    file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), 1))
    file.write(_string("general.architecture") + struct.pack("<I", STRING) + _string("llama"))
    offset = 0
    for name, tensor in tensors.items():
        file.write(_string(name))
        file.write(struct.pack("<IQQIQ", 2, *tensor.shape, TO_TYPE, offset))
        offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    file.write(bytes(-file.tell() % ALIGNMENT))
    for tensor in tensors.values():
        file.write(tensor.raw.data)
        file.write(bytes(-tensor.nbytes % ALIGNMENT))


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _kept_file(path: Path) -> Path | None:
    """Return the path of the result for a source file; None if there is no cache folder.

    The name depends on the size and time of the source, so a changed source gets a new file.
    """
    directory = cache_dir()
    if directory is None:
        return None
    source = path.resolve()
    facts = source.stat()
    key = json.dumps([RECIPE, str(source), facts.st_size, facts.st_mtime_ns])
    digest = hashlib.sha256(key.encode()).hexdigest()
    return directory / "models" / f"{source.stem}.{TO}.{digest[:16]}.gguf"


def _load(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """Return the tensors of a kept file; None if it is missing or has unexpected contents."""
    try:
        kept = dict(load_gguf(path))
    except (OSError, GGUFError):
        return None
    kept_shapes = {
        name: tensor.shape for name, tensor in kept.items() if getattr(tensor, "format", "") == TO
    }
    return kept if kept_shapes == dict(shapes) else None


def _write_atomically(path: Path, tensors: Mapping[str, QuantizedTensor]) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write_gguf(file, tensors)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
