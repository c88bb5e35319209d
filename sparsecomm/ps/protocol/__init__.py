"""What workers and servers share: messages, payloads, shards, ranks, and the layout of a server's window."""
