"""The job: a list of blocks, each a transaction.

    load block i → find its Hessians and solve it, level by level → replay it quantized → commit its shard → evict

Weights of one block are in memory at a time. What lies outside the blocks is copied from shard to shard first, so that
a damaged embedding or a full disk is found before hours of work. config.json comes last: a folder that loads is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bigq
from bigq import skeleton
from bigq.arch import block_linears
from bigq.calibration import calibration_rows, require_vocabulary
from bigq.clock import Clock
from bigq.config import DEFAULT_SEQLEN, JobConfig
from bigq.errors import UnsupportedModelError, UsageError
from bigq.io.atomic import copy_file, write_bytes, write_json
from bigq.io.gptq_format import pack_linear, quantization_config, read_linear, require_packable
from bigq.io.hub import resolve_model
from bigq.io.index import INDEX_NAME, TensorInfo, read_header, read_json_object
from bigq.io.reader import read_tensor
from bigq.io.writer import OutputTensor, write_shard
from bigq.kernels.dequantize import dequantize_packed
from bigq.report import LinearRecord, Progress, Report, device_memory_peak, host_memory_peak
from bigq.sched.activations import ActivationStore
from bigq.sched.batches import Batches, Halving, told
from bigq.sched.behind import WriteBehind
from bigq.sched.block import BlockJob, Memo, Solved, propagate, round_block, solve_block
from bigq.sched.device import choose_device, memory_errors
from bigq.sched.journal import STATE_FOLDER, Commit, Journal, require_ours
from bigq.sched.memory import hold_heap, return_freed_memory
from bigq.sched.pager import Pager
from bigq.sched.probe import Probe, activations_for, probe_model
from bigq.sched.structure import SMALLEST, BlockPlan, plan_block
from bigq.sched.tiers import Tier, choose_tier
from bigq.scheme import QuantScheme, scheme_for
from bigq.skeleton import linear_weight
from bigq.trace import Trace

#: Tensors outside the blocks are gathered into shards of at most this size (a larger tensor has one of its own).
REST_SHARD_BYTES = 5 * 10**9


def quantize(model: str, out: str | Path, config: JobConfig | None = None) -> Report:
    """Quantize a model folder or hub id into the folder ``out``; goes on where an interrupted run of the same job ended.

    Raises UsageError, DataError or ResourceError (see ``bigq.errors``); then ``out`` holds no config.json.
    """
    config = config or JobConfig()
    started = time.monotonic()
    device = choose_device(config.device)
    folder, out = resolve_model(model), Path(out).expanduser()
    _refuse_nesting(folder, out)
    if config.trace is not None and not Path(config.trace).parent.is_dir():
        raise UsageError(f"--trace {config.trace}: its folder does not exist; make it first")
    require_ours(out)
    hold_heap()
    skeleton.silence()
    with torch.no_grad(), memory_errors(device):
        pager = Pager(folder, device=device, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
        if pager.packed:
            raise UnsupportedModelError(f"{folder}: is already quantized; give the original model")
        config = config.resolved(device_type=device.type, seqlen=_seqlen(pager, config))
        rows = _calibration(pager, config)
        request = {
            "settings": config.frozen(),
            "source": pager.checkpoint.fingerprint,
            "config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
            "calibration_tokens": None if rows is None else hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
        }
        rest = _rest_shards(pager)
        units = [f"rest-{i}" for i in range(len(rest))] + [f"block-{i}" for i in range(len(pager.blocks))]
        with contextlib.closing(Journal(out, request, units)) as journal, Progress(len(pager.blocks), device, config.quiet) as progress:
            trace = Trace(keep=config.trace is not None)
            clock = Clock(device, trace)
            try:
                ahead = config.blocks_ahead(device.type)
                with contextlib.closing(WriteBehind(beside=ahead > 0)) as behind, pager.reading_ahead(ahead, trace):
                    job = _Job(pager, config, journal, units, rest, progress, clock, behind)
                    job.run(rows)
            finally:
                if config.trace is not None:
                    with contextlib.suppress(RuntimeError):  # a device that failed has no more to tell
                        clock.settle()
                    write_bytes(Path(config.trace), trace.to_json())
            job.finish()
    resumed = job.resumed
    return Report(
        out=str(out),
        blocks=len(pager.blocks),
        linears=tuple(record for commit in journal.commits for record in commit.linears),
        seconds=time.monotonic() - started,
        seconds_by_phase=clock.seconds,
        source_bytes=sum(t.nbytes for t in pager.checkpoint.tensors.values()),
        output_bytes=sum(commit.shard.size for commit in journal.commits),
        host_peak_bytes=host_memory_peak(),
        device_peak_bytes=device_memory_peak(device),
        resumed_blocks=resumed,
        left_out=tuple(name for commit in journal.commits for name in commit.left_out),
        waiting=clock.waiting(),
        batches=() if rows is None else Batches(config.batch or 1, journal.halvings).used,
    )


@dataclass(slots=True)
class _Job:
    """One run of a job: what its steps share."""

    pager: Pager
    config: JobConfig
    journal: Journal
    units: list[str]
    rest: list[list[TensorInfo]]
    progress: Progress
    clock: Clock
    behind: WriteBehind
    resumed: int = 0

    def run(self, rows: Tensor | None) -> None:
        """Commit every shard that is not committed yet."""
        self._check_shapes()
        self._check_committed()
        done = len(self.journal.commits)
        for i in range(done, len(self.rest)):
            self.progress.phase("copying what stays as it is")
            with self.clock.phase("copy"):
                self._commit(i, [OutputTensor.copy_of(info) for info in self.rest[i]], [])
        self.resumed = max(0, done - len(self.rest))
        if self.resumed == len(self.pager.blocks):
            return
        with self.clock.phase("probe"):
            probe = probe_model(self.pager)
        store = None
        if rows is not None:
            with self.clock.phase("embed"):
                assert self.config.batch is not None
                batches = Batches(self.config.batch, self.journal.halvings, self._halved)
                store = activations_for(self.pager, rows, batches, probe, self._tier(rows, probe))
        plans: dict[Any, BlockPlan] = {}
        with contextlib.nullcontext() if store is None else contextlib.closing(store):
            for i in range(len(self.pager.blocks)):
                if i >= self.resumed or store is not None:
                    self._block(i, probe, plans, store)
        with self.clock.phase("write"):
            self.behind.wait()

    def _check_shapes(self) -> None:
        """Raise UsageError before the job starts where a Linear fits neither the format nor its group size."""
        for i, block in enumerate(self.pager.blocks):
            for name, module in block_linears(block).items():
                full = f"{self.pager.blocks_path}.{i}.{name}"
                scheme = scheme_for(full, self.config.base_scheme, self.config.rules)
                m, n = linear_weight(module).shape
                if scheme is not None and min(m, n) >= SMALLEST:
                    require_packable(full, m, n, scheme)

    def _block(self, i: int, probe: Probe, plans: dict[Any, BlockPlan], store: ActivationStore | None) -> None:
        started = time.monotonic()
        prefix = f"{self.pager.blocks_path}.{i}"
        self.clock.subject = prefix
        self.progress.phase(f"block {i + 1} load")
        with self.clock.phase("load"):
            block = self.pager.load_block(i)
        self.pager.announce_block(i + 1)
        shape = tuple((name, type(m).__name__, linear_weight(m).shape) for name, m in block_linears(block).items())
        if shape not in plans:
            with self.clock.phase("probe"):
                plans[shape] = plan_block(block, probe.hidden, probe.calls[i])
        plan = plans[shape]
        job = BlockJob(
            index=i,
            prefix=prefix,
            block=block,
            plan=plan,
            schemes=self._schemes(prefix, plan),
            device=self.pager.device,
            clock=self.clock,
            memo=Memo(),
        )
        if i < self.resumed:
            self._restore(job)
        else:
            records = self._solve_and_commit(job, store)
        last = i == len(self.pager.blocks) - 1
        if store is not None and not last:
            self.progress.phase(f"block {i + 1} replay")
            with self.clock.phase("replay"):
                propagate(i, block, store, prefix, job.memo)
        job.memo.close()
        self.pager.evict_block(i)
        return_freed_memory()
        if i < self.resumed:
            self.progress.block_skipped()
        else:
            worst = max(records, key=lambda r: r.relative_error, default=None)
            named = None if worst is None else (worst.name.removeprefix(prefix + "."), worst.relative_error)
            self.progress.block_done(i, time.monotonic() - started, named)

    def _tier(self, rows: Tensor, probe: Probe) -> Tier:
        """Where the activations go. A block may keep one more hidden state per token: see ``Memo``."""
        needed = 2 * rows.numel() * probe.hidden.shape[-1] * probe.hidden.dtype.itemsize
        return choose_tier(self.config.activations, self.pager.device, needed, self.journal.out / STATE_FOLDER, self.clock)

    def _halved(self, before: int, halving: Halving) -> None:
        self.progress.say(told(before, halving))
        self.journal.halve(halving)

    def _schemes(self, prefix: str, plan: BlockPlan) -> dict[str, QuantScheme]:
        """The scheme of each Linear of a block that will be quantized, by its name in the block."""
        names = [name for group in plan.groups for name in group.names]
        found = {name: scheme_for(f"{prefix}.{name}", self.config.base_scheme, self.config.rules) for name in names}
        return {name: scheme for name, scheme in found.items() if scheme is not None}

    def _solve_and_commit(self, job: BlockJob, store: ActivationStore | None) -> list[LinearRecord]:
        self.progress.phase(f"block {job.index + 1} solve")
        packed: dict[str, dict[str, Tensor]] = {}
        records: list[LinearRecord] = []
        solving: Iterator[Solved] = round_block(job) if store is None else solve_block(job, store, self.config.true_sequential)
        for solved in solving:
            source = self.pager.sources[f"{solved.name}.weight"].name
            with self.clock.phase("pack"):
                packed[source] = pack_linear(source.removesuffix(".weight"), solved.weight, self._version)
            records.append(solved.record())
        tensors = []
        for name in self._sources(len(self.rest) + job.index):
            if name in packed:
                tensors += [OutputTensor.of(n, t) for n, t in packed[name].items()]
            else:
                tensors.append(OutputTensor.copy_of(self.pager.checkpoint[name]))
        left_out = [f"{job.prefix}.{name}" for name in job.plan.left_out]
        batch = None if store is None else store.batch
        self.clock.settle()  # the records' seconds become numbers before another thread writes them
        self.progress.phase(f"block {job.index + 1} write")
        with self.clock.phase("write"):
            self.behind.start(lambda: self._commit(len(self.rest) + job.index, tensors, records, left_out, batch))
        return records

    def _restore(self, job: BlockJob) -> None:
        """Give a block that an earlier run committed the weights that it was committed with."""
        finished = _FinishedBlock(self.journal.out, self.journal.commits[len(self.rest) + job.index])
        for name, scheme in job.schemes.items():
            source = self.pager.sources[f"{job.prefix}.{name}.weight"].name.removesuffix(".weight")
            module = job.block.get_submodule(name)
            weight = finished.weight(source, scheme.bits, self._version, linear_weight(module).dtype, self.pager.device)
            skeleton.set_linear_weight(module, weight)

    def _check_committed(self) -> None:
        """Raise UsageError where a committed shard was made from other weights than the source holds now."""
        for number, commit in enumerate(self.journal.commits):
            if commit.source != self.pager.checkpoint.sample(self._sources(number)):
                raise UsageError(
                    f"{self.journal.out}: its shard {commit.shard.file} was made from another source than {self.pager.folder} "
                    "(the weights differ); give the model that the job was begun with, or choose another folder"
                )

    def _sources(self, number: int) -> list[str]:
        """Names of the checkpoint's tensors that shard ``number`` is made from, in the checkpoint's order."""
        if number < len(self.rest):
            return [info.name for info in self.rest[number]]
        prefix = f"{self.pager.blocks_path}.{number - len(self.rest)}"
        own = {info.name for name, info in self.pager.sources.items() if name.startswith(prefix + ".")}
        return [name for name in self.pager.checkpoint if name in own]

    @property
    def _version(self) -> int:
        return 2 if self.config.format == "gptq_v2" else 1

    def _commit(
        self, number: int, tensors: list[OutputTensor], records: list[LinearRecord], left_out: Sequence[str] = (), batch: int | None = None
    ) -> None:
        """Write shard ``number`` and its line in the journal."""
        unit = self.units[number]
        with self.clock.trace.span("commit", unit):
            shard = write_shard(self.journal.out / f"model-{number + 1:05d}-of-{len(self.units):05d}.safetensors", tensors)
            source = self.pager.checkpoint.sample(self._sources(number))
            linears = tuple(r.to_json() for r in records)
            self.journal.commit(Commit(unit=unit, shard=shard, linears=linears, left_out=tuple(left_out), source=source, batch=batch))

    def finish(self) -> None:
        """Write what makes the folder loadable: side files, quantize_config.json, the index, and last config.json."""
        source, out, config = self.pager.folder, self.journal.out, self.config
        lines = [_json_line(record) for commit in self.journal.commits for record in commit.linears]
        write_bytes(out / STATE_FOLDER / "linears.jsonl", b"".join(lines))
        for path in sorted(source.iterdir()):
            if path.is_file() and _is_side_file(path.name):
                copy_file(path, out / path.name)
        meta = {
            "quantizer": [f"bigq:{bigq.__version__}"],
            "method": config.method,
            "true_sequential": config.true_sequential,
            "mse": config.scheme.mse,
        }
        left_out = tuple(name for commit in self.journal.commits for name in commit.left_out)
        quantization = quantization_config(config.scheme, config.rules, self._version, left_out, meta)
        write_json(out / "quantize_config.json", quantization)
        weight_map = {name: commit.shard.file for commit in self.journal.commits for name in commit.shard.tensors}
        total = sum(commit.shard.size for commit in self.journal.commits)
        write_json(out / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        write_json(out / "config.json", read_json_object(source / "config.json") | {"quantization_config": quantization})


class _FinishedBlock:
    """The packed Linears of a committed block."""

    def __init__(self, out: Path, commit: Commit) -> None:
        self._tensors, _ = read_header(out / commit.shard.file)

    def weight(self, prefix: str, bits: int, version: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        stored = read_linear(prefix, lambda n: read_tensor(self._tensors[n]), bits, version)
        words, scales, zeros = (t.to(device) for t in stored)
        return dequantize_packed(words, scales, zeros, bits, dtype)


def _seqlen(pager: Pager, config: JobConfig) -> int:
    """Tokens per calibration row. Raises UsageError where the model has fewer positions than asked for."""
    limit = skeleton.max_positions(pager.config) or DEFAULT_SEQLEN
    if config.seqlen is not None and config.seqlen > (skeleton.max_positions(pager.config) or config.seqlen):
        raise UsageError(f"--seqlen {config.seqlen}: the model has {limit} positions; use --seqlen {limit} or less")
    return config.seqlen or min(DEFAULT_SEQLEN, limit)


def _calibration(pager: Pager, config: JobConfig) -> Tensor | None:
    """The calibration rows [N, T] of a resolved job; None where the method does not look at any."""
    if config.method == "rtn":
        return None
    assert config.seqlen is not None
    rows = calibration_rows(
        config.calibration,
        pager.folder,
        samples=config.samples,
        seqlen=config.seqlen,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
    )
    require_vocabulary(rows, pager.embedding.num_embeddings)
    return rows


def _rest_shards(pager: Pager) -> list[list[TensorInfo]]:
    """The tensors outside the blocks (and those that the model has no place for), gathered into shards."""
    in_blocks = {info.name for name, info in pager.sources.items() if name.startswith(pager.blocks_path + ".")}
    shards: list[list[TensorInfo]] = []
    size = 0
    for name, info in pager.checkpoint.tensors.items():
        if name in in_blocks:
            continue
        if not shards or size + info.nbytes > REST_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


def _refuse_nesting(source: Path, out: Path) -> None:
    a, b = source.resolve(), out.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UsageError(f"{out}: OUT and MODEL ({source}) must be folders apart from each other")


def _is_side_file(name: str) -> bool:
    """Whether a file of the source belongs beside any checkpoint of it: tokenizer, licence, generation config, code."""
    if name in ("config.json", "quantize_config.json") or name.startswith("."):
        return False
    return not name.endswith((".safetensors", ".index.json", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf", ".onnx"))


def _json_line(value: Any) -> bytes:
    return (json.dumps(value) + "\n").encode()
