"""The shape of a model as plain numbers: the input of a plan."""

from __future__ import annotations

from dataclasses import dataclass

from bigq.methods.base import Divider
from bigq.scheme import QuantScheme


@dataclass(frozen=True, slots=True)
class Rows:
    """A quantity that grows with the rows in a batch: ``fixed + per_row · rows``."""

    fixed: float
    per_row: float

    def at(self, rows: int) -> int:
        return max(0, round(self.fixed + self.per_row * rows))

    @classmethod
    def through(cls, one: float, two: float) -> Rows:
        """The line through the values for one row and for two."""
        return cls(2 * one - two, two - one)


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A Linear [m outputs, n inputs], by its name in the block. stored: bytes of its weight in the checkpoint."""

    name: str
    m: int
    n: int
    stored: int


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Linears that share an input, and the level at which they are solved."""

    linears: tuple[LinearShape, ...]
    level: int

    @property
    def n(self) -> int:
        return self.linears[0].n


@dataclass(frozen=True, slots=True)
class MemoShape:
    """A module with a shortcut: it need not run again once ``linear`` (n inputs, m outputs) is solved. inside: all its Linears.

    last: whether ``linear`` is at the deepest level (see ``Shortcut``): its inputs are kept, otherwise its outputs.
    """

    linear: str
    m: int
    n: int
    inside: tuple[str, ...]
    last: bool = False


@dataclass(frozen=True, slots=True)
class FoldShape:
    """Modules of a block, by their names in it, that read an input of n features which ``producer`` can divide (``model.folding``).

    scales: how many there are; heads that share their values share scales. divider: what the producer is. Inside experts of ``bank``,
    producer and readers are its parameters.
    """

    producer: str
    readers: tuple[str, ...]
    n: int
    scales: int
    divider: Divider = "linear"
    bank: str | None = None


@dataclass(frozen=True, slots=True)
class LeftShape:
    """A parameter of a block that stays unquantized, by its name in the block, or its module's. size: elements.

    why: the predicate of a sentence about it, such as "chooses experts". linear: whether it is the weight of a Linear.
    """

    name: str
    size: int
    why: str
    linear: bool


@dataclass(frozen=True, slots=True)
class Reach:
    """Bytes of a forward up to the inputs of a level's Linears, in addition to weights and hidden states.

    peak: the maximum up to there. held: the bytes still held there.
    """

    peak: Rows
    held: Rows


@dataclass(frozen=True, slots=True)
class BankShape:
    """A bank of experts. chosen: experts of each token. inputs: different inputs that they have of a token, in
    widths of the hidden states. level: see ``BankPlace``.

    products: of one expert, in order; each is the Linears that are stored as one weight, by their names in the block.
    whole: whether the source holds one tensor for all experts.
    """

    name: str
    experts: int
    chosen: int
    level: int
    products: tuple[tuple[LinearShape, ...], ...]
    whole: bool = False
    inputs: int = 1

    @property
    def linears(self) -> list[LinearShape]:
        """Those of one expert."""
        return [linear for product in self.products for linear in product]


@dataclass(frozen=True, slots=True)
class BlockShape:
    """One kind of block.

    groups: in order of execution. reach: by level. forward: bytes that a whole forward needs. calls: bytes of masks and tables
    among its arguments. weights: bytes of its parameters in the compute dtype; stored: in the checkpoint; largest_stored:
    of the largest tensor. attention: floating-point operations per row that are not a Linear's. Experts count in ``banks`` alone.
    left: what is no vector and stays unquantized in every job.
    folds: where scales may be folded, if the method does so; unfolded: whose inputs no module divides.
    """

    groups: tuple[GroupShape, ...]
    reach: tuple[Reach, ...]
    forward: Rows
    calls: Rows
    memos: tuple[MemoShape, ...]
    weights: int
    stored: int
    largest_stored: int
    attention: float
    banks: tuple[BankShape, ...] = ()
    left: tuple[LeftShape, ...] = ()
    folds: tuple[FoldShape, ...] = ()
    unfolded: tuple[str, ...] = ()

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts in the checkpoint."""
        return sum(bank.experts * linear.stored for bank in self.banks for linear in bank.linears)

    @property
    def linears(self) -> list[LinearShape]:
        return [linear for group in self.groups for linear in group.linears]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model to be quantized.

    path: of the list of blocks. blocks: one by one (blocks of a kind share one object). seqlen: tokens per row of the survey.
    width: of the hidden states; itemsize: bytes of an element in the compute dtype. vocabulary: rows of the embedding;
    embedding_row: bytes of one in the checkpoint. rest_stored: bytes of all tensors outside the blocks; rest_loaded: of those that
    an embedding pass needs besides the embedding. coded: how many bytes of all tensors are not in files, because weights are decoded.
    head: the output head, by its module name, if it is a Linear with its own weight. handed_on: bytes per row of what blocks hand on
    besides hidden states. of_tokens: bytes per row of the arguments that a block takes and that are computed from tokens (the largest
    of all blocks); around: bytes that computing those of all blocks needs. table_row: bytes of a token in the checkpoint in tables other
    than the embedding that are read by rows.
    family: the model type of its config. transposed: whether Linears are stored transposed (GPT-2).
    """

    path: str
    blocks: tuple[BlockShape, ...]
    seqlen: int
    width: int
    itemsize: int
    vocabulary: int
    embedding_row: int
    rest_stored: int
    rest_loaded: int
    coded: int = 0
    head: LinearShape | None = None
    handed_on: int = 0
    of_tokens: int = 0
    around: Rows = Rows(0, 0)
    table_row: int = 0
    family: str | None = None
    transposed: bool = False

    def linear_names(self) -> list[str]:
        """Module names of the Linears in blocks, in order."""
        return [f"{self.path}.{i}.{linear.name}" for i, block in enumerate(self.blocks) for linear in block.linears]

    def experts(self) -> dict[str, int]:
        """The Linears of the first expert of each bank by module name, and how many experts have such a one."""
        return {
            f"{self.path}.{i}.{linear.name}": bank.experts
            for i, block in enumerate(self.blocks)
            for bank in block.banks
            for linear in bank.linears
        }

    @property
    def stored(self) -> int:
        return self.rest_stored + sum(block.stored + block.expert_bytes for block in self.blocks)


def packed_bytes(linear: LinearShape, scheme: QuantScheme) -> int:
    """Bytes of a packed Linear: codes, zeros, fp16 scales, int32 group indices."""
    groups = linear.n // scheme.group_width(linear.n)
    return linear.m * linear.n * scheme.bits // 8 + groups * linear.m * scheme.bits // 8 + 2 * groups * linear.m + 4 * linear.n


def gguf_bytes(linear: LinearShape, scheme: QuantScheme) -> int:
    """Bytes of a Linear in blocks of 32 weights, each with its scale and, if asymmetric, its minimum."""
    return linear.m * -(-linear.n // 32) * (scheme.bits * 4 + (2 if scheme.symmetric else 4))
