"""Readers for the ways in which source checkpoints store weights."""
