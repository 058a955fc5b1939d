"""Running a job: paging blocks, replaying activations, solving, committing. Read ``run``, then ``loop``, first."""
