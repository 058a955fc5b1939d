"""What a job did, as an HTML report with charts or as a model card."""
