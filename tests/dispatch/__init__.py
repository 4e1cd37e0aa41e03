"""Between a call and its kernels."""
