"""What reports say of a job's method. Records may come from another version of bigq, which has other methods."""

from __future__ import annotations

from dataclasses import dataclass

from bigq.config import JobConfig
from bigq.methods import known_method


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodText:
    """title: the method's name for people. error_meaning: what a Linear's error is, in sentences. calibrated: see ``Method``."""

    title: str
    error_meaning: str
    calibrated: bool


def method_text(config: JobConfig | None) -> MethodText:
    """What is known of the method of a job; of a method without a class, its name. config: None where the record cannot be read."""
    method = None if config is None else known_method(config)
    if method is None:
        title = "unknown" if config is None else config.method
        return MethodText(title=title, error_meaning="Relative errors (squared norms), as the job recorded them.", calibrated=True)
    return MethodText(title=method.title, error_meaning=method.error_meaning, calibrated=method.calibrated)
