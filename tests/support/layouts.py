"""Formats with the layouts that can store them."""

from collections.abc import Iterable

from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import TILES16
from q4jit.weights.tiles import suits_tiles16


def formats_and_layouts(layouts: Iterable[str]) -> list[tuple[str, str]]:
    """Return each format's name with each of these layouts that suits it."""
    return [
        (name, layout)
        for name, fmt in FORMATS.items()
        for layout in layouts
        if layout != TILES16 or suits_tiles16(fmt)
    ]
