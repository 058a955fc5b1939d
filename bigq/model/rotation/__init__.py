"""Rotating a model without changing what it computes (``--rotate``): which of its weights take part, the proof, and the rotated weights."""
