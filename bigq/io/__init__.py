"""Files: reading shards and rows of them, writing shards whole or not at all, and the formats inside."""
