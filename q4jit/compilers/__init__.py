"""Compilers turn text into bytes. Each has a fingerprint; none of them knows about graphs."""
