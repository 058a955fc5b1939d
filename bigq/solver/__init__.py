"""The math of quantizing one Linear: pure functions of tensors."""
