"""Describe where the fields of a weight's blocks are in each layout; see docs/layouts.md."""

from typing import Any, Final

from q4jit.weights.formats import Format
from q4jit.weights.layouts import (
    GGUF,
    INTERLEAVED16,
    PANEL_COLUMNS,
    PLANAR,
    Interleaved,
    Planar,
    fields,
)

LAYOUTS: Final = (PLANAR, GGUF, INTERLEAVED16)


def describe_layout(fmt: Format, layout: str, shape: tuple[int, int] | None) -> dict[str, Any]:
    """Return the offsets and strides of the fields of a weight's blocks, in bytes.

    shape: (K, N); None for a kernel that takes K and N at each launch (`gguf` only).
    """
    if layout == INTERLEAVED16:
        assert shape is not None
        return _describe_interleaved(Interleaved(fmt.repacked, *shape))
    description: dict[str, Any] = {
        "layout": layout,
        "address": "offset_bytes + (column * blocks + block) * stride_bytes",
    }
    if layout == PLANAR:
        assert shape is not None
        planar = Planar(fmt.repacked, *shape)
        regions = [(name, at, size, size) for name, (at, size) in planar.regions.items()]
        elements, alignment, size_bytes = planar.block_elements, 16, planar.size_bytes
    elif fmt.float_type is not None:
        regions = [("values", 0, fmt.block_bytes, fmt.block_bytes)]
        elements, alignment, size_bytes = 1, fmt.block_bytes, None
    else:
        regions = [(f.name, f.at, fmt.block_bytes, f.size_bytes) for f in fields(fmt)]
        alignment = 2 if fmt.block_bytes % 2 == 0 else 1
        elements, size_bytes = fmt.block_elements, None
    if shape is None:
        blocks: Any = f"K / {elements}"
        size: Any = f"N * K / {elements} * {fmt.block_bytes}"
    else:
        blocks = -(-shape[0] // elements)
        size = size_bytes or shape[1] * fmt.column_bytes(shape[0])
    return description | {
        "size_bytes": size,
        "alignment_bytes": alignment,
        "block_elements": elements,
        "blocks": blocks,
        "regions": [
            {"name": name, "offset_bytes": at, "stride_bytes": stride, "field_bytes": size_of_field}
            for name, at, stride, size_of_field in regions
        ],
    }


def _describe_interleaved(shape: Interleaved) -> dict[str, Any]:
    by_name = {f.name: f for f in fields(shape.fmt)}
    offsets = {name: shape.field_at(name) for name in by_name}
    return {
        "layout": INTERLEAVED16,
        "address": f"(column // {PANEL_COLUMNS} * tiles + block // blocks_per_tile) * tile_bytes"
        " + offset_bytes + block % blocks_per_tile * stride_bytes"
        f" + (unit * {PANEL_COLUMNS} + column % {PANEL_COLUMNS}) * unit_bytes",
        "size_bytes": shape.panels * shape.panel_bytes,
        "alignment_bytes": 64,
        "block_elements": shape.block_elements,
        "blocks": shape.blocks,
        "blocks_per_tile": shape.blocks_per_slab,
        "tiles": shape.slabs,
        "tile_bytes": shape.slab_bytes,
        "regions": [
            {
                "name": name,
                "offset_bytes": at,
                "stride_bytes": stride,
                "unit_bytes": by_name[name].word_bytes,
                "field_bytes": by_name[name].size_bytes,
            }
            for name, (at, stride) in sorted(offsets.items(), key=lambda item: item[1])
        ],
    }
