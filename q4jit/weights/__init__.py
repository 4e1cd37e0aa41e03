"""Weights: block formats, layouts for kernels, `QuantizedTensor`, GGUF files."""
