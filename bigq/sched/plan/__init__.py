"""The plan of a job: memory, disk and time, from config and shard headers alone."""
