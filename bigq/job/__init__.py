"""What a job's folder promises: the request, the journal, one owner, and the files that make it loadable."""
