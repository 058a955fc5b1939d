"""A transformers model taken apart: the skeleton on the meta device, its blocks, their structure, and their weights."""
