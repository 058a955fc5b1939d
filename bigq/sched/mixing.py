"""The survey of a job with ``bits_per_weight``: what the last hidden states lose if Linears are rounded (see ``bigq.mixed.loss``).

A few calibration rows pass through the blocks several times, in one stream each: as they are, with all Linears rounded to nearest at
``ROUNDED`` bits, which costs about as much as GPTQ at one bit less, and with each exception. Nothing is solved, and no Hessian is summed.
A survey that is killed begins again; its result is frozen in bits.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bigq import faults
from bigq.job.batches import Batches
from bigq.machine.memory import return_freed_memory
from bigq.methods.base import CalibratedMethod
from bigq.mixed.groups import Group
from bigq.mixed.loss import PLAIN, ROUNDED, Place, choose_bits, rows_of, run_name, run_of, streams_of
from bigq.mixed.record import ChosenBits
from bigq.mixed.settings import with_chosen
from bigq.model.blocks import block_linears
from bigq.model.experts.bank import Bank
from bigq.model.experts.pages import StoredBank
from bigq.model.skeleton import linear_weight, set_linear_weight
from bigq.sched.plan.costs.survey import quantized_groups
from bigq.sched.plan.shape import ModelShape
from bigq.sched.resolve import Job
from bigq.sched.rows.probe import embed, store_for
from bigq.sched.rows.shortcut_cache import ShortcutCache
from bigq.sched.rows.store import ActivationStore
from bigq.sched.rows.tiers import Tier
from bigq.sched.solve.bank import BankJob, run_bank_variants
from bigq.sched.solve.block import BlockJob, bank_rows, bank_step
from bigq.sched.solve.propagate import propagate
from bigq.sched.units.base import Bench
from bigq.scheme import QuantScheme, scheme_for
from bigq.solver.rtn import round_to_nearest


def with_bits(job: Job, shape: ModelShape, bench: Bench, tier: Tier) -> Job:
    """Survey the model, freeze the choice of bits, and return the job with it. Raises Stopped, UsageError, NumericsError."""
    budget = job.config.bits_per_weight
    assert budget is not None and isinstance(job.method, CalibratedMethod)
    groups = quantized_groups(job.adapted.groups, shape)
    path, blocks = job.pager.blocks_path, len(job.pager.blocks)
    changes = {}
    if any(not group.fixed for group in groups):
        with _Survey.opened(job, job.method, bench, groups, tier) as survey:
            changes = survey.changes()
    chosen = choose_bits(groups, path, blocks, budget, changes)
    bench.control.stop.check()
    chosen.save(job.target.out)
    bench.control.progress.say(said(chosen))
    adapted = dataclasses.replace(job.adapted, config=with_chosen(job.config, chosen.rules))
    return dataclasses.replace(job, config=adapted.config, adapted=adapted)


def said(chosen: ChosenBits) -> str:
    """The choice in a line."""
    total = sum(chosen.weights.values())
    shares = ", ".join(f"{100 * count / total:.1f} % of the weights at {bits}" for bits, count in chosen.weights.items())
    return f"bits: {shares}; {chosen.reached:.4g} per weight of {chosen.budget:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Survey:
    """streams: rows by the name of their exception. groups: by the names of their parts."""

    job: Job
    method: CalibratedMethod
    bench: Bench
    groups: Mapping[str, Group]
    streams: Mapping[str, ActivationStore]

    @classmethod
    @contextlib.contextmanager
    def opened(cls, job: Job, method: CalibratedMethod, bench: Bench, groups: Sequence[Group], tier: Tier) -> Iterator[_Survey]:
        """Open a store for each stream, filled with the inputs of the first block."""
        assert job.rows is not None
        rows, seqlen = job.rows.shape
        count = rows_of(rows, seqlen)
        tokens = job.rows[:: rows // count][:count]
        batches = Batches(min(bench.choice.batch, count))
        streams: dict[str, ActivationStore] = {}
        with contextlib.ExitStack() as stack:
            plain = stack.enter_context(contextlib.closing(store_for(job.pager, tokens, batches, bench.probe, tier)))
            with bench.control.clock.phase("embed"):
                embed(job.pager, tokens, bench.probe, plain)
            streams[PLAIN] = plain
            for name in streams_of(groups, job.pager.blocks_path, len(job.pager.blocks))[1:]:
                streams[name] = stack.enter_context(contextlib.closing(plain.empty_like()))
                streams[name].copy_from(plain)
            for store in streams.values():
                store.before_batch = bench.control.pause
            by_part = {part: group for group in groups for part in group.parts}
            yield cls(job=job, method=method, bench=bench, groups=by_part, streams=streams)

    def changes(self) -> dict[str, float]:
        """Run all blocks. Returns the relative change of the last hidden states in each stream."""
        pager, control = self.job.pager, self.bench.control
        for index in range(len(pager.blocks)):
            control.begin("survey", f"block {index + 1} of {len(pager.blocks)} of the survey")
            control.progress.phase(f"survey of bits: block {index + 1} of {len(pager.blocks)}")
            with control.clock.phase("load"):
                block = pager.load_block(index)
            self._run_block(index, block)
            pager.evict_block(index)
            return_freed_memory()
            control.end()
            faults.point("survey.block")
        plain = self.streams[PLAIN]
        return {name: relative_change(store, plain) for name, store in self.streams.items() if name != PLAIN}

    def _run_block(self, index: int, block: nn.Module) -> None:
        """Replay each stream's rows through a block with the stream's weights."""
        bench = self.bench
        prefix = f"{self.job.pager.blocks_path}.{index}"
        plan = bench.structure(block, index)
        banks = bench.banks(block, index, plan)
        job = BlockJob(
            index=index,
            prefix=prefix,
            block=block,
            plan=plan.with_shortcuts(last=False, others=False),
            schemes={},
            device=self.job.pager.device,
            clock=bench.control.clock,
            on_nonfinite=self.job.config.on_nonfinite,
            banks={name: self._bank(block, prefix, name, bank) for name, bank in banks.items()},
        )
        weights = self._weights(prefix, block)
        with contextlib.ExitStack() as stack:
            caches = {stream: stack.enter_context(contextlib.closing(ShortcutCache())) for stream in self.streams}
            stack.callback(self._set_weights, index, block, weights, PLAIN)
            for name in banks:
                self._run_bank(job, name, weights, caches)
            for stream, store in self.streams.items():
                self._set_weights(index, block, weights, stream)
                with bench.control.clock.phase("replay"):
                    propagate(index, block, store, prefix, caches[stream], job.on_nonfinite)

    def _weights(self, prefix: str, block: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """The weights of a block's quantized Linears by name in the block: as they are, and rounded."""
        weights = {}
        with self.bench.control.clock.phase("solve"):
            for name, module in block_linears(block).items():
                if f"{prefix}.{name}" not in self.groups:
                    continue
                original = module._parameters["weight"]
                assert isinstance(original, nn.Parameter)
                scheme = self._scheme(f"{prefix}.{name}")
                made = round_to_nearest(linear_weight(module), scheme, f"{prefix}.{name}").dequantize(original.dtype)
                module._parameters["weight"] = rounded = nn.Parameter(torch.empty_like(original), requires_grad=False)
                set_linear_weight(module, made)
                weights[name] = original, rounded
        return weights

    def _set_weights(self, index: int, block: nn.Module, weights: Mapping[str, tuple[nn.Parameter, nn.Parameter]], stream: str) -> None:
        prefix = f"{self.job.pager.blocks_path}.{index}"
        for name, (original, rounded) in weights.items():
            kept = self._is_exempt(stream, f"{prefix}.{name}", index)
            block.get_submodule(name)._parameters["weight"] = original if kept else rounded

    def _run_bank(
        self,
        job: BlockJob,
        name: str,
        weights: Mapping[str, tuple[nn.Parameter, nn.Parameter]],
        caches: Mapping[str, ShortcutCache],
    ) -> None:
        """Compute a bank's outputs in all streams: each expert is read and rounded once."""
        bank, stored = job.banks[name], self.job.pager.banks[f"{job.prefix}.{name}"]
        part = stored.matrices(next(iter(stored.sources)), 0)[0]
        step = bank_step(job, self.method, name, self.job.config.true_sequential)
        kept = [part not in self.groups or self._is_exempt(stream, part, job.index) for stream in self.streams]

        def variants(e: int, held: Mapping[str, Tensor]) -> Callable[[int], Mapping[str, Tensor]]:
            rounded = functools.cache(lambda: _rounded(held, bank.bank, self._scheme(part), f"{stored.path}.{e}"))
            return lambda i: held if kept[i] else rounded()

        with contextlib.ExitStack() as stack:
            routed = []
            for stream, store in self.streams.items():
                self._set_weights(job.index, job.block, weights, stream)
                routed.append(stack.enter_context(bank_rows(job, store, caches[stream], name, step)))
            run_bank_variants(bank, routed, variants)

    def _bank(self, block: nn.Module, prefix: str, name: str, bank: Bank) -> BankJob:
        stored = self.job.pager.banks[f"{prefix}.{name}"]
        return BankJob(
            prefix=stored.path,
            module=block.get_submodule(name),
            bank=bank,
            schemes={},
            names=stored.matrices,
            load=functools.partial(self._load, stored),
            clock=self.bench.control.clock,
        )

    def _load(self, stored: StoredBank, e: int) -> Mapping[str, Tensor]:
        """An expert's parameters. A spare one has none."""
        if e >= stored.experts:
            return {}
        self.job.pager.announce_experts(stored.path, range(e, min(e + 2, stored.experts)))
        return self.job.pager.load_expert(stored.path, e)

    def _scheme(self, name: str) -> QuantScheme:
        config = self.job.config
        scheme = scheme_for(name, config.base_scheme, config.rules)
        assert scheme is not None, "groups hold what is quantized"
        return dataclasses.replace(scheme, bits=ROUNDED, scales="search")

    def _is_exempt(self, stream: str, name: str, index: int) -> bool:
        """Whether a stream has the original weights of a part. name: of the part; index: of its block."""
        if stream == PLAIN:
            return True
        if stream == run_name(run_of(index, len(self.job.pager.blocks))):
            return not self.groups[name].fixed
        place = Place.of(self.groups[name], self.job.pager.blocks_path, len(self.job.pager.blocks))
        return place is not None and stream == place.kind and not self.groups[name].fixed


def _rounded(held: Mapping[str, Tensor], bank: Bank, scheme: QuantScheme, label: str) -> Mapping[str, Tensor]:
    """An expert's parameters, rounded by a scheme. A spare one has none."""
    rounded = dict(held)
    for product in bank.products if held else ():
        value = held[product.parameter]
        matrix = value.T if product.transposed else value
        made = round_to_nearest(matrix, scheme, f"{label}.{product.parameter}").dequantize(value.dtype)
        rounded[product.parameter] = (made.T if product.transposed else made).contiguous()
    return rounded


def relative_change(store: ActivationStore, plain: ActivationStore) -> float:
    """The mean over tokens of ‖h − h₀‖² / ‖h₀‖², without tokens that are not finite."""
    total, tokens = 0.0, 0
    for lo, hi in plain.spans():
        before, now = (each.rows(lo, hi).float().flatten(2) for each in (plain, store))
        change = (now - before).square().sum(-1) / before.square().sum(-1)
        finite = torch.isfinite(change)
        total += float(change[finite].double().sum())
        tokens += int(finite.sum())
    return total / max(1, tokens)  # a block without any finite token has ended the survey
