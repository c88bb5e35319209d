"""Leaf compute: CPU tensors in, CPU tensors out. Enter through `sparsecomm.kernels.dispatch`."""
