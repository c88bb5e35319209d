"""Commands, benches, and the lab of several hosts on one machine."""
