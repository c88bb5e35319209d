"""The commands, the benches, and the lab, which makes several hosts on one machine."""
