"""From a program and its schedule to kernel IR, Triton text and a PyTorch op."""
