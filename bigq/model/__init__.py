"""The parts of a transformers model: the skeleton on the meta device, its blocks, their structure, and their weights."""
