"""Encoders: float blocks in, ggml's bytes out; `q4jit.weights.encode` has the table of them.

An encoder takes blocks [n, elements] in f32 (F16: f16) and returns their bytes, uint8 [n, bytes].
`exact` has the formats whose bytes are those of the gguf package. `iq4_nl` and `k_quants` look for
the scales with the least squared error, with the helpers of `search`.
"""
