"""A mixture of experts: the feed-forward of each token is one function of chosen experts.

    python examples/moe.py --tokens 3

The weights are random. The program compares the kernels with NumPy, and prints their plan.
"""

import argparse

import numpy as np
from numpy.typing import NDArray

from q4jit import ExpertTensor, quantize, specialize, vecmat

__all__ = ["choose", "feed_forward", "main", "random_experts"]

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

WIDTH, HIDDEN = 256, 128
EXPERTS, CHOSEN = 16, 4


@specialize
def feed_forward(
    x: Floats, gate: ExpertTensor, up: ExpertTensor, down: ExpertTensor, ids: Ids, weights: Floats
) -> Floats:
    """Return the weighted sum of the feed-forwards of the experts that `ids` [M, A] choose."""
    rows = x[..., None, :]
    g = vecmat(rows, gate[ids])
    hidden = g / (1 + np.exp(-g)) * vecmat(rows, up[ids])
    y: Floats = (vecmat(hidden, down[ids]) * weights[..., None]).sum(axis=-2)
    return y


def choose(logits: Floats, count: int) -> tuple[Ids, Floats]:
    """Return the `count` most likely experts of each token, and weights that add up to 1."""
    ids = np.argpartition(-logits, count - 1, axis=-1)[..., :count].astype(np.int64)
    chosen = np.take_along_axis(logits, ids, axis=-1)
    weights = np.exp(chosen - chosen.max(axis=-1, keepdims=True))
    return ids, weights / weights.sum(axis=-1, keepdims=True)


def random_experts(rng: np.random.Generator, k: int, n: int) -> ExpertTensor:
    """Return the weights [EXPERTS, k, n] of random experts in Q4_0."""
    scale = np.float32(k**-0.5)
    matrices = (rng.standard_normal((k, n), np.float32) * scale for _ in range(EXPERTS))
    return ExpertTensor.stack([quantize(matrix, "Q4_0") for matrix in matrices])


def main() -> None:
    """Run the feed-forward of some tokens."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=3)
    tokens = parser.parse_args().tokens
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, WIDTH), np.float32)
    gate, up = random_experts(rng, WIDTH, HIDDEN), random_experts(rng, WIDTH, HIDDEN)
    down = random_experts(rng, HIDDEN, WIDTH)
    ids, weights = choose(rng.standard_normal((tokens, EXPERTS), np.float32), CHOSEN)
    y = feed_forward(x, gate, up, down, ids, weights)
    reference = feed_forward.py_func(x, gate, up, down, ids, weights)
    print(feed_forward.explain())
    print(f"largest difference from NumPy: {np.abs(y - reference).max():.1e}")


if __name__ == "__main__":
    main()
