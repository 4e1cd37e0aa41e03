"""Repack blocks: the same numbers in fields that suit wide loads (`Format.repacked`)."""

import numpy as np
from numpy.typing import NDArray

from q4jit.weights.decode import codes, factors
from q4jit.weights.formats import SCALE_BYTES, Format, Plane, SubFactors


def repack(fmt: Format, blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return blocks [..., block_bytes] as blocks of `fmt.repacked`, without loss.

    Works on what it is given at once: callers pass some columns at a time.
    """
    packed = fmt.repacked
    if packed is fmt:
        return blocks
    out = np.zeros((*blocks.shape[:-1], packed.block_bytes), np.uint8)
    moved = [(fmt.scale_at, packed.scale_at, SCALE_BYTES[fmt.scale_type])]
    if fmt.minimum_at is not None:
        moved.append((fmt.minimum_at, packed.minimum_at, 2))
    for at, to, size in moved:
        assert at is not None, "a block format without a scale"
        assert to is not None, "repacked without its scale"
        out[..., to : to + size] = blocks[..., at : at + size]
    for old, new in ((fmt.sub_scales, packed.sub_scales), (fmt.sub_minima, packed.sub_minima)):
        if old is not None and new is not None:
            _store_factors(new, factors(old, fmt.sub_blocks, blocks), out)
    stored = codes(fmt, blocks)
    for plane in packed.planes:
        size = plane.size_bytes(fmt.block_elements)
        out[..., plane.at : plane.at + size] = _unit_plane(plane, stored)
    return out


def _store_factors(sub: SubFactors, values: NDArray[np.int16], out: NDArray[np.uint8]) -> None:
    """Store integers [..., count] of sub-blocks in repacked blocks."""
    stored = (values + np.int16(sub.zero)).astype(np.uint8)  # int8 in two's complement
    (part,) = sub.parts
    out[..., part.at : part.at + part.columns] |= stored << np.uint8(part.shift)


def _unit_plane(plane: Plane, stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a plane of repacked blocks from codes [..., block_elements]."""
    field = stored >> np.uint8(plane.lshift) & np.uint8((1 << plane.bits) - 1)
    layers = field.reshape(*stored.shape[:-1], -1, 8 // plane.bits, plane.width_bytes)
    packed = layers[..., 0, :].copy()
    for i in range(1, 8 // plane.bits):
        packed |= layers[..., i, :] << np.uint8(i * plane.bits)
    return packed.reshape(*stored.shape[:-1], -1)
