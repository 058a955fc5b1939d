"""The phases of a bank of experts: its experts are loaded, solved and run one after the other. Pure functions.

The terms follow ``solve.bank`` and ``units.experts``.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

from bigq.kernels.syrk import CHUNK_TOKENS
from bigq.sched.plan.shape import BankShape, GroupShape, LinearShape

#: Tokens of an expert that are computed at a time (``solve.bank``), and bytes of a group of packed experts (``units.experts``).
EXPERT_TOKENS, GROUP_BYTES = 8192, 2**30
#: Bytes of an fp32 number.
FP32 = 4

#: (name, peak bytes, operations by kind, bytes moved).
BankPhase = tuple[str, int, dict[str, float], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class BankTerms:
    """What the phases of a bank depend on besides its shape.

    schemes: names of Linears that are quantized. tokens: of all calibration rows. itemsize: bytes of an activation. reach: bytes of a
    forward up to the bank. beside: whether groups are written in the background. factor, solve, pack: bytes in addition to the Hessian,
    of Linears that share an input; packed: of one packed Linear.
    """

    schemes: Container[str]
    tokens: int
    itemsize: int
    reach: int
    beside: bool
    factor: Callable[[GroupShape, list[LinearShape]], int]
    solve: Callable[[GroupShape, list[LinearShape]], int]
    pack: Callable[[GroupShape, list[LinearShape]], int]
    packed: Callable[[LinearShape], int]


def bank_phases(bank: BankShape, held: int, terms: BankTerms) -> list[BankPhase]:
    """held: bytes of the rest of the block."""
    routed = float(terms.tokens) * bank.chosen
    weights = sum(linear.m * linear.n for linear in bank.linears)
    # An expert, and the choices of all tokens: two numbers of 8 bytes at most.
    held += weights * terms.itemsize + 16 * int(routed)
    tokens = int(min(EXPERT_TOKENS, routed))
    # The inputs of a product, what it returns, and what becomes of that. A part of the inputs is converted for the Hessian.
    widths = [(product[0].n, sum(linear.m for linear in product)) for product in bank.products]
    running = tokens * max(n + 3 * m for n, m in widths) * terms.itemsize + FP32 * min(tokens, CHUNK_TOKENS) * max(n for n, _ in widths)
    solved = all(linear.name in terms.schemes for linear in bank.linears)
    # All products but the last run once more, for the inputs of those after them.
    repeated = sum(linear.m * linear.n for product in bank.products[:-1] for linear in product) if solved else 0
    moved = float(bank.experts * weights * terms.itemsize)
    result: list[BankPhase] = [
        ("load", held + max(linear.stored for linear in bank.linears), {}, moved),
        ("replay", held + max(running, terms.reach), {"products": 2.0 * routed * (weights + repeated)}, 0),
    ]
    if not solved:
        return result
    expert = sum(terms.packed(linear) for linear in bank.linears)
    held += min(bank.experts * expert, max(GROUP_BYTES, expert)) * (1 + terms.beside)
    for product in bank.products:
        group, linears = GroupShape(product, bank.level), list(product)
        rows, square = sum(linear.m for linear in product), float(group.n) * group.n
        hessian = FP32 * group.n * group.n
        result += [
            ("hessian", held + hessian + running, {"hessian": routed * square}, 0),
            ("factor", held + hessian + terms.factor(group, linears), {"single": bank.experts * group.n * square / 3}, 0),
            (
                "solve",
                held + hessian + terms.solve(group, linears),
                {"solve": bank.experts * rows * square},
                14.0 * bank.experts * rows * group.n,
            ),
            ("pack", held + terms.pack(group, linears), {}, 6.0 * bank.experts * rows * group.n),
        ]
    return result
