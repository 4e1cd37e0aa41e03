"""Planning: cut a graph into kernels, in the same way for every target."""
