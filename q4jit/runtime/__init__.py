"""Runtimes: one module per driver that loads compiled objects and launches them."""
