"""Planning: a graph becomes kernels, the same for every target."""
