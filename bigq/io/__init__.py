"""Files: reading checkpoints, writing shards atomically, and checkpoint formats."""
