"""The server's side: shards and their optimizers, answers to workers, copies for other servers, checkpoints."""
