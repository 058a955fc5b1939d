"""Solving what a unit holds: a block level by level, the output head, and the replay of a solved block."""
