"""The front end: a function is traced into a graph."""
