"""Encoders of Q4_K, Q5_K and Q6_K: super-blocks of 256 with integer scales per sub-block.

First each sub-block gets the scale (and the minimum) with the least squared error. The largest ones
determine the f16 fields of the super-block, so that the others are integers of these fields. Then
each sub-block tries some integers near its optimum, with codes of their own: a scale that fits the
elements by luck is often not the nearest integer.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from q4jit.weights.encoders.exact import as_bytes
from q4jit.weights.encoders.search import (
    Floats,
    RangeSearch,
    ScaleSearch,
    by_element,
    dot,
    normalise,
    reciprocal,
)

_SUPER_BLOCK: Final = 256
_LARGEST_SIX_BIT: Final = 63

# Found by experiment on normal data: twice as many steps gain less than 0.5 %.
_ENDS: Final = {15: np.arange(13, 16.1, 0.25), 31: np.arange(28.5, 32.6, 0.5)}
_SCALE_STEPS: Final = (-1, 0, 1)
_MINIMUM_STEPS: Final = (-1, 0, 1)
_TARGETS_Q6: Final = np.arange(-34, -25, 0.5)
_SCALE_STEPS_Q6: Final = (-1, 0, 1)


def q4_k(blocks: Floats) -> NDArray[np.uint8]:
    """Encode Q4_K: blocks [n, 256] to uint8 [n, 144]."""
    fields, codes = _encode_ranges(blocks, 15)
    pairs = codes.reshape(-1, 4, 2, 32)
    quants = pairs[:, :, 0] | pairs[:, :, 1] << np.uint8(4)
    return as_bytes(*fields, quants.reshape(-1, 128))


def q5_k(blocks: Floats) -> NDArray[np.uint8]:
    """Encode Q5_K: blocks [n, 256] to uint8 [n, 176]."""
    fields, codes = _encode_ranges(blocks, 31)
    fifth = np.packbits(codes.reshape(-1, 8, 32) >> np.uint8(4), axis=1, bitorder="little")
    pairs = (codes & np.uint8(15)).reshape(-1, 4, 2, 32)
    quants = pairs[:, :, 0] | pairs[:, :, 1] << np.uint8(4)
    return as_bytes(*fields, fifth.reshape(-1, 32), quants.reshape(-1, 128))


def q6_k(blocks: Floats) -> NDArray[np.uint8]:
    """Encode Q6_K: blocks [n, 256] to uint8 [n, 210]."""
    values = by_element(blocks, 16)
    powers = normalise(values, 16)
    search = ScaleSearch(values, _nearest_signed)
    search.grid(_TARGETS_Q6)
    scales = search.scale.reshape(-1, 16)
    extreme = np.take_along_axis(scales, np.abs(scales).argmax(1, keepdims=True), 1)[:, 0]
    field, unit = _field(extreme, -128, powers)
    whole = _whole_scales(values, search.scale, np.repeat(unit, 16))
    codes = _nearest_signed(values, reciprocal(whole * np.repeat(unit, 16)))
    codes += np.float32(32)
    parts = np.ascontiguousarray(codes.astype(np.uint8).T).reshape(-1, 2, 4, 32)
    low = parts & np.uint8(15)
    quants = low[:, :, :2] | low[:, :, 2:] << np.uint8(4)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, np.newaxis]
    upper = np.bitwise_or.reduce(parts >> np.uint8(4) << shifts, axis=2)
    sub_scales = whole.astype(np.int8).reshape(-1, 16)
    return as_bytes(quants.reshape(-1, 128), upper.reshape(-1, 64), sub_scales, field)


def _nearest_signed(values: Floats, inverse: Floats) -> Floats:
    codes: Floats = values * inverse
    np.rint(codes, out=codes)
    np.maximum(codes, np.float32(-32), out=codes)
    return np.minimum(codes, np.float32(31), out=codes)


def _whole_scales(values: Floats, scale: Floats, unit: Floats) -> Floats:
    """Return for each sub-block the int8 multiple of `unit` with the least error near `scale`."""
    nearest = np.rint(scale * reciprocal(unit))
    best, least = np.zeros_like(scale), np.zeros_like(scale)  # code 0 of all: Σ value²
    for step in _SCALE_STEPS_Q6:
        whole = np.clip(nearest + np.float32(step), np.float32(-128), np.float32(127))
        stored = whole * unit
        codes = _nearest_signed(values, reciprocal(stored))
        error = stored * (stored * dot(codes, codes) - 2 * dot(codes, values))
        better = error < least
        np.copyto(best, whole, where=better)
        np.copyto(least, error, where=better)
    return best


def _encode_ranges(
    blocks: Floats, steps: int
) -> tuple[tuple[NDArray[np.generic], ...], NDArray[np.uint8]]:
    """Return d, dmin and the packed scales of Q4_K and Q5_K, and their codes [n, 256]."""
    values = by_element(blocks, 32)
    powers = normalise(values, 8)
    search = RangeSearch(values, steps)
    search.grid(_ENDS[steps])
    d, unit = _field(search.scale.reshape(-1, 8).max(axis=1), _LARGEST_SIX_BIT, powers)
    dmin, unit_min = _field(search.minimum.reshape(-1, 8).max(axis=1), _LARGEST_SIX_BIT, powers)
    units = np.repeat(unit, 8), np.repeat(unit_min, 8)
    scales, minima = _whole_ranges(search, values, *units)
    inverse = reciprocal(scales * units[0])
    codes = search.codes(values * inverse, minima * units[1] * inverse).astype(np.uint8)
    fields = d, dmin, _pack_six_bits(scales, minima)
    return fields, np.ascontiguousarray(codes.T).reshape(-1, _SUPER_BLOCK)


def _whole_ranges(
    search: RangeSearch, values: Floats, unit: Floats, unit_min: Floats
) -> tuple[Floats, Floats]:
    """Return for each sub-block the multiples of both units, 0 to 63, with the least error."""
    per_unit, per_unit_min = reciprocal(unit), reciprocal(unit_min)
    nearest = np.rint(search.scale * per_unit)
    inverse = reciprocal(search.scale)
    scaled = values * inverse
    mean_code = search.codes(scaled, search.minimum * inverse).mean(axis=0)
    best_scale, best_minimum = np.zeros_like(unit), np.zeros_like(unit)
    least = np.full_like(unit, np.inf)
    for step in _SCALE_STEPS:
        whole = _six_bits(nearest + np.float32(step))
        scale = whole * unit
        inverse = reciprocal(scale)
        np.multiply(values, inverse, out=scaled)
        # a larger scale moves the elements up, so its minimum moves them down
        middle = (search.minimum + (scale - search.scale) * mean_code) * per_unit_min
        for step_min in _MINIMUM_STEPS:
            tried = _six_bits(np.rint(middle + np.float32(step_min)))
            search.codes(scaled, tried * unit_min * inverse)
            moments = search.moments()
            whole_min = _six_bits(np.rint(search.best_minimum(scale, moments) * per_unit_min))
            error = search.error_of(scale, whole_min * unit_min, moments)
            better = error < least
            np.copyto(least, error, where=better)
            np.copyto(best_scale, whole, where=better)
            np.copyto(best_minimum, whole_min, where=better)
    return best_scale, best_minimum


def _six_bits(values: Floats) -> Floats:
    return np.minimum(np.maximum(values, np.float32(0)), np.float32(_LARGEST_SIX_BIT))


def _field(extreme: Floats, largest: int, powers: Floats) -> tuple[NDArray[np.uint8], Floats]:
    """Return an f16 field of each super-block as bytes, and what it means for normalised values.

    extreme: the scale that becomes `largest` times the field. Scales that f16 holds with few bits
    are rounded up, because a multiple cannot exceed `largest`. A field that is not finite, or 0,
    means 0.
    """
    exact = extreme / np.float32(largest) * powers
    stored = exact.astype("<f2")
    low = np.abs(exact) > np.abs(stored.astype(np.float32)) * np.float32(1 + 2**-8)
    stored = (stored.view("<u2") + (low & np.isfinite(exact))).astype("<u2").view("<f2")
    unit = stored.astype(np.float32) / powers
    unit[~np.isfinite(unit)] = 0
    return stored[:, np.newaxis].view(np.uint8), unit


def _pack_six_bits(scales: Floats, minima: Floats) -> NDArray[np.uint8]:
    """Return the 12 bytes of 8 scales and 8 minima of each super-block."""
    sc, m = (values.astype(np.uint8).reshape(-1, 8) for values in (scales, minima))
    first = [values[:, :4] | values[:, 4:] >> np.uint8(4) << np.uint8(6) for values in (sc, m)]
    last = sc[:, 4:] & np.uint8(15) | m[:, 4:] << np.uint8(4)
    return np.concatenate([*first, last], axis=1)
