"""Private: the layer between the public functions and the kernels."""
