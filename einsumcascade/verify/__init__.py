"""Generated kernels, forward and backward, compared with the float64 reference."""
