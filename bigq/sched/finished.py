"""Detects that a job is finished already, before the model is built."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from bigq.config import JobConfig
from bigq.data.spec import absolute
from bigq.io.index import Checkpoint
from bigq.job.finish import complete_commits
from bigq.job.journal import Commit
from bigq.job.manifest import has_gguf
from bigq.sched.resolve import Target


def finished_commits(target: Target) -> list[Commit] | None:
    """The commits of the job in OUT if it is the requested job and is finished and complete; None if there is anything to do.

    As when a job resumes, sizes and modification times of shards and hashes of all other files are compared; ``bigq verify`` reads all
    bytes. Raises CheckpointError if the source cannot be read.
    """
    begun = target.begun
    if begun is None or not _asks_for(begun.get("settings"), target.config):
        return None
    commits = complete_commits(target.out, None if target.push is None else target.push.away)
    if commits is not None and target.push is not None and not target.push.has_all(target.out, commits):
        return None
    if commits is None or (target.config.format == "gguf" and not has_gguf(target.out)):
        return None
    config_hash = hashlib.sha256((target.folder / "config.json").read_bytes()).hexdigest()
    same = (Checkpoint.open(target.folder, target.remote).fingerprint, config_hash) == (begun.get("source"), begun.get("config"))
    return commits if same else None


def _asks_for(settings: Any, config: JobConfig) -> bool:
    """Whether the requested settings are those of a finished job; settings that are not given count as equal."""
    if not isinstance(settings, Mapping):
        return False
    asked = config.frozen()
    asked["calibration"] = absolute(asked["calibration"])
    begun_scheme, asked_scheme = settings.get("scheme"), asked.pop("scheme")
    if not isinstance(begun_scheme, Mapping):
        return False
    pairs = [(begun_scheme.get(name), value) for name, value in asked_scheme.items()]
    pairs += [(settings.get(name), value) for name, value in asked.items() if name not in ("rules", "on_nonfinite", "push", "push_drop")]
    rules = [[rule.pattern, rule.overrides and dict(rule.overrides)] for rule in config.rules]
    begun_rules = [[rule.get("pattern"), rule.get("overrides")] for rule in settings.get("rules", ())]
    return rules == begun_rules and all(value is None or was == value for was, value in pairs)
