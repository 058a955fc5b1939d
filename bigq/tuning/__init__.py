"""Tuning what is quantized by gradients; nowhere else but in the checks of a model is anything differentiated."""
