"""Weights: matrices in GGUF blocks, and the layouts that kernels read.

`formats` describes each block format, with a reference decoder; `layouts` repacks blocks for
kernels, and `unpack` restores them; `encode` makes blocks from floats, with an encoder per format
in `encoders`. Users hold a `QuantizedTensor` (`tensor`), made by `quantize` or read by the package
`gguf`, or an `ExpertTensor` (`experts`), a sequence of them. Their blocks are in `stored`, their
repacked copies in `resident`, facts about scales in `scales`, and the checks of what users pass in
`checks`. `reference` makes random weights and exact products.
"""
