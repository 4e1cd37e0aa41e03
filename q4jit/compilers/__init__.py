"""Compilers: each a function from text to bytes, with a fingerprint. They know no graph."""
