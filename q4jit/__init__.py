"""q4jit: a NumPy function around a quantised matrix product becomes one fused kernel."""
