"""A job that is run again although it is finished: noticed before the model is built."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from bigq.config import JobConfig
from bigq.io.index import Checkpoint
from bigq.job.finish import complete_commits
from bigq.job.journal import Commit
from bigq.job.manifest import has_gguf
from bigq.job.request import NAMED_TEXTS
from bigq.sched.resolve import Target


def finished_commits(target: Target) -> list[Commit] | None:
    """The commits of the job in OUT, if it is finished, complete, and the job that is asked for; None where there is anything to do.

    Size and time of shards and hashes of all other files are compared, as when a job resumes; ``bigq verify`` reads everything.
    Raises CheckpointError where the source cannot be read.
    """
    begun = target.begun
    if begun is None or not _asks_for(begun.get("settings"), target.config):
        return None
    commits = complete_commits(target.out)
    if commits is None or (target.config.format == "gguf" and not has_gguf(target.out)):
        return None
    config_hash = hashlib.sha256((target.folder / "config.json").read_bytes()).hexdigest()
    same = (Checkpoint.open(target.folder).fingerprint, config_hash) == (begun.get("source"), begun.get("config"))
    return commits if same else None


def _asks_for(settings: Any, config: JobConfig) -> bool:
    """Whether the settings of a finished job are those asked for; what is left open is as the job settled it."""
    if not isinstance(settings, Mapping):
        return False
    asked = config.frozen()
    if asked["calibration"] not in NAMED_TEXTS:
        asked["calibration"] = os.path.abspath(os.path.expanduser(asked["calibration"]))
    begun_scheme, asked_scheme = settings.get("scheme"), asked.pop("scheme")
    if not isinstance(begun_scheme, Mapping):
        return False
    pairs = [(begun_scheme.get(name), value) for name, value in asked_scheme.items()]
    pairs += [(settings.get(name), value) for name, value in asked.items() if name not in ("rules", "on_nonfinite")]
    rules = [[rule.pattern, rule.overrides and dict(rule.overrides)] for rule in config.rules]
    begun_rules = [[rule.get("pattern"), rule.get("overrides")] for rule in settings.get("rules", ())]
    return rules == begun_rules and all(value is None or was == value for was, value in pairs)
