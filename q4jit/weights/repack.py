"""Repack blocks: the same numbers in fields that suit wide loads (`Format.repacked`), and back."""

import numpy as np
from numpy.typing import NDArray

from q4jit.weights.decode import codes, factors, plane_mask, plane_word
from q4jit.weights.formats import SCALE_BYTES, Format, Plane, SubFactors


def repack(fmt: Format, blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return blocks [..., block_bytes] as blocks of `fmt.repacked`, without loss.

    Works on what it is given at once: callers pass some columns at a time.
    """
    return blocks if fmt.repacked is fmt else _rewritten(fmt, fmt.repacked, blocks)


def unrepack(fmt: Format, blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return blocks of `fmt.repacked`, as `repack` makes them, as blocks [..., block_bytes]."""
    return blocks if fmt.repacked is fmt else _rewritten(fmt.repacked, fmt, blocks)


def _rewritten(old: Format, new: Format, blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return blocks of a format with the fields where another format has them."""
    out = np.zeros((*blocks.shape[:-1], new.block_bytes), np.uint8)
    for (at, size), (to, _) in zip(float_fields(old), float_fields(new), strict=True):
        out[..., to : to + size] = blocks[..., at : at + size]
    for old_sub, new_sub in ((old.sub_scales, new.sub_scales), (old.sub_minima, new.sub_minima)):
        if old_sub is not None and new_sub is not None:
            integers = factors(old_sub, old.sub_blocks, blocks)
            store_factors(new_sub, new.sub_blocks, integers, out)
    store_codes(new, codes(old, blocks), out)
    return out


def float_fields(fmt: Format) -> list[tuple[int, int]]:
    """Return where a block has its scale and its minimum, if any, and the bytes of each."""
    assert fmt.scale_at is not None, "a block format without a scale"
    scale = fmt.scale_at, SCALE_BYTES[fmt.scale_type]
    return [scale] if fmt.minimum_at is None else [scale, (fmt.minimum_at, 2)]


def store_factors(
    sub: SubFactors, count: int, integers: NDArray[np.int16], out: NDArray[np.uint8]
) -> None:
    """Store the integers of `count` sub-blocks [..., count], as `factors` reads them, in blocks.

    out: uint8 [..., block_bytes], with zeros in these bits.
    """
    stored = (integers + np.int16(sub.zero)).astype(np.uint8)  # int8 in two's complement
    for part in sub.parts:
        field = stored >> np.uint8(part.lshift) & np.uint8((1 << part.bits) - 1)
        at, shifts = np.array([part.position(j) for j in range(count)]).T
        for shift in np.unique(shifts):  # fields with the same lowest bit are in different bytes
            chosen = np.flatnonzero(shifts == shift)
            out[..., at[chosen]] |= field[..., chosen] << np.uint8(shift)


def store_codes(fmt: Format, stored: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Store codes [..., block_elements] in the planes of blocks, uint8 [..., block_bytes]."""
    for plane in fmt.planes:
        size = plane.size_bytes(fmt.block_elements)
        out[..., plane.at : plane.at + size] = _plane_bytes(plane, stored)


def _plane_bytes(plane: Plane, stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the plane of blocks from codes [..., block_elements]."""
    word = plane_word(plane)
    field = stored.view(word) >> word.type(plane.lshift) & plane_mask(plane)
    width = plane.width_bytes // word.itemsize
    layers = field.reshape(*stored.shape[:-1], -1, 8 // plane.bits, width)
    packed = layers[..., 0, :].copy()
    for i in range(1, 8 // plane.bits):
        packed |= layers[..., i, :] << word.type(i * plane.bits)
    of_blocks: NDArray[np.uint8] = packed.view(np.uint8)
    return of_blocks.reshape(*stored.shape[:-1], -1)
