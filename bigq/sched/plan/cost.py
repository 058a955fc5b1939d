"""The memory, disk space, bytes moved and arithmetic of a job, from the shape of its model. Pure functions.

The terms follow the code that they predict: ``solve.block`` (levels), ``solver.gptq`` (buffers of a solve), ``rows.tiers``
(activations), ``io.prefetch`` (prefetched weights). Tests compare them with measured peaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bigq.io.prefetch.to_device import least_budget
from bigq.io.reader import CHUNK_BYTES
from bigq.io.remote.push import WAITING_BYTES, WAITING_SHARDS
from bigq.kernels.cholesky import panel_width
from bigq.kernels.gptq_block import SUB_BLOCK
from bigq.kernels.pick import piece
from bigq.kernels.syrk import CHUNK_TOKENS
from bigq.sched.plan.costs.bank import BankPhase, BankTerms, bank_phases, proof_bytes
from bigq.sched.plan.costs.fold import RowTerms, fold_phases, scales_inside
from bigq.sched.plan.costs.head import head_phases
from bigq.sched.plan.costs.ranks import factor_flops, joining_bytes, own_rows, panel_bytes, summing_bytes
from bigq.sched.plan.costs.rotation import block_bytes, block_flops, outside_flops, piece_bytes
from bigq.sched.plan.costs.row import row_bytes
from bigq.sched.plan.costs.solving import SolvingTerms
from bigq.sched.plan.costs.survey import rounding_bytes, stream_bytes, survey_bytes, survey_flops, survey_moved
from bigq.sched.plan.costs.tune import TuneTerms, solved_bytes, tune_bytes, tune_flops
from bigq.sched.plan.shape import BankShape, BlockShape, GroupShape, LinearShape, ModelShape, gguf_bytes, packed_bytes
from bigq.sched.plan.work import Choice, Work
from bigq.scheme import QuantScheme
from bigq.solver.gptq import BLOCK, PANEL, column_order, has_static_grids
from bigq.solver.input_products import block_width

#: Bytes of an fp32 number.
FP32 = 4

#: Buffers of the size of a block of columns in a sweep over them (``solver.sweeps``).
SWEEPING = 7

#: Buffers of the size of a chunk of rows while the chunk is corrected, the chunk included (``solver.upstream_error``).
CORRECTING = 4


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase: its peak memory over all blocks, and its work summed over them.

    device, host: peak bytes (device 0 on a CPU). flops: by kind of arithmetic ("products" in the compute dtype, "single" for fp32).
    moved: bytes of device memory read and written outside of products.
    """

    name: str
    device: int
    host: int
    flops: Mapping[str, float]
    moved: float = 0

    def joined(self, other: Phase) -> Phase:
        """Both phases, one after the other."""
        flops = {kind: self.flops.get(kind, 0.0) + other.flops.get(kind, 0.0) for kind in {**self.flops, **other.flops}}
        return Phase(self.name, max(self.device, other.device), max(self.host, other.host), flops, self.moved + other.moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A job's phases; bytes on disk for output and for activations, and bytes read from the checkpoint.

    Phases and bytes read are those of one process, the first if several share the job; bytes on disk are of all.
    kept: bytes of the output that are on the disk at a time; None for all.
    """

    phases: tuple[Phase, ...]
    output: int
    scratch: int
    read: int
    kept: int | None = None

    @property
    def on_disk(self) -> int:
        """Bytes on the disk at a time."""
        return self.scratch + (self.output if self.kept is None else self.kept)

    @property
    def device(self) -> int:
        return max(phase.device for phase in self.phases)

    @property
    def host(self) -> int:
        return max(phase.host for phase in self.phases)


def job_cost(shape: ModelShape, work: Work, choice: Choice, base: int) -> Cost:
    """The cost of a whole job. base: resident bytes of the process before the job, with libraries warmed up."""
    activations = row_bytes(shape, work, choice)
    phases: dict[str, Phase] = {}

    def add(name: str, held: int, flops: Mapping[str, float], moved: float = 0, host: int = 0, *, early: bool = False) -> None:
        """held: bytes on the computing device. early: before hidden states exist."""
        held += 0 if early else activations.device
        host += base + _read_ahead(choice) + (0 if early else activations.host)
        new = Phase(name, held, host, flops, moved) if choice.on_gpu else Phase(name, 0, host + held, flops, moved)
        phases[name] = phases[name].joined(new) if name in phases else new

    embedding = min(work.tokens, shape.vocabulary) * shape.embedding_row
    first = shape.blocks[0]
    turning = piece_bytes(shape.vocabulary * shape.width) + embedding if work.rotate else 0
    add("copy", 0, {"single": outside_flops(shape)} if work.rotate else {}, host=CHUNK_BYTES + 2 * turning, early=True)
    first_loaded = first.weights + _converted(first) + (block_bytes(first) if work.rotate else 0)
    add("probe", first_loaded + shape.rest_loaded, {}, early=True)
    hidden = work.streams * work.rows * shape.seqlen * shape.width * shape.itemsize
    if work.streams:
        tables = min(choice.batch * shape.seqlen, shape.vocabulary) * shape.table_row
        around = embedding + tables + shape.rest_loaded + shape.around.at(choice.batch) + turning
        host = embedding + tables if choice.on_gpu else 0
        add("embed", around + first.calls.at(choice.batch), {}, 2 * hidden, host)
        if shape.of_tokens:  # computed again for every block, when it is loaded
            largest_block = max(block.weights + block.calls.at(choice.batch) for block in shape.blocks)
            add("embed", around + largest_block, {}, work.rows * shape.around.per_row * len(shape.blocks), host)
    for block in shape.blocks if work.survey else ():
        held = block.weights + _converted(block) + survey_bytes(shape, block, work, choice)
        beside = stream_bytes(shape, work) if choice.on_gpu and choice.tier == "host" else 0
        add("survey", held, {"products": survey_flops(shape, block, work)}, survey_moved(block), beside, early=True)
    costs: dict[tuple[int, tuple[QuantScheme | None, ...]], tuple[BlockCost, list[BankPhase]]] = {}
    output, largest, late = shape.rest_stored, shape.rest_stored, 0
    again = shape.rest_stored if work.gguf else 0
    for i, block in enumerate(shape.blocks):
        linears = [*block.linears, *(linear for bank in block.banks for linear in bank.linears)]
        schemes = {linear.name: work.scheme(f"{shape.path}.{i}.{linear.name}") for linear in linears}
        key = (id(block), tuple(schemes.values()))
        if key not in costs:
            found = BlockCost(shape, work, choice, block, {k: v for k, v in schemes.items() if v is not None})
            costs[key] = found, found.phases()
        cost, of_block = costs[key]
        turned = {"single": block_flops(block, shape.width)} if work.rotate else {}
        loaded = block.weights + _converted(block) + (block_bytes(block) if work.rotate else 0)
        add("load", loaded + late, turned, block.weights)
        if block.banks:
            add("probe", block.weights + late + max(proof_bytes(bank, shape.itemsize) for bank in block.banks), {})
        for name, held, flops, moved in of_block:
            add(name, held + late, flops, moved, cost.largest_packed if choice.on_gpu else 0)
        # With write-behind, a finished block stays in memory until the next one is finished too.
        late = cost.packed if choice.beside else 0
        output += cost.output
        largest = max(largest, cost.output)
        again += cost.blocks_of_gguf if work.gguf else 0
    scheme = work.scheme(shape.head.name) if work.lm_head and shape.head is not None else None
    if scheme is not None and shape.head is not None:
        for name, held, flops in head_phases(shape, shape.head, scheme, work, choice):
            add(name, held + late, flops, host=embedding if choice.on_gpu else 0)
        output += packed_bytes(shape.head, scheme) - shape.head.stored
        again += gguf_bytes(shape.head, scheme) - shape.head.stored if work.gguf else 0
    saved = 2 * (hidden + work.streams * work.rows * shape.handed_on) if choice.checkpoints else 0
    scratch = work.sharing.ranks * (activations.disk + saved)
    read = (shape.stored - shape.coded) * (1 + (work.survey > 0)) + embedding
    kept = kept_output(output, largest) if work.drop else output + again
    return Cost(phases=tuple(phases.values()), output=output + again, scratch=scratch, read=read, kept=kept)


def kept_output(output: int, largest: int) -> int:
    """Bytes of the output that are on the disk at a time with ``--push-drop``. largest: bytes of the largest unit's shards.

    Those that may wait for their upload, and those of a unit that is written while its own shards are read.
    """
    return min(output, max(WAITING_BYTES, WAITING_SHARDS * largest) + 2 * largest)


def _read_ahead(choice: Choice) -> int:
    """Host bytes for weights that are being read. With a GPU there is always a ring of pinned memory."""
    return max(choice.ahead, least_budget()) if choice.on_gpu else choice.ahead


def _converted(block: BlockShape) -> int:
    """Bytes of a stored tensor that are held in addition to the converted one on the computing device."""
    return block.largest_stored if block.stored != block.weights else 0


class BlockCost:
    """The phases of one block on the computing device, without the hidden states.

    packed: bytes of its packed Linears; largest_packed: of the largest one; output: of its shard; blocks_of_gguf: of its part of a GGUF
    file.
    """

    def __init__(self, shape: ModelShape, work: Work, choice: Choice, block: BlockShape, schemes: Mapping[str, QuantScheme]) -> None:
        self._shape, self._work, self._choice, self._block, self._schemes = shape, work, choice, block, schemes
        packed = [packed_bytes(linear, schemes[linear.name]) for linear in block.linears if linear.name in schemes]
        self.packed, self.largest_packed = sum(packed), max(packed, default=0)
        experts = [(bank.experts, linear) for bank in block.banks for linear in bank.linears]
        of_experts = sum(
            count * (packed_bytes(linear, schemes[linear.name]) if linear.name in schemes else linear.stored) for count, linear in experts
        )
        self.output = of_experts + self.packed + block.stored - sum(linear.stored for linear in block.linears if linear.name in schemes)
        kept = block.stored - sum(linear.stored for linear in block.linears if linear.name in schemes)
        self.blocks_of_gguf = kept + sum(gguf_bytes(linear, schemes[linear.name]) for linear in block.linears if linear.name in schemes)
        self._solving = SolvingTerms(schemes=schemes, hessians=work.hessians, calibrated=work.method.calibrated)
        self._batch = min(choice.batch, work.rows)
        self._tokens = work.rows * shape.seqlen
        self._paired = work.streams > 1

    def phases(self) -> list[tuple[str, int, dict[str, float], float]]:
        """(name, peak bytes, operations by kind, bytes moved); names may repeat."""
        result: list[tuple[str, int, dict[str, float], float]] = []
        if not self._work.streams:
            for linear in self._wanted(self._block.linears):
                weights = linear.m * linear.n
                needed = max(rounding_bytes(weights, self._choice), 2 * weights)  # or while it is packed
                result.append(("solve", self._block.weights + self.packed + needed, {}, 16 * weights))
            return result
        packed = originals = 0
        always = self._block.weights + self._block.calls.at(self._batch)
        if (scaling := self._work.method.scaling) is not None:
            terms = RowTerms(rows=self._work.rows, seqlen=self._shape.seqlen, batch=self._batch, on_gpu=self._choice.on_gpu)
            result += fold_phases(self._block, self._schemes, scaling, terms, always)
        for number, level in enumerate(self._levels()):
            wanted = [(g, self._wanted(g.linears)) for g in level]
            wanted = [(g, linears) for g, linears in wanted if linears]
            if not wanted:
                continue
            always += self._inputs_kept({linear.name for _, linears in wanted for linear in linears})
            sums = sum(self._sums(g) for g, _ in wanted)
            behind = sum(map(self._summed, [b for b in self._block.banks if self._work.true_sequential and b.level <= number]))
            held = always + behind + originals + packed
            deepest = max(g.level for g, _ in wanted)
            result.append(("replay", held + sums + self._capture(deepest, [g for g, _ in wanted]), self._replayed(deepest), 0))
            for group, linears in wanted:
                square = float(group.n) * group.n * self._work.hessians
                own = own_rows(linears, self._schemes, self._work.sharing)
                solved_rows, rows = (sum(linear.m for linear in each) for each in (own, linears))
                accumulated = {"hessian": self._tokens * self._work.collected(group.n) * (3 if self._paired else 1)}
                result.append(("hessian", held + sums + self._summing(group), accumulated, 0))
                factoring = factor_flops(group.n, self._work.sharing, on_gpu=self._choice.on_gpu) * self._work.hessians
                result.append(("factor", held + sums + self._factor(group, linears), {"single": factoring}, 0))
                solved = {"solve": (3 if self._paired else 1) * solved_rows * square + self._solving.swept(own)}
                solved["single"] = (2 * solved_rows * square if self._paired else 0.0) + self._solving.searched(own)
                moved = sum(self._solving.moved(linear) for linear in own)
                solving = max(self._solve(group, own), joining_bytes(linears, self._schemes, self._work.sharing))
                result.append(("solve", held + sums + solving, solved, moved))
                originals += self._paired * self._shape.itemsize * rows * group.n
                held = always + behind + originals + packed
                result.append(("pack", held + sums + self._pack(group, linears), {}, 6.0 * rows * group.n))
                until_packed = solved_bytes if self._work.tune_steps else packed_bytes
                packed += sum(until_packed(linear, self._schemes[linear.name]) for linear in linears)
                held = always + behind + originals + packed
                sums -= self._sums(group)
        summed = 0
        for bank in self._block.banks:
            result += self._bank(bank, always + summed + originals + packed)
            summed += self._summed(bank)
        unpacked = packed if self._work.tune_steps else 0  # the rows of the original model pass on before tuning
        result.append(("replay", always + summed + originals + unpacked + self._block.forward.at(self._batch), self._replayed(None), 0))
        return result + self._tuned(always, packed) if self._work.tune_steps else result

    def _tuned(self, held: int, solved: int) -> list[tuple[str, int, dict[str, float], float]]:
        """Tuning, and packing afterwards. held: bytes of the block. solved: of its Linears before they are packed."""
        linears = [(linear, self._schemes[linear.name]) for linear in self._wanted(self._block.linears)]
        terms = TuneTerms(
            steps=self._work.tune_steps,
            itemsize=self._shape.itemsize,
            width=self._shape.width,
            batch=self._batch * self._shape.seqlen,
            tokens=self._tokens,
            on_gpu=self._choice.on_gpu,
        )
        needed = self._block.forward.at(self._batch) + tune_bytes(linears, self._block.groups, terms)
        flops = {"products": tune_flops(self._block, self._block.attention / self._shape.seqlen, terms)}
        return [("tune", held + solved + needed, flops, 0), ("pack", held + solved + self.packed, {}, 0)]

    def _summed(self, bank: BankShape) -> int:
        """Bytes on the computing device of the sums of a bank's outputs in all models, which take as many as its inputs."""
        if self._choice.tier != ("gpu" if self._choice.on_gpu else "host"):
            return 0
        return self._work.streams * self._tokens * bank.inputs * self._shape.width * self._shape.itemsize

    def _bank(self, bank: BankShape, held: int) -> list[BankPhase]:
        """The phases of a bank. held: bytes of the rest of the block."""
        terms = BankTerms(
            schemes=self._schemes,
            tokens=self._tokens,
            streams=self._work.streams,
            itemsize=self._shape.itemsize,
            inputs=self._summed(bank),
            reach=self._block.forward.at(self._batch),
            beside=self._choice.beside,
            at_once=self._choice.experts_at_once or 1,
            sharing=self._work.sharing,
            on_gpu=self._choice.on_gpu,
            hessians=self._work.hessians,
            collected=self._work.collected,
            sums=self._sums,
            summing=self._summing,
            factor=self._factor,
            solve=self._solve,
            pack=self._pack,
            moved=self._solving.moved,
            swept=self._solving.swept,
            searched=self._solving.searched,
            packed=lambda linear: packed_bytes(linear, self._schemes[linear.name]),
            scaled=scales_inside(self._block, bank, self._work.method.scaling),
        )
        return bank_phases(bank, held, terms)

    def _inputs_kept(self, linears: set[str]) -> int:
        """Bytes on a GPU for inputs that are kept of these Linears.

        Buffers in host memory are there throughout the job (``row_bytes``), and on the GPU the batch in use and the one that is copied.
        """
        if not self._work.true_sequential or not self._choice.on_gpu:
            return 0
        rows = self._choice.kept_rows
        if self._choice.kept_tier == "host":
            rows = min(rows, 2 * self._batch)
        width = sum(memo.n for memo in self._block.memos if memo.last and memo.linear in linears)
        return self._work.streams * rows * self._shape.seqlen * width * self._shape.itemsize

    def _wanted(self, linears: list[LinearShape] | tuple[LinearShape, ...]) -> list[LinearShape]:
        return [linear for linear in linears if linear.name in self._schemes]

    def _levels(self) -> list[list[GroupShape]]:
        if not self._work.true_sequential:
            return [list(self._block.groups)]
        return [[g for g in self._block.groups if g.level == level] for level in range(len(self._block.reach))]

    def _capture(self, level: int, groups: list[GroupShape]) -> int:
        """Bytes of the forwards that feed a level's Hessians, of the input in the Hessian's precision, and of its copy without NaN."""
        reach = self._block.reach[level]
        tokens = min(CHUNK_TOKENS, self._batch * self._shape.seqlen)
        chunk = tokens * max(g.n for g in groups)
        widened = 0 if self._choice.on_gpu or self._shape.itemsize == FP32 else FP32 * chunk
        masked = self._shape.itemsize * chunk if self._work.on_nonfinite == "skip" else 0
        if not self._paired:
            return max(reach.peak.at(self._batch), reach.held.at(self._batch) + widened + masked)
        # The inputs in the original model stay while the block runs again. Then they are widened; their difference takes one more chunk.
        before = self._shape.itemsize * self._batch * self._shape.seqlen * sum(g.n for g in groups)
        widened = FP32 * chunk * (1 if self._shape.itemsize == FP32 else 2)
        masked = FP32 * chunk if self._work.on_nonfinite == "skip" else 0
        # The library's copies of both operands of the cross product: its inputs differ, so on a CPU it is no symmetric one.
        packed = 0 if self._choice.on_gpu else 2 * FP32 * chunk
        return before + max(reach.peak.at(self._batch), reach.held.at(self._batch) + widened + masked + packed)

    def _sums(self, group: GroupShape) -> int:
        """What is collected of a group's input. With two models, one buffer is for the cross matrix."""
        return FP32 * group.n * (self._work.streams * group.n if self._work.hessians else block_width(group.n))

    def _summing(self, group: GroupShape) -> int:
        """Bytes while what is collected of an input is added up over processes."""
        return summing_bytes(group.n, self._work.sharing, square=self._paired)

    def _factor(self, group: GroupShape, linears: list[LinearShape]) -> int:
        """In addition to the Hessian: the buffer of a permutation, or the panels; and a copy if schemes need separate factors."""
        if not self._work.hessians:
            return 0
        schemes = [self._schemes[linear.name] for linear in linears]
        square = group.n * group.n
        moved = min(piece(on_gpu=self._choice.on_gpu), square) if any(s.order != "natural" for s in schemes) else 0
        copied = square if len({(column_order(s, group.n), s.damping) for s in schemes}) > 1 else 0
        panels = panel_bytes(group.n, self._work.sharing, on_gpu=self._choice.on_gpu)
        return FP32 * (max(moved, 2 * panel_width(on_gpu=self._choice.on_gpu) * group.n) + copied) + panels

    def _solve(self, group: GroupShape, linears: list[LinearShape], at_once: int = 1) -> int:
        """In addition to the factor: see ``solver.gptq``. at_once: groups that are solved side by side; each is converted by itself."""
        n = group.n
        if not self._work.hessians:
            return max(rounding_bytes(linear.m * n, self._choice) for linear in linears)
        most = 0
        for scheme in {self._schemes[linear.name] for linear in linears}:
            rows = [linear.m for linear in linears if self._schemes[linear.name] == scheme]
            m, static = sum(rows), has_static_grids(scheme, n)
            panel = min(n, PANEL if static else max(PANEL, scheme.group_width(n)))
            buffers = 1 + (scheme.order != "natural") + 3 * (static and scheme.scales == "search")
            copies = max(buffers, CORRECTING) if self._paired else buffers
            converted = FP32 * min(piece(on_gpu=self._choice.on_gpu), n * max(rows)) * copies
            columns = panel + BLOCK + 3 * SUB_BLOCK * (not self._choice.on_gpu)
            loop = n * m + FP32 * (max(columns, SWEEPING * BLOCK * (scheme.sweeps > 0)) * m + 3 * BLOCK * n)
            held = FP32 * m * (n + 2 * (n // scheme.group_width(n)))
            loop += FP32 * n * m * (static and scheme.scales == "search")
            most = max(most, at_once * held + max(converted, at_once * loop))
        return most

    def _pack(self, group: GroupShape, linears: list[LinearShape]) -> int:
        """The codes of all Linears, and the new weight or words of one."""
        codes = group.n * sum(linear.m for linear in linears)
        return codes + max(group.n * linear.m * self._shape.itemsize for linear in linears)

    def _replayed(self, level: int | None) -> dict[str, float]:
        """Operations of one pass over the calibration rows: up to a level's inputs, or through the whole block."""
        level_of = {linear.name: group.level for group in self._block.groups for linear in group.linears}
        # The fractions of rows for which a Linear, and attention, are skipped. Attention comes after the first level.
        skipped: dict[str, float] = {}
        attention = 1.0 if level is None or level > 0 else 0.0
        for memo in self._block.memos:
            if memo.linear not in self._schemes or (level is not None and level_of[memo.linear] >= level):
                continue
            share = self._choice.kept_rows / self._work.rows if memo.last else float(self._choice.memo)
            skipped |= {name: share for name in memo.inside if not (memo.last and name == memo.linear)}
            if any(level_of.get(name) == 0 for name in memo.inside):
                attention = min(attention, 1 - share)
        run = [linear for linear in self._block.linears if level is None or level_of[linear.name] < level]
        products = 2.0 * self._tokens * sum(linear.m * linear.n * (1 - skipped.get(linear.name, 0)) for linear in run)
        return {"products": self._work.streams * (products + attention * self._work.rows * self._block.attention)}
