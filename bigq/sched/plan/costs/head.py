"""The memory and arithmetic of quantizing the output head. Pure functions."""

from __future__ import annotations

import dataclasses

from bigq.kernels.cholesky import panel_width
from bigq.kernels.pick import piece
from bigq.sched.plan.costs.ranks import by_rows, factor_flops, joining_bytes, panel_bytes, summing_bytes
from bigq.sched.plan.shape import LinearShape, ModelShape, packed_bytes
from bigq.sched.plan.work import Choice, Work
from bigq.scheme import QuantScheme
from bigq.solver.gptq import PANEL

#: Weights of the output head that are solved at a time (``solve.head``).
HEAD_CHUNK = 2**26

#: Bytes of an fp32 number.
FP32 = 4


def head_phases(
    shape: ModelShape, head: LinearShape, scheme: QuantScheme, work: Work, choice: Choice
) -> list[tuple[str, int, dict[str, float]]]:
    """(name, peak bytes, operations) of quantizing the output head: see ``solve.head``."""
    sharing, schemes = work.sharing, {head.name: scheme}
    weight, codes = shape.itemsize * head.m * head.n + (head.stored if work.rotate else 0), head.m * head.n
    (chunk, _), *_ = chunks(head)
    rows = sharing.part(chunk) if by_rows([head], scheme, sharing) else chunk
    solving = (
        FP32 * rows * (3 * head.n if not work.streams or scheme.order == "activation" or scheme.scales == "search" else 2 * head.n + PANEL)
    )
    packing = 2 * codes + packed_bytes(head, scheme)
    if not work.streams:
        return [("solve", weight + max(codes + solving, packing), {})]
    square = FP32 * head.n * head.n
    tokens = min(choice.batch, work.rows) * shape.seqlen
    capture = tokens * head.n * (4 * shape.itemsize + FP32) + shape.rest_loaded
    permuted = min(piece(on_gpu=choice.on_gpu), square // FP32) if scheme.order != "natural" else 0
    factor = FP32 * max(permuted, 2 * panel_width(on_gpu=choice.on_gpu) * head.n) + panel_bytes(head.n, sharing, on_gpu=choice.on_gpu)
    factor = max(factor, summing_bytes(head.n * head.n, sharing))
    joining = joining_bytes([dataclasses.replace(head, m=chunk)], schemes, sharing)
    return [
        ("replay", square + capture, {"hessian": float(work.rows * shape.seqlen) * head.n * head.n}),
        ("factor", square + factor, {"single": factor_flops(head.n, sharing, on_gpu=choice.on_gpu)}),
        (
            "solve",
            square + weight + max(codes + max(solving, joining), packing),
            {"solve": float(rows) * head.m / chunk * head.n * head.n},
        ),
    ]


def chunks(head: LinearShape) -> list[tuple[int, int]]:
    """The rows that are solved at a time, and how often; the rest."""
    rows = min(head.m, max(1, HEAD_CHUNK // head.n))
    return [(rows, head.m // rows), *([(rest, 1)] if (rest := head.m % rows) else [])]
