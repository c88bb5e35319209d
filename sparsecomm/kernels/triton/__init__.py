"""Kernels for GPUs, in Triton. Only this package imports it."""
