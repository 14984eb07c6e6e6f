"""Compare the generated kernels with float64, then time them beside what a user would call instead."""
