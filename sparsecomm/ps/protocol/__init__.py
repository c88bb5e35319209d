"""Definitions that workers and servers share: messages, payloads, shards, ranks, and the layout of servers' windows."""
