"""The kernels, one module each: functions of tensors that know nothing else of bigq. Triton versions are in ``gpu/``."""
