"""Perplexity, and the distance from another model, for models that may be larger than the device.

Hidden states are streamed through each model's blocks, one block at a time; then the output head runs row by row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigq.calibration import evaluation_rows, require_vocabulary
from bigq.common_options import DEFAULT_SEQLEN
from bigq.errors import BigqError, NumericsError, UsageError
from bigq.infer.experts import BankRunner
from bigq.infer.options import EvalConfig
from bigq.infer.results import Evaluation, RowSums, figures
from bigq.infer.together import all_rows, require_same_evaluation, share_of
from bigq.inspect.evaluations import holds_output, record_evaluation
from bigq.io.hub import resolve_model
from bigq.io.prefetch.to_device import least_budget
from bigq.job.batches import Batches, Halving, halving_message
from bigq.machine.budget import host_budget
from bigq.machine.device import choose_device, memory_errors
from bigq.machine.memory import hold_heap, return_freed_memory
from bigq.machine.ranks import OneProcess, Ranks
from bigq.model import skeleton
from bigq.model.architecture import max_positions
from bigq.model.forward.block_call import OutputForm
from bigq.model.forward.capture import replace_forwards
from bigq.model.pager import Pager
from bigq.progress.clock import Clock
from bigq.progress.display import Display
from bigq.progress.progress import Progress
from bigq.progress.trace import Trace
from bigq.sched.plan.survey import require_hidden_paths
from bigq.sched.rows.probe import activations_for, probe_model
from bigq.sched.rows.store import ActivationStore
from bigq.sched.rows.tiers import choose_tier
from bigq.sched.solve.propagate import propagate
from bigq.sched.together import refuse_halving
from bigq.solver.hessian import OTHER_DTYPE

#: Positions whose distributions over the vocabulary are compared at once, in fp32.
POSITIONS = 128


def evaluate(
    model: str,
    config: EvalConfig | None = None,
    *,
    baseline: str | None = None,
    display: Display | None = None,
    ranks: Ranks | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate a model, original or quantized, on a text. display: as for ``quantize``. Raises the errors of ``bigq.errors``.

    If ``quantize`` or ``convert`` wrote ``model``, the result is added to its records; if that fails, there is a warning.
    ranks: the processes that share the rows; by default there is one. Each gets the figures of all, and the first records them.
    pause: called between batches of rows; may raise.
    """
    started = time.monotonic()
    config = config or EvalConfig()
    ranks = ranks or OneProcess()
    device = choose_device(config.device, ranks.local)
    hold_heap()
    skeleton.silence_transformers()
    with torch.no_grad(), memory_errors(device):
        pagers = [
            Pager(resolve_model(str(m)), device=device, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
            for m in (model, baseline)
            if m is not None
        ]
        rows = _rows(pagers, config)
        share = share_of(config, device.type, rows.shape, ranks)
        if ranks.count > 1:
            require_same_evaluation(config, pagers, rows, share, ranks)
        how = Streaming(causal=True, quiet=config.quiet, display=display, pause=pause, ranks=ranks)
        sums = all_rows(_sums(pagers, rows[share.rows.start : share.rows.stop], share.batch, how), ranks)
    _require_numbers(sums, model, baseline)
    result = figures(sums, compared=baseline is not None)
    if ranks.index == 0:
        facts = _facts(model, config, baseline, rows, device) | {"seconds": round(time.monotonic() - started, 3)}
        facts |= {"processes": ranks.count} if ranks.count > 1 else {}
        _record(model, facts | dataclasses.asdict(result), Progress(0, device, config.quiet, display=display))
    return result


def _sums(pagers: Sequence[Pager], rows: Tensor, batch: int, how: Streaming) -> list[RowSums]:
    """The sums of each of the rows [N, T], by the model and by the baseline if there is one."""
    streams: list[Stream] = []
    sums: list[RowSums] = []
    with contextlib.ExitStack() as stack:
        for pager in pagers:
            streams.append(Stream(pager, rows, batch, how))
            stack.enter_context(streams[-1].tail_ready())
        for lo in range(len(rows)):
            how.pause()
            ids = rows[lo : lo + 1].to(pagers[0].device)
            logits = [s.logits(lo, lo + 1)[0, :-1] for s in streams]
            sums.append(RowSums())
            for start in range(0, rows.shape[1] - 1, POSITIONS):
                stop = start + POSITIONS
                sums[-1].add(ids[0, 1:][start:stop], *(part[start:stop] for part in logits))
    return sums


def _require_numbers(sums: Sequence[RowSums], model: str, baseline: str | None) -> None:
    """Raise NumericsError, naming the model or the baseline, if figures would be NaN: blocks are checked, the head's outputs are not."""
    wrong = [str(model)] * any(math.isnan(row.nll) for row in sums) + [str(baseline)] * any(math.isnan(row.baseline_nll) for row in sums)
    if not wrong and not all(math.isfinite(row.kl) for row in sums):
        wrong = [str(model), str(baseline)]
    if wrong:
        raise NumericsError(f"{' or '.join(wrong)}: logits contain NaN or Inf; {OTHER_DTYPE}")


def _facts(model: str, config: EvalConfig, baseline: str | None, rows: Tensor, device: torch.device) -> dict[str, Any]:
    """The settings of the evaluation."""
    return {
        "model": str(model),
        "baseline": baseline,
        "data": str(config.data),
        "samples": rows.shape[0],
        "seqlen": rows.shape[1],
        "dtype": config.dtype,
        "device": device.type,
    }


def _record(model: str, evaluation: dict[str, Any], progress: Progress) -> None:
    """Add a result to the records of the model's folder, if it has any."""
    folder = Path(model).expanduser()
    try:
        if holds_output(folder):
            record_evaluation(folder, evaluation)
    except BigqError as error:
        progress.say(f"warning: {error}; the result is not recorded")


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """How rows pass through a model's blocks. causal: whether to refuse a model that sees later tokens.

    quiet, display: how progress is shown, as ``Progress`` takes them. pause: called before each batch; may raise. ranks: the processes
    that do so at the same time, each with rows of its own.
    """

    causal: bool = False
    quiet: bool = True
    display: Display | None = None
    pause: Callable[[], None] = lambda: None
    ranks: Ranks = field(default_factory=OneProcess)


class Stream:
    """The hidden states of rows [N, T] after a model's last block, and the logits from them."""

    def __init__(self, pager: Pager, rows: Tensor, batch: int, how: Streaming | None = None) -> None:
        """batch: rows that pass through a block at once. Raises UnsupportedModelError."""
        how = how or Streaming()
        self._pager, self._rows = pager, rows
        probe = probe_model(pager)
        require_hidden_paths(pager.model, pager.blocks_path)
        self._form: OutputForm = probe.form
        needed = rows.numel() * math.prod(probe.hidden.shape[2:]) * probe.hidden.dtype.itemsize
        tier = choose_tier(pager.device, needed, Path(tempfile.gettempdir()), how.ranks.local_count)
        with (
            Progress(len(pager.blocks), pager.device, how.quiet, display=how.display) as progress,
            pager.prefetch(_read_ahead(pager, how.ranks.local_count), Trace(keep=False)),
        ):
            batches = Batches(batch, on_halving=functools.partial(_halved, progress, how.ranks))
            self._store: ActivationStore = activations_for(pager, rows, batches, probe, tier)
            self._store.before_batch, self._store.on_progress = how.pause, progress.step
            banks = BankRunner(pager, probe, Clock(pager.device, Trace(keep=False)))
            for i in range(len(pager.blocks)):
                progress.phase(f"of {pager.folder.name}", i)
                block = pager.load_block(i)
                progress.read(sum(info.nbytes for info in pager.block_tensors(i)))
                probe.check.run(i, block)
                if how.causal:
                    probe.check.require_causal(i, block)
                with banks.outputs(i, block, self._store) as cache:
                    pager.announce_block(i + 1)
                    propagate(i, block, self._store, f"{pager.blocks_path}.{i}", cache)
                pager.evict_block(i)
                return_freed_memory()
                progress.block_passed(len(pager.blocks) - i - 1)

    @contextlib.contextmanager
    def tail_ready(self) -> Iterator[None]:
        """Keep the modules before and after the blocks in memory."""
        with self._pager.rest_loaded(), self._pager.head_loaded(), self._pager.embedding_rows(self._rows):
            yield

    def logits(self, lo: int, hi: int) -> Tensor:
        """Logits [hi − lo, T, V] of rows lo to hi, by the model's own forward around its blocks."""
        hidden = self._store.rows(lo, hi)

        def make(_: int) -> Any:
            return lambda *args, **kwargs: self._form.wrap(hidden)

        with replace_forwards(list(self._pager.blocks), make):
            logits = self._pager.model(input_ids=self._rows[lo:hi].to(self._pager.device), use_cache=False).logits
        assert isinstance(logits, Tensor)
        return logits


def _halved(progress: Progress, ranks: Ranks, before: int, halving: Halving) -> None:
    """The device is out of memory. Raises ResourceError if there are several ranks: all would have to halve at the same place."""
    if ranks.count > 1:
        refuse_halving(before, halving, ranks.index)
    progress.say(halving_message(before, halving))


def _read_ahead(pager: Pager, processes: int) -> int:
    """Bytes of host memory for reading weights ahead. On a GPU: for a block, if host memory has room for two; on a CPU: none.

    processes: that share the host's memory.
    """
    if pager.device.type != "cuda":
        return 0
    largest = max(sum(info.nbytes for info in pager.block_tensors(i)) for i in range(len(pager.blocks)))
    return max(least_budget(), min(largest, host_budget(resident=0) // processes // 2))


def _rows(pagers: list[Pager], config: EvalConfig) -> Tensor:
    if config.seqlen == 1:
        raise UsageError("--seqlen 1: a row of one token predicts nothing; use 2 or more")
    limits = [limit for p in pagers if (limit := max_positions(p.config)) is not None]
    if config.seqlen is not None and any(config.seqlen > limit for limit in limits):
        raise UsageError(f"--seqlen {config.seqlen}: the model has {min(limits)} positions; use --seqlen {min(limits)} or less")
    rows = evaluation_rows(
        config.data,
        pagers[0].folder,
        seqlen=config.seqlen or min([DEFAULT_SEQLEN, *limits]),
        samples=config.samples,
        text_field=config.text_field,
        trust_remote_code=config.trust_remote_code,
    )
    for pager in pagers:
        require_vocabulary(rows, pager.embedding.num_embeddings)
    return rows
