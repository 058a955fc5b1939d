"""Conversion of a packed checkpoint to another format."""
