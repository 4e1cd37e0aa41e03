"""Print the tensors of a file as a table, and why some cannot be read."""

from collections.abc import Iterator, Sequence
from typing import Final

from q4jit.errors import short_name, shortened
from q4jit.weights.gguf.tensors import TensorEntry

_MOST_LINES: Final = 1000  # the table of tensors comes from a file that may be hostile
_MOST_LETTERS: Final = 100


def table(entries: Sequence[TensorEntry]) -> Iterator[str]:
    """Yield a line per tensor, with the columns aligned."""
    shown = entries[:_MOST_LINES]
    names = [short_name(entry.name)[1:-1] for entry in shown]
    shapes = [
        shortened(" × ".join(map(str, entry.shape)) or "a number", _MOST_LETTERS) for entry in shown
    ]
    sizes = [f"{entry.nbytes:,} bytes" for entry in shown]
    columns = (_padded(names, "<"), _padded(shapes, ">"), _padded(sizes, ">"))
    for entry, name, shape, size in zip(shown, *columns, strict=True):
        state = (
            f"  not readable: {shortened(entry.problem, _MOST_LETTERS)}" if entry.problem else ""
        )
        yield f"  {name}  {shape}  {entry.format:7}  {size}{state}"
    if len(entries) > len(shown):
        yield f"  … and {len(entries) - len(shown)} more"


def _padded(texts: Sequence[str], align: str) -> list[str]:
    letters = max(map(len, texts), default=0)
    return [f"{text:{align}{letters}}" for text in texts]
