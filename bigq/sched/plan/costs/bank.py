"""The phases of a bank of experts: its experts are loaded, solved and run one after the other. Pure functions.

The terms follow ``solve.bank`` and ``units.experts``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bigq.kernels.syrk import CHUNK_TOKENS
from bigq.sched.plan.costs.fold import inside_phase
from bigq.sched.plan.costs.ranks import batches, dealing_bytes, dealt, gathering_bytes
from bigq.sched.plan.shape import BankShape, GroupShape, LinearShape, ModelShape
from bigq.sched.plan.sharing import Sharing
from bigq.scheme import QuantScheme

#: Tokens of an expert that are computed at a time (``solve.bank``), and weights in a group of packed experts (``units.experts``).
EXPERT_TOKENS, GROUP_WEIGHTS = 8192, 2 * 10**9
#: Experts of a token, and more than those, in the proof that a bank's experts can run one by one (``model.experts.proof``).
PROVEN_SLOTS, PROVEN_MORE = 4, 2
#: Bytes of an fp32 number.
FP32 = 4
#: Bytes of a token's choice of an expert: two numbers of 8 bytes at most, and one that sorts the tokens by expert.
CHOICE = 24
#: Experts that a process solves side by side on a GPU, and bytes that they may take. More would gain little: eight of DeepSeek-V3's fill
#: one.
AT_ONCE, AT_ONCE_BYTES = 8, 4 * 2**30

#: Steps in which the tokens of an expert are counted (``solve.bank``), and bytes that oneDNN keeps of a bf16 product for each number of
#: tokens: about 300 kB were measured, for 64 experts of 512 × 256.
STEP_TOKENS, COMPILED = 64, 300_000

#: (name, peak bytes, operations by kind, bytes moved).
BankPhase = tuple[str, int, dict[str, float], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class BankTerms:
    """What the phases of a bank depend on besides its shape.

    schemes: of the Linears that are quantized, by name. tokens: of all calibration rows. streams: models that they pass through.
    itemsize: bytes of an activation. inputs: bytes of a bank's inputs in these models on the computing device, if they are there; the sums
    of its outputs take as many. reach: bytes of a forward up to the bank. beside: whether groups are written in the background. at_once:
    experts that are solved side by side. sharing, hessians, collected: see ``Work``. sums: bytes of what is collected of an input;
    summing: while it is added up over processes. factor, solve, pack: bytes in addition to it, of Linears that share an input, solve for
    so many experts; packed: of one packed Linear; moved: read and written to solve it. swept, searched: operations of sweeps, and of the
    search for grids. scaled: whether scales are folded inside experts.
    """

    schemes: Mapping[str, QuantScheme]
    tokens: int
    streams: int
    itemsize: int
    inputs: int
    reach: int
    beside: bool
    at_once: int
    sharing: Sharing
    on_gpu: bool
    hessians: bool
    collected: Callable[[int], float]
    sums: Callable[[GroupShape], int]
    summing: Callable[[GroupShape], int]
    factor: Callable[[GroupShape, list[LinearShape]], int]
    solve: Callable[[GroupShape, list[LinearShape], int], int]
    pack: Callable[[GroupShape, list[LinearShape]], int]
    packed: Callable[[LinearShape], int]
    moved: Callable[[LinearShape], float]
    swept: Callable[[Sequence[LinearShape]], float]
    searched: Callable[[Sequence[LinearShape]], float]
    scaled: bool = False


def numbers_at_once(shape: ModelShape | None, given: int | None, ranks: int = 1, *, on_gpu: bool) -> list[int | None]:
    """Numbers of experts that may be solved side by side, the largest first. given: by the user. shape: None for jobs that solve nothing.
    ranks: processes that share them.

    On a CPU several take as long as one after the other.
    """
    banks = {bank for block in shape.blocks for bank in block.banks} if shape is not None else set()
    if shape is None or not banks:
        return [None]
    if given is not None or not on_gpu:
        return [given]
    most = max(
        1, min(ranks * AT_ONCE, *(min(bank.experts, ranks * AT_ONCE_BYTES // _bytes_at_once(bank, shape.itemsize)) for bank in banks))
    )
    return [most >> i for i in range(most.bit_length())]


def _bytes_at_once(bank: BankShape, itemsize: int) -> int:
    """About the bytes of an expert that is solved: its weights, and for one product the Hessian, the weight in fp32 and its codes."""
    products = [(product[0].n, sum(linear.m for linear in product)) for product in bank.products]
    return itemsize * sum(n * m for n, m in products) + max(FP32 * n * n + (FP32 + 1) * n * m for n, m in products)


def bank_phases(bank: BankShape, held: int, terms: BankTerms) -> list[BankPhase]:
    """held: bytes of the rest of the block."""
    routed = float(terms.tokens) * bank.chosen
    weights = _weights(bank)
    expert = weights * terms.itemsize
    held += terms.inputs + terms.streams * CHOICE * int(routed)
    if not terms.on_gpu and terms.itemsize < FP32:
        held += COMPILED * len(bank.products) * min(bank.experts, EXPERT_TOKENS // STEP_TOKENS)
    reached = held + terms.reach
    solved = all(linear.name in terms.schemes for linear in bank.linears)
    at_once = min(terms.at_once, bank.experts) if solved else 1
    paired = terms.streams > 1
    # Unsolved experts are the same in both models.
    held += terms.inputs + at_once * expert * (terms.streams if solved else 1)
    running = _running(bank, terms)
    inside = sum(linear.m * linear.n for product in bank.products[:-1] for linear in product)
    # With more tokens than are computed at a time, all products but the last run once more, for the inputs of those after them.
    repeated = inside if solved and routed / bank.experts > EXPERT_TOKENS else 0
    # In the unquantized model an expert runs on its tokens there, and on those of the quantized model up to the last product.
    again = weights + solved * inside if paired else 0
    # So that its last inputs are known before anything is solved.
    scaled = inside if solved and terms.scaled else 0
    replayed = {"products": 2.0 * routed * (weights + repeated + again + scaled)}
    # The codes of the expert before stay until the next one is complete. Matrices are read one by one, then joined.
    before = solved * weights + max(sum(linear.stored for linear in product) for product in bank.products)
    moved = float(bank.experts * weights * terms.itemsize)
    if not solved:
        return [("load", held + before, {}, moved), ("replay", max(reached, held + running), replayed, 0)]
    of_group = group_of(bank)
    of_bank = [terms.schemes[linear.name] for linear in bank.linears]
    own, solving_here = dealt(at_once, terms.sharing, of_bank), own_experts(bank, at_once, terms.sharing, of_bank)
    held += of_group * sum(terms.packed(linear) for linear in bank.linears) * (1 + terms.beside)
    result: list[BankPhase] = [("load", held + before, {}, moved), ("replay", max(reached, held + running), replayed, 0)]
    # The last tokens whose inputs were computed stay, and so does what the products before returned.
    kept = _at_a_time(terms) * bank.products[0][0].n * terms.itemsize * terms.streams
    if scaled:
        # Buffers of these sizes leave holes in a CPU's heap: 20 to 70 MB were measured beside 140 MB while an expert runs.
        holes = 0 if terms.on_gpu else running // 3
        result.append(inside_phase(bank.experts, bank.products[-1], held + running + holes + at_once * kept, on_gpu=terms.on_gpu))
    for product in bank.products:
        group, linears = GroupShape(product, bank.level), list(product)
        rows, square = sum(linear.m for linear in product), float(group.n) * group.n * terms.hessians
        sums = terms.sums(group)
        waiting = held + at_once * (sums + kept)
        # One expert runs; what the others of its batch have computed stays, and in the other model its own.
        others = (at_once - 1 + (terms.streams - 1) / terms.streams) * kept
        solving = {"solve": solving_here * ((3 if paired else 1) * rows * square + terms.swept(linears))}
        solving["single"] = solving_here * ((2.0 * rows * square if paired else 0.0) + terms.searched(linears))
        summing = max(terms.summing(group), dealing_bytes(at_once, group.n, terms.sharing))
        gathering = gathering_bytes(linears, terms.schemes, at_once, own, terms.sharing)
        accumulated = {"hessian": routed * terms.collected(group.n) * (3 if paired else 1)}
        result += [
            (
                "hessian",
                held + at_once * sums + max(running, summing) + int(others),
                accumulated,
                0,
            ),
            ("factor", waiting + own * terms.factor(group, linears), {"single": solving_here * group.n * square / 3}, 0),
            ("solve", waiting + max(terms.solve(group, linears, own), gathering), solving, solving_here * sum(map(terms.moved, linears))),
            ("pack", held + terms.pack(group, linears), {}, 6.0 * bank.experts * rows * group.n),
        ]
        held += at_once * rows * group.n  # its codes
        kept += _at_a_time(terms) * rows * terms.itemsize * terms.streams
    return result


def group_of(bank: BankShape) -> int:
    """How many experts a shard holds."""
    return min(bank.experts, max(1, GROUP_WEIGHTS // _weights(bank)))


def own_experts(bank: BankShape, at_once: int, sharing: Sharing, schemes: Sequence[QuantScheme]) -> int:
    """How many of a bank's experts the process solves that has most to do: of each batch, its share."""
    return sum(dealt(count, sharing, schemes) for count in batches(bank.experts, group_of(bank), at_once))


