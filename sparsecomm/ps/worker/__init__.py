"""A worker: pushes gradients, pulls parameters."""
