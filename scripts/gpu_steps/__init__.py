"""The steps of ``scripts/gpu_session``: one module a step, each with ``run(setting, found)``."""
