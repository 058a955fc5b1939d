"""Scales of a Linear's inputs that a module before it takes over: where a block has such places, and how weights are changed there."""
