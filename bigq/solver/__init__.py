"""The math of quantizing one Linear, as functions of tensors."""
