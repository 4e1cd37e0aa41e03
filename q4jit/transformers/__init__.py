"""Run GGUF files packed through transformers: `from_gguf` and `install`."""
