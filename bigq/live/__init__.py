"""What jobs that run are doing, for whoever looks on: a page, metrics. Read only."""
