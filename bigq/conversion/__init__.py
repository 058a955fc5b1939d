"""A finished folder in another format."""
