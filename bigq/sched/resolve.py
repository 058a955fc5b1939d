"""Resolves the request of ``quantize``: first the folders and the settings, then the model, its rows and its units."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigq.calibration import Made, Rows, read_calibration, require_vocabulary
from bigq.config import JobConfig
from bigq.conversion.gguf import check_gguf_job
from bigq.data.opening import require_texts
from bigq.errors import UsageError
from bigq.io.file_stamps import Stamps
from bigq.io.folders import STATE_FOLDER, refuse_nesting
from bigq.io.hub import resolve_model, resolve_streamed
from bigq.io.remote.shards import RemoteShards
from bigq.job.adapt import Adapted
from bigq.job.journal import read_job, require_job_folder
from bigq.job.owner import refuse_if_held
from bigq.job.pushed import refuse_source
from bigq.job.request import compare, make_request, require_same_code
from bigq.job.settle import check_shapes, for_ranks, require_format, require_shareable, row_length, settled
from bigq.job.stop import Stop
from bigq.machine.device import choose_device
from bigq.machine.ranks import Ranks
from bigq.methods import method_of
from bigq.methods.base import Method
from bigq.mixed.record import read_bits
from bigq.mixed.settings import with_chosen, without_chosen
from bigq.model.forward.fused_attention import fuse_attention
from bigq.model.pager import Pager
from bigq.progress.records import Stages
from bigq.sched.plan.budgets import Streamed
from bigq.sched.plan.inputs import plan_before_fetch
from bigq.sched.plan.work import Choice
from bigq.sched.push import Push, open_push
from bigq.sched.together import require_same_count
from bigq.sched.units.base import Unit
from bigq.sched.units.block import BlockUnit
from bigq.sched.units.copied import copied_units
from bigq.sched.units.head import Head, HeadUnit, head_to_quantize


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a job reads and writes. begun: the frozen request of the job that OUT holds, or None.

    model: as given. remote: the shards that stay on a server; None if they are in ``folder``. push: where the output is uploaded to.
    config: as given, with missing settings taken from ``begun``.
    """

    model: str
    folder: Path
    remote: RemoteShards | None
    out: Path
    config: JobConfig
    begun: Mapping[str, Any] | None
    device: torch.device
    push: Push | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job whose settings are all decided. rows: calibration tokens [N, T]; None for methods without calibration. head: None if the
    output head stays unquantized. made: what was made of the calibration text.

    adapted: what was changed for Linears of odd widths. stamps: detect source files that change. ranks: the processes that share the job.
    """

    target: Target
    pager: Pager
    config: JobConfig
    adapted: Adapted
    method: Method
    head: Head | None
    rows: Tensor | None
    made: tuple[Made, ...]
    stamps: Stamps
    ranks: Ranks

    @property
    def own_rows(self) -> Tensor | None:
        """This rank's share of the rows."""
        if self.rows is None:
            return None
        span = self.ranks.rows(len(self.rows))
        return self.rows[span.start : span.stop]

    def with_choice(self, choice: Choice) -> Job:
        """The same job with what the plan chose of the settings that a resumed job keeps."""
        config = dataclasses.replace(self.config, batch=choice.batch, experts_at_once=choice.experts_at_once)
        return dataclasses.replace(self, config=config)


def resolve_target(model: str, out: str | Path, config: JobConfig | None, ranks: Ranks) -> Target:
    """Find the model's folder and look at OUT. A model on the hub is planned from its headers before it is fetched.

    config: defaults to that of the job in OUT, or to ``JobConfig()`` if there is none.
    Raises UsageError, CheckpointError, ResourceError.
    """
    out = Path(os.path.expanduser(out))
    begun = read_job(out)
    before = None if begun is None else JobConfig.from_frozen(begun.get("settings"), f"{out}: its job.json")
    config = config or before or JobConfig()
    if before is not None:
        config = dataclasses.replace(
            config,
            batch=config.batch or before.batch,
            experts_at_once=config.experts_at_once or before.experts_at_once,
            format=config.format or before.format,
        )
    require_format(config)
    refuse_source(config.push, model)
    device = choose_device(config.device, ranks.local)
    refuse_if_held(out / STATE_FOLDER)
    if begun is None and method_of(config).calibrated:  # before anything is fetched
        require_texts(config.calibration)
    headers, planned = plan_before_fetch(model, out, config, ranks)
    remote = headers.remote if planned is not None and isinstance(planned.fetch, Streamed) else None
    push = open_push(config, out)  # before anything is fetched or computed
    folder = resolve_model(model) if remote is None else resolve_streamed(model, headers)
    refuse_nesting(folder, out)
    if config.trace is not None and not Path(config.trace).parent.is_dir():
        raise UsageError(f"--trace {config.trace}: its folder does not exist; make it first")
    require_job_folder(out)
    if begun is not None and config.trust_remote_code:
        require_same_code(out, begun, folder)  # before any code of the model runs
    return Target(model=model, folder=folder, remote=remote, out=out, config=config, begun=begun, device=device, push=push)


