"""A server: holds shards and runs their optimizers."""