def proof_bytes(bank: BankShape, itemsize: int) -> int:
    """Bytes of the first few experts, one by one and joined."""
    return 2 * min(bank.experts, min(bank.chosen, PROVEN_SLOTS) + PROVEN_MORE) * _weights(bank) * itemsize


def _weights(bank: BankShape) -> int:
    """The weights of one expert."""
    return sum(linear.m * linear.n for linear in bank.linears)


def _at_a_time(terms: BankTerms) -> int:
    """The most tokens that an expert takes at a time."""
    return min(EXPERT_TOKENS, terms.tokens)


def running_bytes(bank: BankShape, tokens: int, itemsize: int) -> int:
    """Bytes while an expert runs on so many tokens.

    The tokens, a copy and the sum that the expert returns; what all products but the last return, and what becomes of that; the output,
    and its product with the weight of the expert.
    """
    products = [(product[0].n, sum(linear.m for linear in product)) for product in bank.products]
    first, last = products[0], products[-1]
    inside = sum(linear.m for product in bank.products[:-1] for linear in product)
    return tokens * itemsize * (3 * first[0] + inside + max(inside, last[0] + 2 * last[1]))


def _running(bank: BankShape, terms: BankTerms) -> int:
    """Bytes while an expert runs on as many tokens as it takes at a time, and its input is added to a Hessian."""
    tokens = _at_a_time(terms)
    widest = max(bank.products[0][0].n, bank.products[-1][0].n)
    running = running_bytes(bank, tokens, terms.itemsize)
    # 16-bit inputs become fp32 for the Hessian on a CPU.
    chunk = FP32 * min(tokens, CHUNK_TOKENS) * widest
    narrow = terms.itemsize < FP32
    if terms.streams < 2:
        return running + (chunk if narrow and not terms.on_gpu else 0)
    # The input in the unquantized model; then the difference, the other input in fp32, and on a CPU the library's copies of both.
    return running + tokens * widest * terms.itemsize + chunk * (1 + narrow + 2 * (not terms.on_gpu))
