"""Perplexity, and the distance from another model, for models that may be larger than the device.

Hidden states are streamed through each model's blocks, one block at a time; then the output head runs row by row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigq.calibration import evaluation_rows, require_vocabulary
from bigq.common_options import DEFAULT_SEQLEN, default_batch
from bigq.errors import BigqError, UsageError
from bigq.infer.experts import BankRunner
from bigq.infer.options import EvalConfig
from bigq.inspect.evaluations import holds_output, record_evaluation
from bigq.io.hub import resolve_model
from bigq.io.prefetch.to_device import least_budget
from bigq.job.batches import Batches, halving_message
from bigq.machine.budget import host_budget
from bigq.machine.device import choose_device, memory_errors
from bigq.machine.memory import hold_heap, return_freed_memory
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

#: Positions whose distributions over the vocabulary are compared at once, in fp32.
POSITIONS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The result of an evaluation.

    tokens: predicted tokens, all but the first of each row. kl: mean KL(baseline ‖ model) per token, in nats. kl_stderr: its standard
    error by row: tokens of one row are not independent, so an error by token is too small. None with a single row, which does not tell.

    The last four are None without a baseline.
    """

    perplexity: float
    tokens: int
    baseline_perplexity: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None


def evaluate(model: str, config: EvalConfig | None = None, *, baseline: str | None = None, display: Display | None = None) -> Evaluation:
    """Evaluate a model, original or quantized, on a text. display: as for ``quantize``. Raises the errors of ``bigq.errors``.

    If ``quantize`` or ``convert`` wrote ``model``, the result is added to its records; if that fails, there is a warning.
    """
    started = time.monotonic()
    config = config or EvalConfig()
    device = choose_device(config.device)
    hold_heap()
    skeleton.silence_transformers()
    with torch.no_grad(), memory_errors(device), contextlib.ExitStack() as stack:
        pagers = [
            Pager(resolve_model(str(m)), device=device, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
            for m in (model, baseline)
            if m is not None
        ]
        rows = _rows(pagers, config)
        streams = []
        for pager in pagers:
            batch = config.batch or default_batch(device.type, rows.shape[1])
            streams.append(Stream(pager, rows, batch, causal=True, quiet=config.quiet, display=display))
            stack.enter_context(streams[-1].tail_ready())
        totals = _Totals()
        for lo in range(len(rows)):
            ids = rows[lo : lo + 1].to(device)
            logits = [s.logits(lo, lo + 1)[0, :-1] for s in streams]
            for start in range(0, rows.shape[1] - 1, POSITIONS):
                stop = start + POSITIONS
                totals.add(ids[0, 1:][start:stop], *(part[start:stop] for part in logits))
            totals.end_row()
    result = totals.result()
    facts = _facts(model, config, baseline, rows, device) | {"seconds": round(time.monotonic() - started, 3)}
    _record(model, facts | dataclasses.asdict(result), Progress(0, device, config.quiet, display=display))
    return result


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


class Stream:
    """The hidden states of rows [N, T] after a model's last block, and the logits from them."""

    def __init__(
        self, pager: Pager, rows: Tensor, batch: int, *, causal: bool = False, quiet: bool = True, display: Display | None = None
    ) -> None:
        """causal: whether to refuse a model that sees later tokens. Raises UnsupportedModelError."""
        self._pager, self._rows = pager, rows
        probe = probe_model(pager)
        require_hidden_paths(pager.model, pager.blocks_path)
        self._form: OutputForm = probe.form
        needed = rows.numel() * math.prod(probe.hidden.shape[2:]) * probe.hidden.dtype.itemsize
        tier = choose_tier(pager.device, needed, Path(tempfile.gettempdir()))
        with (
            Progress(len(pager.blocks), pager.device, quiet, display=display) as progress,
            pager.prefetch(_read_ahead(pager), Trace(keep=False)),
        ):
            batches = Batches(batch, on_halving=lambda before, halving: progress.say(halving_message(before, halving)))
            self._store: ActivationStore = activations_for(pager, rows, batches, probe, tier)
            self._store.on_progress = progress.step
            banks = BankRunner(pager, probe, Clock(pager.device, Trace(keep=False)))
            for i in range(len(pager.blocks)):
                progress.phase(f"of {pager.folder.name}", i)
                block = pager.load_block(i)
                progress.read(sum(info.nbytes for info in pager.block_tensors(i)))
                probe.check.run(i, block)
                if causal:
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


def _read_ahead(pager: Pager) -> int:
    """Bytes of host memory for reading weights ahead. On a GPU: for a block, if host memory has room for two; on a CPU: none."""
    if pager.device.type != "cuda":
        return 0
    largest = max(sum(info.nbytes for info in pager.block_tensors(i)) for i in range(len(pager.blocks)))
    return max(least_budget(), min(largest, host_budget(resident=0) // 2))


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


class _Totals:
    """Running sums over tokens, in fp64. Rows have equal lengths."""

    def __init__(self) -> None:
        self._tokens = 0
        self._compared = False
        self._nll = self._baseline_nll = self._agreed = self._kl_of_row = 0.0
        self._kl_of_rows: list[float] = []

    def add(self, targets: Tensor, logits: Tensor, baseline: Tensor | None = None) -> None:
        """Token ids [P] and the logits [P, V] that predict them."""
        log_p = torch.log_softmax(logits.float(), -1)
        self._tokens += len(targets)
        self._nll -= float(log_p.gather(1, targets[:, None]).double().sum())
        if baseline is None:
            return
        self._compared = True
        log_q = torch.log_softmax(baseline.float(), -1)
        self._baseline_nll -= float(log_q.gather(1, targets[:, None]).double().sum())
        self._kl_of_row += float((log_q.exp() * (log_q - log_p)).double().sum())
        self._agreed += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())

    def end_row(self) -> None:
        self._kl_of_rows.append(self._kl_of_row)
        self._kl_of_row = 0.0

    def result(self) -> Evaluation:
        n = self._tokens
        perplexity = _exp(self._nll / n)
        if not self._compared:
            return Evaluation(perplexity=perplexity, tokens=n)
        rows = [total * len(self._kl_of_rows) / n for total in self._kl_of_rows]
        return Evaluation(
            perplexity=perplexity,
            tokens=n,
            baseline_perplexity=_exp(self._baseline_nll / n),
            kl=math.fsum(self._kl_of_rows) / n,
            kl_stderr=statistics.stdev(rows) / math.sqrt(len(rows)) if len(rows) > 1 else None,
            top1_agreement=self._agreed / n,
        )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
