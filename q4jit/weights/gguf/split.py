"""Refuse a part of a model that is split into several files: it would be taken for the model.

llama.cpp's `llama-gguf-split` writes the keys split.no (from 0) and split.count, and names the
parts `model-00001-of-00003.gguf`, ….
"""

import re
from pathlib import Path
from typing import Final

from q4jit.errors import GGUFError, expected
from q4jit.weights.gguf.metadata import Metadata
from q4jit.weights.gguf.reader import Reader

_PART_NAME: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.gguf", re.DOTALL)
_SHOWN_PARTS: Final = 4
_MOST_PARTS: Final = 99_999  # of five digits


def refuse_part(reader: Reader, metadata: Metadata) -> None:
    """Raise GGUFError if a file is one part of several; the error names the missing parts."""
    count = _number(metadata, "split.count")
    if count is None or count <= 1:
        return
    number = _number(metadata, "split.no")
    part = f"part {'?' if number is None else number + 1} of {count}"
    missing = _missing_parts(Path(reader.path), number, count)
    if missing:
        more = f" and {len(missing) - _SHOWN_PARTS} more" if len(missing) > _SHOWN_PARTS else ""
        part += f"; missing beside it: {', '.join(missing[:_SHOWN_PARTS])}{more}"
    cure = "merge all parts: llama-gguf-split --merge FIRST_PART MODEL.gguf"
    raise GGUFError(expected("a whole model", part, where=reader.path, cure=cure))


def _number(metadata: Metadata, key: str) -> int | None:
    value = metadata.get(key)
    return value if isinstance(value, int) else None


def _missing_parts(path: Path, number: int | None, count: int) -> list[str]:
    """Return the names of the parts that are not beside `path`, which is part `number` from 0."""
    match = _PART_NAME.fullmatch(path.name)
    stem = match["stem"] if match else path.stem
    numbers = (
        i for i in range(1, min(count, _MOST_PARTS) + 1) if number is None or i != number + 1
    )
    try:
        beside = {entry.name for entry in path.parent.iterdir()}
    except OSError:  # a folder that can be entered but not listed
        beside = set()
    names = (f"{stem}-{i:05}-of-{count:05}.gguf" for i in numbers)
    return [name for name in names if name not in beside]
