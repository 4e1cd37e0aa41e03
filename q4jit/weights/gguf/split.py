"""Join the parts of a model that is split into several files.

llama.cpp's `llama-gguf-split` names the parts `model-00001-of-00003.gguf`, … and writes the keys
split.no (from 0), split.count and split.tensors.count (of the whole model) to each. The first part
has the other keys as well. Only files that are named after the opened one, in its folder, are read.
"""

import re
from pathlib import Path
from typing import Final

from q4jit.errors import GGUFError, expected
from q4jit.weights.gguf.part import Part, read_part
from q4jit.weights.gguf.reader import key_name, tensor_name

_PART_STEM: Final = re.compile(r"(?P<model>.+)-\d{5}-of-\d{5}", re.DOTALL)
_SHOWN_PARTS: Final = 4
_MOST_PARTS: Final = 99_999  # of five digits


def joined(opened: Part) -> tuple[Part, ...]:
    """Return all parts of a model in order; `opened` is one of them, or the whole model.

    Raises GGUFError for missing parts, for a name that does not belong to the keys, and for parts
    that do not belong together; raises OSError if a part cannot be opened.
    """
    count = _number(opened, "split.count") or 1
    if count <= 1:
        return (opened,)
    number = _number(opened, "split.no")
    if number is None or not number < count <= _MOST_PARTS:
        limits = f"split.no below split.count, and split.count up to {_MOST_PARTS}"
        got = f"{'no number' if number is None else number} and {count}"
        raise GGUFError(expected(limits, got, where=opened.path))
    paths = _paths(opened, number, count)
    parts = tuple(opened if i == number else read_part(str(path)) for i, path in enumerate(paths))
    for i, part in enumerate(parts):
        _check_key(part, "split.no", i)
        _check_key(part, "split.count", count)
    _check_tensors(parts)
    return parts


def _number(part: Part, key: str) -> int | None:
    value = part.metadata.get(key)
    return value if isinstance(value, int) and value >= 0 else None


def _paths(opened: Part, number: int, count: int) -> list[Path]:
    """Return the paths of all parts. Raises GGUFError if some are missing."""
    path = Path(opened.path)
    match = _PART_STEM.fullmatch(path.stem)
    model = match["model"] if match else path.stem
    paths = [path.with_name(f"{model}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    part = f"part {number + 1} of {count}"
    if path.name != paths[number].name:
        name = f"a file named {paths[number].name}, because it is {part}"
        cure = "give all parts their names"
        raise GGUFError(expected(name, path.name, where=opened.path, cure=cure))
    missing = [other.name for other in paths if not other.exists()]
    if missing:
        more = f" and {len(missing) - _SHOWN_PARTS} more" if len(missing) > _SHOWN_PARTS else ""
        got = f"{part}; missing beside it: {', '.join(missing[:_SHOWN_PARTS])}{more}"
        cure = "put all parts into one folder"
        raise GGUFError(expected("a whole model", got, where=opened.path, cure=cure))
    return paths


def _check_key(part: Part, key: str, wanted: int) -> None:
    """Raise GGUFError unless a key has the value that its part's name and the others ask for."""
    value = _number(part, key)
    if value != wanted:
        got = "another value" if key in part.metadata else "no such key"
        got = got if value is None else str(value)
        raise GGUFError(expected(str(wanted), got, where=f"{part.path}: {key_name(key)}"))


def _check_tensors(parts: tuple[Part, ...]) -> None:
    """Raise GGUFError unless every tensor is in one part, and all that were counted are there."""
    part_of: dict[str, Part] = {}
    for part in parts:
        for name in part.infos:
            if name in part_of:
                got = f"the same name in {part_of[name].path}"
                where = f"{part.path}: {tensor_name(name)}"
                raise GGUFError(expected("a tensor in one part only", got, where=where))
            part_of[name] = part
    for part in parts:
        if "split.tensors.count" in part.metadata:
            _check_key(part, "split.tensors.count", len(part_of))
