"""The units of a job: each becomes one committed shard. The loop (``bigq.sched.loop``) knows a model only as units."""
