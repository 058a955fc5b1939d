"""The units of a job: each becomes one committed shard. The loop (``bigq.sched.loop``) knows nothing else of a model."""
