"""Buffers, order of work on a device, counters, timelines."""
