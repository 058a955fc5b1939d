"""The progress of a job and its times: recorded and shown."""
