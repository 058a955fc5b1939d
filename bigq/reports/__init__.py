"""What a job did, shown to people: an HTML page with its charts, and a model card."""
