"""The Triton versions of the kernels. Each module is named like the one with its reference in ``bigq.kernels``."""
