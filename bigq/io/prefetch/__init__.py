"""Prefetch: reading tensors before they are needed, into host memory or onto a GPU."""
