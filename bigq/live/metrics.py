"""The jobs that are watched as metrics in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bigq.batch import overview
from bigq.inspect import status
from bigq.live.watched import WatchedJob
from bigq.progress.terminal import one_line

STATES = tuple(dict.fromkeys((*status.STATES, *overview.STATES)))

#: Each gauge: its name, what it means, and its value; None where it is unknown, which leaves the line out.
_GAUGES: tuple[tuple[str, str, Callable[[WatchedJob], float | None]], ...] = (
    ("blocks", "decoder blocks of the model", lambda job: None if job.found is None else job.found.blocks),
    ("blocks_done", "blocks whose shards are committed", lambda job: None if job.found is None else job.found.blocks_done),
    ("shards", "committed shards", lambda job: None if job.found is None else job.found.shards),
    ("written_bytes", "bytes of the committed shards", lambda job: None if job.found is None else job.found.bytes_written),
    ("left_seconds", "estimated time left", lambda job: None if job.found is None else job.found.eta_seconds),
    ("heartbeat_age_seconds", "time since the last heartbeat", lambda job: _age(job)),
    ("blocks_per_hour", "speed of the last blocks", lambda job: job.blocks_per_hour),
    ("written_bytes_per_second", "speed of the last shards", lambda job: job.bytes_per_second),
    ("linears", "quantized Linears", lambda job: job.linears),
    ("relative_error_max", "largest relative output error of a Linear", lambda job: job.largest[0].error if job.largest else None),
    ("warnings", "warnings of the last run", lambda job: None if job.found is None else len(job.found.warnings)),
    ("damaged_records", "damaged records and shards", lambda job: None if job.found is None else len(job.found.damaged)),
)


def metrics(jobs: Sequence[WatchedJob]) -> str:
    """All gauges of all jobs, each job by its folder."""
    lines = ["# HELP bigq_job_state 1 for the state that the job is in", "# TYPE bigq_job_state gauge"]
    for job in jobs:
        lines += [f'bigq_job_state{{out="{_label(job.out)}",state="{state}"}} {int(state == job.state)}' for state in STATES]
    for name, meaning, value in _GAUGES:
        known = [(job, found) for job in jobs if (found := value(job)) is not None]
        if known:
            lines += [f"# HELP bigq_{name} {meaning}", f"# TYPE bigq_{name} gauge"]
            lines += [f'bigq_{name}{{out="{_label(job.out)}"}} {found:.10g}' for job, found in known]
    return "\n".join(lines) + "\n"


def _age(job: WatchedJob) -> float | None:
    return None if job.found is None or job.found.holder is None else job.found.holder.heartbeat_age


def _label(value: str) -> str:
    return one_line(value).replace("\\", "\\\\").replace('"', '\\"')
