"""Kernels for GPUs, in Triton. No other package imports Triton."""
