"""Results of ``bigq eval`` on a finished or converted folder, in OUT/.bigq/evaluations.jsonl, one line with a checksum each.

Each result contains a hash of the evaluated shards, ``weights``. Nothing else depends on these records.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigq.errors import ResourceError
from bigq.inspect.bounds import MAX_NUMBER, count, number, text
from bigq.io.atomic import remedy, write_bytes
from bigq.io.checksum import seal, unseal, valid_lines
from bigq.io.folders import STATE_FOLDER
from bigq.job.conversion_record import is_conversion
from bigq.job.journal import Commit, read_commits, read_job
from bigq.version import __version__

EVALUATIONS_NAME = "evaluations.jsonl"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """A result of ``bigq eval``: perplexities, KL divergence in nats per token.

    perplexity: infinite where it is beyond ``MAX_NUMBER``, as that of a ruined model is. baseline: as it was given; baseline_folder:
    where that lay, None where it was not a folder or that is unknown. of_source: whether the baseline is the model that was quantized,
    by the records.
    """

    at: str
    data: str
    samples: int
    seqlen: int
    dtype: str
    tokens: int
    perplexity: float
    baseline: str | None
    baseline_folder: str | None
    of_source: bool
    baseline_perplexity: float | None
    kl: float | None
    kl_stderr: float | None
    top1_agreement: float | None

    @property
    def settings(self) -> tuple[str, int, int, str]:
        """The settings of the evaluation: results with equal settings can be compared."""
        return self.data, self.samples, self.seqlen, self.dtype

    @property
    def baseline_name(self) -> str:
        """For people: "source model"; or the hub id, or the last part of the path. Empty without a baseline."""
        if self.of_source:
            return "source model"
        named = (self.baseline_folder or self.baseline or "").rstrip("/")
        return named if self.baseline_folder is None and _HUB_ID.fullmatch(named) else named.rpartition("/")[2]


def parse_result(value: Mapping[str, Any], sources: Iterable[str]) -> EvaluationResult | None:
    """A line of the record; None where it is not a result. sources: names of the job's source, and folders where it lay."""
    perplexity: Any = value.get("perplexity")
    counts = [count(value.get(name)) for name in ("samples", "seqlen", "tokens")]
    if type(perplexity) not in (int, float) or perplexity < 0 or None in counts:
        return None
    samples, seqlen, tokens = (known or 0 for known in counts)
    baseline, folder = (text(value[name]) if value.get(name) else None for name in ("baseline", "baseline_folder"))
    names = {os.path.normpath(name) for name in (folder, None if folder else baseline) if name}
    return EvaluationResult(
        at=text(value.get("at") or ""),
        data=text(value.get("data") or "unknown"),
        samples=samples,
        seqlen=seqlen,
        dtype=text(value.get("dtype") or "auto"),
        tokens=tokens,
        perplexity=math.inf if perplexity > MAX_NUMBER else float(perplexity),
        baseline=baseline,
        baseline_folder=folder,
        of_source=not names.isdisjoint(map(os.path.normpath, sources)),
        **{name: number(value.get(name)) for name in ("baseline_perplexity", "kl", "kl_stderr", "top1_agreement")},
    )


def current_results(evaluations: Sequence[EvaluationResult]) -> list[EvaluationResult]:
    """The current results, the oldest first.

    For equal settings and baseline the last result counts. A result without a baseline is dropped if there is one with a baseline.
    """
    last: dict[tuple[Any, ...], EvaluationResult] = {}
    for each in evaluations:
        key = (each.settings, each.baseline and each.baseline_name)
        last.pop(key, None)  # so that it moves to the end
        last[key] = each
    compared = {each.settings for each in last.values() if each.baseline is not None}
    return [each for each in last.values() if each.baseline is not None or each.settings not in compared]


def holds_output(folder: Path) -> bool:
    """Whether a folder is the complete output of a job or a conversion. Raises CheckpointError where its record is damaged."""
    if not ((folder / "config.json").is_file() and (folder / STATE_FOLDER).is_dir()):
        return False
    return is_conversion(folder) or read_job(folder) is not None


def weights_of(commits: Iterable[Commit]) -> str:
    """A hash of the shards: it differs when any of them changes."""
    lines = sorted(f"{commit.shard.file} {commit.shard.sha256}\n" for commit in commits)
    return hashlib.sha256("".join(lines).encode(errors="backslashreplace")).hexdigest()[:32]


def record_evaluation(out: Path, evaluation: Mapping[str, Any]) -> None:
    """Add a result to the record of the folder ``out``. Raises ResourceError; then the record is unchanged.

    Where the baseline is a folder, its absolute path is recorded too: the path that was given may be relative.
    """
    path = out / STATE_FOLDER / EVALUATIONS_NAME
    baseline = os.path.expanduser(str(evaluation.get("baseline") or ""))
    folder = {"baseline_folder": os.path.realpath(baseline)} if baseline and os.path.isdir(baseline) else {}
    weights = weights_of(read_commits(out)[0])
    at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    line = seal({"at": at, "bigq": __version__, "weights": weights, **evaluation, **folder}, line=True)
    with _locked(out / STATE_FOLDER):
        write_bytes(path, b"".join([*valid_lines(path), line]))


def read_evaluations(out: Path) -> tuple[list[dict[str, Any]], int]:
    """(the recorded results, the oldest first; the number of results for weights that have changed since).

    Raises ResourceError, CheckpointError where the record is absurdly large.
    """
    weights = weights_of(read_commits(out)[0])
    found = [unseal(line, line=True) for line in valid_lines(out / STATE_FOLDER / EVALUATIONS_NAME)]
    known = [value for value in found if value is not None]
    current = [value for value in known if value.get("weights") == weights]
    return current, len(known) - len(current)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other evaluations from writing meanwhile, where the file system has locks."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ResourceError(f"{folder}: cannot be opened: {error.strerror}; {remedy(error)}") from error
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