def resolve_job(target: Target, stop: Stop, stages: Stages, ranks: Ranks) -> Job:
    """Open the model, decide the settings that depend on it, and read the calibration rows.

    stages: the stages "start-up" and "calibration" end here. Raises Stopped, UsageError, DataError.
    """
    config = target.config
    pager = Pager(
        target.folder,
        device=target.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        decode=True,
        remote=target.remote,
        rotate=config.rotate,
        fold=method_of(config).scaling is not None,
    )
    if config.attention == "fused":
        fuse_attention(pager.model)
    stamps = Stamps({target.folder / "config.json", *pager.checkpoint.files})
    config = settled(pager, dataclasses.replace(config, seqlen=row_length(pager.config, config)))
    adapted = check_shapes(pager, without_chosen(config))
    if config.bits_per_weight is not None and (chosen := read_bits(target.out)) is not None:
        adapted = dataclasses.replace(adapted, config=with_chosen(adapted.config, chosen.rules))
    adapted = dataclasses.replace(adapted, config=for_ranks(adapted.config, ranks.count, target.device.type))
    config = adapted.config
    head = head_to_quantize(pager, config)
    if config.format == "gguf":
        check_gguf_job(pager, config)
    stop.check()
    method = method_of(config)
    stages.ended("start-up")
    read = _rows(pager, config) if method.calibrated else None
    stages.ended("calibration")
    stop.check()
    rows, made = (None, ()) if read is None else (read.rows, read.made)
    job = Job(
        target=target,
        pager=pager,
        config=config,
        adapted=adapted,
        method=method,
        head=head,
        rows=rows,
        made=made,
        stamps=stamps,
        ranks=ranks,
    )
    if ranks.count > 1:
        count = 0 if rows is None else len(rows)
        require_shareable(config, method, remote=pager.remote is not None, rows=count, ranks=ranks.count)
    return job


def _rows(pager: Pager, config: JobConfig) -> Rows:
    """The calibration rows of a job whose row length is known. Raises CalibrationError."""
    assert config.seqlen is not None
    found = read_calibration(
        config.calibration,
        pager.folder,
        samples=config.samples,
        seqlen=config.seqlen,
        seed=config.seed,
        text_field=config.text_field,
        trust_remote_code=config.trust_remote_code,
    )
    require_vocabulary(found.rows, pager.embedding.num_embeddings)
    return found


def units_of(job: Job) -> list[Unit]:
    """The units of a job in the order of their shards: copied tensors, blocks, and the head if it is quantized."""
    pager, head = job.pager, job.head
    copied = copied_units(pager, [] if head is None else [head.source.name])
    units: list[Unit] = list(copied)
    number = len(copied)
    for i in range(len(pager.blocks)):
        units.append(BlockUnit(number, i, pager, job.config))
        number += len(units[-1].shards)
    return units if head is None else [*units, HeadUnit(number, head)]


def request_of(job: Job) -> dict[str, Any]:
    """The request that OUT keeps. Raises UsageError if the job in OUT has another request; then nothing in OUT changes."""
    target = job.target
    request = make_request(job.config, target.folder, job.pager.checkpoint.fingerprint, job.rows, target.device)
    request["machine"]["ranks"] = job.ranks.count
    if target.begun is not None:
        require_same_count(target.out, target.begun, job.ranks, allowed=job.config.allow_ranks)
        compare(target.out, target.begun, request)
    return request
