"""Calibration and evaluation data: what is given as text, as records or as token ids, and rows of token ids made from it."""
