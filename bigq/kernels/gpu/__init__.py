"""The Triton versions of the kernels: one module per kernel, named as its reference in ``bigq.kernels``."""
