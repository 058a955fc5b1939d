"""Kernels that numba compiles for the processor, for fp32 tensors on a CPU. Imported at their first use, as numba takes 0.4 s."""
