"""A CUDA device for tests on machines without one. It runs in a process of its own, since installing it changes torch everywhere.

Tensors say that they are on ``cuda:0``; their bytes are the host's, and the CPU computes. What is simulated is the order of work:

- Work on the current (default) stream is done at once. A copy on another stream is done as late as CUDA allows: when the host waits
  for it, or when work that is ordered after it needs the bytes. Until then its target is filled with NaN or 0xA5.
- Every stream and every thread of the host has a vector clock, which events carry from one to the other. Work on memory that another
  stream uses, without an event in between, is a problem, whether or not the bytes are right by chance.
- Memory that is freed while a side stream uses it is a problem, unless ``record_stream`` was called.
- Pinned memory must stay as it is until the host has waited for its copy.
- CPU tensors among CUDA tensors, or given to a kernel, raise. Unpinned asynchronous copies and compute on side streams are problems.

``findings`` collects problems and counts where the host waits. ``streams`` has streams and events, ``memory`` what happens to a piece of
memory, ``copies`` the late copies, ``tensors`` the tensor, ``install`` replaces parts of torch and of bigq's kernels, ``run_jobs`` runs
jobs (``python -m fake_cuda.run_jobs``), and ``planted`` holds faults that must be found.
"""
