"""Leaf compute: tensors in, tensors out. Enter through `sparsecomm.kernels.dispatch`."""
