"""Reading tensors ahead of the computation, into host memory or onto a GPU."""
