"""What the processes of a job exchange, by phase. Pure functions.

The terms follow ``solve.shared`` and ``machine.process_group``. What fits into one message of JSON is not counted: numbers of tokens,
losses, whether to stop.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from bigq.kernels.cholesky import panel_width
from bigq.sched.plan.costs.bank import group_of
from bigq.sched.plan.costs.fold import scales_inside, used_folds
from bigq.sched.plan.costs.head import chunks
from bigq.sched.plan.costs.ranks import batches, by_rows, is_shared, result_bytes, solved_together
from bigq.sched.plan.shape import BankShape, BlockShape, GroupShape, LinearShape, ModelShape
from bigq.sched.plan.sharing import Sharing, Traffic, dealt_triangles, factored, joined, summed, summed_triangle
from bigq.sched.plan.work import Choice, Work
from bigq.scheme import QuantScheme
from bigq.solver.gptq import column_order
from bigq.solver.input_products import block_width
from bigq.solver.scaling import SAMPLED_TOKENS

#: Codes, scales and zero points.
TENSORS = 3

Schemes = Mapping[str, QuantScheme]


def job_traffic(shape: ModelShape, work: Work, choice: Choice) -> dict[str, Traffic]:
    """What one process receives from the others in a whole job, by phase; empty for a job of one process."""
    if work.sharing.ranks == 1:
        return {}
    total: dict[str, Traffic] = defaultdict(Traffic)
    known: dict[tuple[int, tuple[QuantScheme | None, ...]], dict[str, Traffic]] = {}
    for i, block in enumerate(shape.blocks):
        names = [linear.name for linear in (*block.linears, *(linear for bank in block.banks for linear in bank.linears))]
        found = {name: work.scheme(f"{shape.path}.{i}.{name}") for name in names}
        key = id(block), tuple(found.values())
        if key not in known:
            schemes = {name: scheme for name, scheme in found.items() if scheme is not None}
            known[key] = _of_block(block, schemes, work, choice, work.rows * shape.seqlen)
        for phase, traffic in known[key].items():
            total[phase] += traffic
    scheme = work.scheme(shape.head.name) if work.lm_head and shape.head is not None else None
    if shape.head is not None and scheme is not None:
        for phase, traffic in _of_head(shape.head, scheme, work, choice).items():
            total[phase] += traffic
    return {phase: traffic for phase, traffic in total.items() if traffic.operations}


def _of_block(block: BlockShape, schemes: Schemes, work: Work, choice: Choice, tokens: int) -> dict[str, Traffic]:
    """tokens: of one process."""
    total: dict[str, Traffic] = defaultdict(Traffic)
    scaling = work.method.scaling
    if scaling is not None:
        total["scale"] = sum(
            (_scaled(fold.n, fold.scales, tokens, work.sharing) for fold in used_folds(block, schemes, scaling)), Traffic()
        )
    for group in block.groups:
        linears = [linear for linear in group.linears if linear.name in schemes]
        if not linears:
            continue
        total["hessian"] += _sums(group, work)
        if work.hessians and is_shared(group.n, work.sharing):
            factors = len({(column_order(schemes[linear.name], group.n), schemes[linear.name].damping) for linear in linears})
            total["factor"] += factored(group.n, panel_width(on_gpu=choice.on_gpu), work.sharing).times(factors)
        for scheme, alike in solved_together(linears, schemes):
            if by_rows(alike, scheme, work.sharing):
                for linear in alike:
                    total["solve"] += joined(linear.m, result_bytes(linear, scheme), TENSORS, work.sharing)
    for bank in block.banks:
        if all(linear.name in schemes for linear in bank.linears):
            _add_bank(total, bank, schemes, work, choice)
            if scales_inside(block, bank, scaling):
                n, routed = bank.products[-1][0].n, tokens * bank.chosen // bank.experts
                total["scale"] += _scaled(n, n, routed, work.sharing).times(bank.experts)
    return total


def _add_bank(total: dict[str, Traffic], bank: BankShape, schemes: Schemes, work: Work, choice: Choice) -> None:
    """As if tokens were routed to each expert."""
    sizes = batches(bank.experts, group_of(bank), min(choice.experts_at_once or 1, bank.experts))
    for product in bank.products:
        group, scheme = GroupShape(product, bank.level), schemes[product[0].name]
        if scheme.grid.settles:
            total["hessian"] += _sums(group, work).times(bank.experts)
            continue
        for size in sizes:
            alone = work.streams > 1 or size == 1 or not work.hessians  # solved one by one, and so added up
            total["hessian"] += _sums(group, work).times(size) if alone else dealt_triangles(size, group.n, work.sharing)
            for linear in product:
                total["solve"] += joined(size, linear.m * result_bytes(linear, scheme), TENSORS, work.sharing)


def _of_head(head: LinearShape, scheme: QuantScheme, work: Work, choice: Choice) -> dict[str, Traffic]:
    """The output head is solved in chunks of rows. Methods of two models solve it with the Hessian alone."""
    parts: dict[str, Traffic] = defaultdict(Traffic, hessian=_sum(head.n, work))
    if work.hessians and is_shared(head.n, work.sharing):
        parts["factor"] = factored(head.n, panel_width(on_gpu=choice.on_gpu), work.sharing)
    for rows, count in chunks(head):
        if rows >= work.sharing.ranks and not scheme.grid.settles:
            parts["solve"] += joined(rows, result_bytes(head, scheme), TENSORS, work.sharing).times(count)
    return parts


def _scaled(n: int, scales: int, tokens: int, sharing: Sharing) -> Traffic:
    """Of sums, largest values and sampled tokens of an input that is scaled, and of its scales. tokens: of one process."""
    step = max(1, -(-tokens * sharing.ranks // SAMPLED_TOKENS))
    sampled = Traffic((sharing.ranks - 1) * -(-tokens // step) * 4 * n, 1)
    return summed(n, sharing) + joined(sharing.ranks, 4 * n, 1, sharing) + sampled + summed(scales, sharing)


def _sums(group: GroupShape, work: Work) -> Traffic:
    """Of the Hessian of an input, and of the cross matrix where there are two models."""
    return _sum(group.n, work) + summed(group.n * group.n, work.sharing).times(work.streams - 1)


def _sum(n: int, work: Work) -> Traffic:
    """Of a Hessian, or of products of neighbouring inputs."""
    return summed_triangle(n, work.sharing) if work.hessians else summed(n * block_width(n), work.sharing)
