"""Traced functions as text, which programs without the function's source read, and gradients."""
