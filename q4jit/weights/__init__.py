"""Weights: matrices in GGUF blocks, and the byte orders in which kernels read them.

`formats` describes each block format once, with its reference decoder, and `layouts` the orders
into which blocks are repacked. Users hold a `tensor`, made by `quantize` or read by the package
`gguf`; its copies for kernels are in `resident`, what its scales allow in `scales`, and what is
accepted in `checks`. `reference` has random weights and exact products for comparisons.
"""
