"""Print the tensors of a file as a table: name, shape, format, and why one cannot be read."""

from collections.abc import Iterator, Sequence
from typing import Final

from q4jit.errors import short_name
from q4jit.weights.gguf.tensors import TensorEntry

_MOST_LINES: Final = 1000  # the table of tensors comes from a file that may be hostile
_MOST_LETTERS: Final = 80


def table(entries: Sequence[TensorEntry]) -> Iterator[str]:
    """Yield a line per tensor, with the columns aligned."""
    shown = entries[:_MOST_LINES]
    names = [short_name(entry.name)[1:-1] for entry in shown]
    shapes = [_short(" × ".join(map(str, entry.shape)) or "a number") for entry in shown]
    name_letters, shape_letters = (max(map(len, texts), default=0) for texts in (names, shapes))
    for entry, name, shape in zip(shown, names, shapes, strict=True):
        state = f"  not readable: {_short(entry.problem)}" if entry.problem else ""
        yield f"  {name:{name_letters}}  {shape:>{shape_letters}}  {entry.format:8}{state}".rstrip()
    if len(entries) > len(shown):
        yield f"  … and {len(entries) - len(shown)} more"


def _short(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 1]}…"
