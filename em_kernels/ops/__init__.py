"""Private: everything between the public functions and the kernels."""
