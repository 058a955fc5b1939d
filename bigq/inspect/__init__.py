"""Looking at a job's folder: its status, its history, and whether it is sound."""
