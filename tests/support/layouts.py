"""Formats with the layouts that can store them, and weights that have only one layout."""

from collections.abc import Iterable

from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import GGUF, TILES16, pack
from q4jit.weights.tensor import QuantizedTensor
from q4jit.weights.tiles import suits_tiles16


def formats_and_layouts(layouts: Iterable[str]) -> list[tuple[str, str]]:
    """Return each format's name with each of these layouts that suits it."""
    return [
        (name, layout)
        for name, fmt in FORMATS.items()
        for layout in layouts
        if layout != TILES16 or suits_tiles16(fmt)
    ]


def held_in(layout: str, w: QuantizedTensor) -> QuantizedTensor:
    """Return the same weight with only the bytes of a layout, not its GGUF blocks."""
    fmt = w.block_format
    packed = w.raw if layout == GGUF else pack(fmt, layout, w.raw)
    return QuantizedTensor.of_packed(fmt, *w.shape, layout, lambda: packed)
