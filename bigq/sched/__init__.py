"""Running a job: paging blocks, replaying activations, solving, committing. Read ``pipeline`` first."""
