"""Runtimes load compiled code and launch it: one module per driver."""
