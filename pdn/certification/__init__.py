"""Compares the kernels with float64 on the device at hand, and says which may run."""
