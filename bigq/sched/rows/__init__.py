"""Calibration rows on their way through the blocks: where they are kept, and what is kept of them."""
