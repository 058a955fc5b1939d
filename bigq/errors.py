"""Errors that bigq raises on purpose, with the exit code of each.

    BigqError
    ├── UsageError               2   an option, a combination of options, or a folder used in the wrong way
    ├── DataError                3   the model or the text that was given cannot be used
    │   ├── CheckpointError          a shard, index, tensor or config that is missing, damaged or inconsistent
    │   ├── UnsupportedModelError    a sound checkpoint of a kind that bigq does not handle
    │   ├── CalibrationError         calibration or evaluation text that is missing, unreadable or too short
    │   └── NumericsError            NaN or Inf in weights, activations or a Hessian; a factorization that fails
    ├── ResourceError            4   memory, disk, device, network, or a package that is missing
    │   └── BusyError           5    another job is writing to the folder
    ├── Stopped                 75   stopped by a signal; the same command resumes the job
    └── RankLostError           75   another process of the same job is gone, or ended with another code, which is this one's then

Exit codes of every command:

    0    done
    2    usage: an option, or a folder that is not what the command needs (OUT holds no job, OUT is not empty)
    3    data: a model or a text is missing, damaged or not supported; bigq verify found problems
    4    environment: memory, disk, device, network, a missing package, runs that are too short to finish anything; bigq plan: does not fit
    5    another job is writing to the folder
    75   stopped by a signal, or a process of the job is gone; run the same command again (--exit-code-on-stop gives another code)
    130  interrupted
    141  the output's reader has closed the pipe

Every message names the file, tensor or option concerned and says what to do about it.
"""

from __future__ import annotations

#: What to do after a job was stopped, and after a command that cannot be resumed.
RESUME, REPEAT = "run the same command again to resume", "run the same command again"


class BigqError(Exception):
    """Base class. exit_code: of the command line."""

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


class BusyError(ResourceError):
    exit_code = 5


class Stopped(BigqError):
    """exit_code: 75, unless the command line says otherwise."""

    exit_code = 75

    def __init__(self, message: str, exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RankLostError(BigqError):
    """Another process of the job is gone. exit_code: the one that it ended with, if it said so."""

    exit_code = 75

    def __init__(self, message: str, exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code
