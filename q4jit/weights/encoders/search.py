"""Searches for the scales, and minima, with which blocks are closest to their elements.

ggml's way, for many blocks at a time: try a grid of scales. Each gives every element a code, and
the codes give the scale (and the minimum) with the least squared error. The best of the grid stays.

Arrays are [elements, blocks]: sums over a block then add contiguous rows, and a value per block is
a row as well, which NumPy does several times faster than with a block per row.
"""

from collections.abc import Callable, Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Values below this share of a power of two near the largest value of a block count as 0.
_TINY: Final = np.float32(2.0**-60)

# Σ code² − (Σ code)² / count is 0 if all codes are equal (but for rounding), else almost 1 or more.
_EQUAL_CODES: Final = np.float32(0.5)


def by_element(blocks: Floats, elements: int) -> Floats:
    """Return a copy [elements, blocks] of blocks that are `elements` long."""
    return blocks.reshape(-1, elements).T.copy()  # a single block would be contiguous already


def normalise(values: Floats, share: int) -> Floats:
    """Divide `values` in place by powers of two that bring each block's largest value near 1.

    values: [elements, blocks]; `share` blocks side by side have one power. A block with NaN or Inf
    becomes zeros. Returns the powers, f32 [blocks / share], NaN where a value is not finite.
    """
    largest = np.maximum(values.max(axis=0), -values.min(axis=0)).reshape(-1, share).max(axis=1)
    finite = np.isfinite(largest)
    exponents = np.frexp(np.where(finite, largest, np.float32(0)))[1]
    # the limits keep the powers and their reciprocals finite
    powers = np.ldexp(np.float32(1), np.clip(exponents, -126, 127))
    if not finite.all():
        values[:, np.repeat(~finite, share)] = 0
    values *= np.repeat(np.float32(1) / powers, share)
    return np.where(finite, powers, np.float32(np.nan))


def dot(a: Floats, b: Floats) -> Floats:
    """Return the sums of products over the elements of each block."""
    sums: Floats = np.einsum("ij,ij->j", a, b)
    return sums


def reciprocal(values: Floats) -> Floats:
    """Return 1 / values, and 0 for values that count as 0."""
    nonzero = np.abs(values) > _TINY
    return np.where(nonzero, np.float32(1) / values, np.float32(0))


Nearest = Callable[[Floats, Floats], Floats]
"""Takes values and reciprocals of scales; returns the codes (or their values) that are nearest."""


class ScaleSearch:
    """The best scale for each block, of those tried: value = scale · code.

    Attributes:
        scale, gain: f32 [blocks]; the squared error is Σ value² − gain.
    """

    def __init__(self, values: Floats, nearest: Nearest) -> None:
        """Start with zeros. values: [elements, blocks]."""
        self._values, self._nearest = values, nearest
        self.scale = np.zeros(values.shape[1], np.float32)
        self.gain = np.zeros_like(self.scale)

    def grid(self, targets: Iterable[float]) -> None:
        """Try scales that bring the element with the largest magnitude to each of `targets`."""
        values = self._values
        at = np.abs(values).argmax(axis=0)[np.newaxis]
        per_unit = reciprocal(np.take_along_axis(values, at, axis=0)[0])
        for target in targets:
            self._consider(per_unit * np.float32(target))

    def _consider(self, inverse: Floats) -> None:
        codes = self._nearest(self._values, inverse)
        products = dot(codes, self._values)
        scale = products / np.maximum(dot(codes, codes), _TINY)
        gain = scale * products
        better = gain > self.gain
        np.copyto(self.gain, gain, where=better)
        np.copyto(self.scale, scale, where=better)


Moments = tuple[Floats, Floats, Floats]
"""Of the codes of each block: Σ code, Σ code² and Σ code · value."""


class RangeSearch:
    """The best scale and minimum for each block, of those tried: value = scale · code − minimum.

    Neither may be negative. Codes are 0 to `steps`.

    Attributes:
        scale, minimum, gain: f32 [blocks]; the squared error is Σ value² − gain.
    """

    def __init__(self, values: Floats, steps: int) -> None:
        """Start with all codes 0. values: [elements, blocks]."""
        self._values, self._steps = values, np.float32(steps)
        self._codes = np.empty_like(values)
        self._share = np.float32(1 / len(values))
        self._sums = values.sum(axis=0)
        self._mean = self._sums * self._share
        self._gain_of_mean = self._sums * self._mean
        self.scale = np.zeros_like(self._sums)
        self.minimum = np.maximum(-self._mean, np.float32(0))
        self.gain = np.where(self._mean < 0, self._gain_of_mean, np.float32(0))

    def grid(self, ends: Iterable[float]) -> None:
        """Try scales that bring the range of a block, with 0, to 0 to each of `ends`."""
        low = np.minimum(self._values.min(axis=0), np.float32(0))
        above = self._values - low
        per_unit = reciprocal(above.max(axis=0))
        for end in ends:
            np.multiply(above, per_unit * np.float32(end), out=self._codes)
            np.rint(self._codes, out=self._codes)
            if end >= self._steps + 0.5:  # 15.5 is rounded up to 16
                np.minimum(self._codes, self._steps, out=self._codes)
            self._consider()

    def codes(self, scaled: Floats, offset: Floats) -> Floats:
        """Return the codes that are nearest to `scaled` + `offset`: values and minima by scales.

        The next call overwrites them.
        """
        codes = self._codes
        np.add(scaled, offset, out=codes)
        np.rint(codes, out=codes)
        return np.clip(codes, np.float32(0), self._steps, out=codes)

    def _consider(self) -> None:
        of_codes, squares, products = self.moments()
        mean_code = of_codes * self._share
        covariance = products - mean_code * self._sums
        variance = squares - of_codes * mean_code
        scale = covariance / np.maximum(variance, _EQUAL_CODES)
        minimum = scale * mean_code - self._mean
        gain = scale * covariance + self._gain_of_mean
        # where the best minimum is negative, 0 is the best that the format has
        without = minimum < 0
        if without.any():
            scale_alone = products / np.maximum(squares, _TINY)
            np.copyto(scale, scale_alone, where=without)
            np.copyto(gain, scale_alone * products, where=without)
            np.copyto(minimum, np.float32(0), where=without)
        better = (gain > self.gain) & (scale >= 0)
        np.copyto(self.gain, gain, where=better)
        np.copyto(self.scale, scale, where=better)
        np.copyto(self.minimum, minimum, where=better)

    def moments(self) -> Moments:
        """Return the moments of the codes that were made last."""
        codes = self._codes
        return np.add.reduce(codes, axis=0), dot(codes, codes), dot(codes, self._values)

    def best_minimum(self, scale: Floats, moments: Moments) -> Floats:
        """Return the minimum with the least squared error for a scale and codes."""
        best: Floats = scale * moments[0] * self._share - self._mean
        return best

    def error_of(self, scale: Floats, minimum: Floats, moments: Moments) -> Floats:
        """Return the squared error of a scale and minimum for codes, less Σ value²."""
        of_codes, squares, products = moments
        of_scale = scale * (scale * squares - 2 * (minimum * of_codes + products))
        error: Floats = of_scale + minimum * (2 * self._sums + minimum / self._share)
        return error
