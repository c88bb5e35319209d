"""Messages, shards and ranks: what workers and servers have in common."""
