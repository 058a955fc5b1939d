"""The phases of a bank of experts: its experts are loaded, solved and run one after the other, or a few at a time. Pure functions.

The terms follow ``solve.bank`` and ``units.experts``.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

from bigq.kernels.syrk import CHUNK_TOKENS
from bigq.sched.plan.shape import BankShape, GroupShape, LinearShape, ModelShape

#: Tokens of an expert that are computed at a time (``solve.bank``), and bytes of a group of packed experts (``units.experts``).
EXPERT_TOKENS, GROUP_BYTES = 8192, 2**30
#: Bytes of an fp32 number.
FP32 = 4
#: Experts that a GPU solves side by side, and bytes that they may take. More would gain little: eight of DeepSeek-V3's fill a GPU.
AT_ONCE, AT_ONCE_BYTES = 8, 4 * 2**30

#: (name, peak bytes, operations by kind, bytes moved).
BankPhase = tuple[str, int, dict[str, float], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class BankTerms:
    """What the phases of a bank depend on besides its shape.

    schemes: names of Linears that are quantized. tokens: of all calibration rows. itemsize: bytes of an activation. reach: bytes of a
    forward up to the bank. beside: whether groups are written in the background. at_once: experts that are solved side by side.
    factor, solve, pack: bytes in addition to the Hessian, of Linears that share an input, solve for so many experts; packed: of one packed
    Linear.
    """

    schemes: Container[str]
    tokens: int
    itemsize: int
    reach: int
    beside: bool
    at_once: int
    factor: Callable[[GroupShape, list[LinearShape]], int]
    solve: Callable[[GroupShape, list[LinearShape], int], int]
    pack: Callable[[GroupShape, list[LinearShape]], int]
    packed: Callable[[LinearShape], int]


def numbers_at_once(shape: ModelShape | None, given: int | None, *, on_gpu: bool) -> list[int | None]:
    """Numbers of experts that may be solved side by side, the largest first. given: by the user. shape: None for jobs that solve nothing.

    On a CPU several take as long as one after the other.
    """
    banks = {bank for block in shape.blocks for bank in block.banks} if shape is not None else set()
    if shape is None or not banks:
        return [None]
    if given is not None or not on_gpu:
        return [given]
    most = max(1, min(AT_ONCE, *(min(bank.experts, AT_ONCE_BYTES // _bytes_at_once(bank, shape.itemsize)) for bank in banks)))
    return [most >> i for i in range(most.bit_length())]


def _bytes_at_once(bank: BankShape, itemsize: int) -> int:
    """About the bytes of an expert that is solved: its weights, and for one product the Hessian, the weight in fp32 and its codes."""
    products = [(product[0].n, sum(linear.m for linear in product)) for product in bank.products]
    return itemsize * sum(n * m for n, m in products) + max(FP32 * n * n + (FP32 + 1) * n * m for n, m in products)


def bank_phases(bank: BankShape, held: int, terms: BankTerms) -> list[BankPhase]:
    """held: bytes of the rest of the block."""
    routed = float(terms.tokens) * bank.chosen
    weights = sum(linear.m * linear.n for linear in bank.linears)
    solved = all(linear.name in terms.schemes for linear in bank.linears)
    at_once = min(terms.at_once, bank.experts) if solved else 1
    # Experts, and the choices of all tokens: two numbers of 8 bytes at most.
    held += at_once * weights * terms.itemsize + 16 * int(routed)
    tokens = int(min(EXPERT_TOKENS, routed))
    # The inputs of a product, what it returns, and what becomes of that. A part of the inputs is converted for the Hessian.
    widths = [(product[0].n, sum(linear.m for linear in product)) for product in bank.products]
    running = tokens * max(n + 3 * m for n, m in widths) * terms.itemsize + FP32 * min(tokens, CHUNK_TOKENS) * max(n for n, _ in widths)
    # With more tokens than are computed at a time, all products but the last run once more, for the inputs of those after them.
    repeated = 0
    if solved and routed / bank.experts > EXPERT_TOKENS:
        repeated = sum(linear.m * linear.n for product in bank.products[:-1] for linear in product)
    moved = float(bank.experts * weights * terms.itemsize)
    result: list[BankPhase] = [
        ("load", held + max(linear.stored for linear in bank.linears), {}, moved),
        ("replay", held + max(running, terms.reach), {"products": 2.0 * routed * (weights + repeated)}, 0),
    ]
    if not solved:
        return result
    expert = sum(terms.packed(linear) for linear in bank.linears)
    held += min(bank.experts * expert, max(GROUP_BYTES, expert)) * (1 + terms.beside)
    # Until an expert has run, its inputs are kept, and what its products return for them.
    held += at_once * tokens * widths[0][0] * terms.itemsize
    for product in bank.products:
        group, linears = GroupShape(product, bank.level), list(product)
        rows, square = sum(linear.m for linear in product), float(group.n) * group.n
        hessian = FP32 * group.n * group.n
        result += [
            ("hessian", held + at_once * hessian + running, {"hessian": routed * square}, 0),
            ("factor", held + at_once * (hessian + terms.factor(group, linears)), {"single": bank.experts * group.n * square / 3}, 0),
            (
                "solve",
                held + at_once * hessian + terms.solve(group, linears, at_once),
                {"solve": bank.experts * rows * square},
                14.0 * bank.experts * rows * group.n,
            ),
            ("pack", held + terms.pack(group, linears) + (at_once - 1) * rows * group.n, {}, 6.0 * bank.experts * rows * group.n),
        ]
        held += (at_once - 1) * rows * group.n  # codes of the others wait until all are solved
        held += at_once * tokens * rows * terms.itemsize
    return result
