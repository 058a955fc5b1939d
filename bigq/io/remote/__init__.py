"""Shards that stay on a server: a job reads the bytes that it needs, ahead of the computation, through a bounded cache on disk."""
