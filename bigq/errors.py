"""Errors that bigq raises on purpose, with the exit code each maps to.

    BigqError
    ├── UsageError               2   a flag, a combination of flags, or a folder used in the wrong way
    ├── DataError                3   what was given cannot be quantized
    │   ├── CheckpointError          a shard, index, tensor or config that is missing, damaged or inconsistent
    │   ├── UnsupportedModelError    a sound checkpoint of a kind that bigq does not handle
    │   ├── CalibrationError         calibration or evaluation text that is missing, unreadable or too short
    │   └── NumericsError            NaN or Inf in weights, activations or a Hessian; a factorization that fails
    ├── ResourceError            4   memory, disk, device or network
    └── Stopped                 75   asked to stop by a signal; the same command goes on

Every message names the file, tensor or flag concerned and says what to do about it.
"""

from __future__ import annotations


class BigqError(Exception):
    """Base class; ``exit_code`` is what the command line exits with."""

    exit_code = 1


class UsageError(BigqError):
    exit_code = 2


class DataError(BigqError):
    exit_code = 3


class CheckpointError(DataError):
    pass


class UnsupportedModelError(DataError):
    pass


class CalibrationError(DataError):
    pass


class NumericsError(DataError):
    pass


class ResourceError(BigqError):
    exit_code = 4


class Stopped(BigqError):
    exit_code = 75
