"""GGUF files of tiny random models, of every architecture that q4jit loads through transformers."""
