"""Reused buffers, the order of work on a device, metrics and timelines."""
