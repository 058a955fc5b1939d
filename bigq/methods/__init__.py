"""The quantization methods: one file each, which implements ``bigq.methods.base``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.methods.awq import Awq
from bigq.methods.base import Method
from bigq.methods.gptaq import Gptaq
from bigq.methods.gptq import Gptq
from bigq.methods.rtn import Rtn
from bigq.methods.scaling import SCALINGS
from bigq.vocabulary import MethodName

#: For each value of ``--method``, the method made from a job's settings.
METHODS: Mapping[MethodName, Callable[[JobConfig], Method]] = {
    "gptq": lambda config: Gptq(SCALINGS[config.fold or "none"]),
    "gptaq": lambda config: Gptaq(config.alpha, SCALINGS[config.fold or "none"]),
    "awq": lambda config: Awq(SCALINGS[config.fold or "awq"]),
    "rtn": lambda config: Rtn(),
}

#: Methods that can fold scales of inputs.
FOLDING: tuple[MethodName, ...] = ("gptq", "gptaq", "awq")


def method_of(config: JobConfig) -> Method:
    """The method that a job asks for. Raises UsageError where it cannot fold scales, and is to."""
    if config.fold not in (None, "none") and config.method not in FOLDING:
        raise UsageError(f"--fold {config.fold}: no effect with --method {config.method}")
    return METHODS[config.method](config)


def known_method(config: JobConfig) -> Method | None:
    """The method of a job's record; None where this version of bigq does not have it."""
    return method_of(config) if config.method in METHODS else None
