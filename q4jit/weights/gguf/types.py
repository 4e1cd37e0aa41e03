"""The types of ggml's tensors: formats that q4jit reads, and the names and sizes of the others."""

from math import prod
from typing import Final, NamedTuple

from q4jit.weights.formats import FORMATS, Format


class OtherType(NamedTuple):
    """A type that q4jit does not read: its tensors are listed, and their bytes are checked."""

    name: str
    block_elements: int
    block_bytes: int


_FORMAT_OF_TYPE: Final = {fmt.ggml_type: fmt for fmt in FORMATS.values()}
_OTHER_TYPES: Final = {
    9: OtherType("Q8_1", 32, 36),
    15: OtherType("Q8_K", 256, 292),
    16: OtherType("IQ2_XXS", 256, 66),
    17: OtherType("IQ2_XS", 256, 74),
    18: OtherType("IQ3_XXS", 256, 98),
    19: OtherType("IQ1_S", 256, 50),
    21: OtherType("IQ3_S", 256, 110),
    22: OtherType("IQ2_S", 256, 82),
    24: OtherType("I8", 1, 1),
    25: OtherType("I16", 1, 2),
    26: OtherType("I32", 1, 4),
    27: OtherType("I64", 1, 8),
    28: OtherType("F64", 1, 8),
    29: OtherType("IQ1_M", 256, 56),
    34: OtherType("TQ1_0", 256, 54),
    35: OtherType("TQ2_0", 256, 66),
    40: OtherType("NVFP4", 64, 36),
    41: OtherType("Q1_0", 128, 18),
}


def format_of(ggml_type: int) -> Format | None:
    """Return the format of a type; None if q4jit does not read it."""
    return _FORMAT_OF_TYPE.get(ggml_type)


def type_name(ggml_type: int) -> str:
    """Return the name of a type, or "unknown"."""
    known = _known(ggml_type)
    return known.name if known else "unknown"


def bits_per_element(ggml_type: int) -> float | None:
    """Return the bits of an element, its share of the scales included; None if unknown."""
    known = _known(ggml_type)
    return 8 * known.block_bytes / known.block_elements if known else None


def data_bytes(ggml_type: int, dims: tuple[int, ...]) -> int | None:
    """Return the bytes of a tensor; None if its type is unknown or its rows are no whole blocks."""
    if 0 in dims:
        return 0
    known = _known(ggml_type)
    if known is None or not has_whole_blocks(known, dims):
        return None
    blocks = (dims[0] if dims else 1) // known.block_elements
    return blocks * known.block_bytes * prod(dims[1:])


def has_whole_blocks(known: Format | OtherType, dims: tuple[int, ...]) -> bool:
    """Return whether the rows of a tensor consist of whole blocks."""
    return (dims[0] if dims else 1) % known.block_elements == 0


def _known(ggml_type: int) -> Format | OtherType | None:
    return _FORMAT_OF_TYPE.get(ggml_type) or _OTHER_TYPES.get(ggml_type)
