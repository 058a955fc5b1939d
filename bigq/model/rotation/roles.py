"""What the weights of a model have to do with its residual stream, and how each is turned, by the names of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bigq.model.rotation.matrices import Rotation
from bigq.model.rotation.weights import Side

#: Seeds of the rotations of the stream and of the heads.
STREAM_SEED, HEAD_SEED = 0, 1


@dataclass(frozen=True, slots=True)
class HeadPair:
    """A Linear whose outputs from ``first`` on are the values of attention heads, and the one that reads what the heads return.

    size: of a head. values: heads of the first Linear; fewer than ``reads``, those of the second, if queries share them.
    """

    value: str
    reader: str
    size: int
    values: int
    reads: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class BankRole:
    """What a parameter of a bank does: it reads the stream behind ``norm``, or writes to it (None)."""

    norm: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The modules of a block, or of what is around the blocks, by their names in it.

    norms: those that the stream passes, with the number that each adds to its weight. readers: Linears behind a norm, and that norm.
    A bank of experts counts as one. tables: modules with a matrix that is no Linear's, such as routers, and the norm before them.
    writers: Linears and banks that add to the stream. heads: pairs of value and output projections.
    banks: what the parameters of banks do, by their names in the block.
    """

    norms: Mapping[str, float] = field(default_factory=dict)
    readers: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, str] = field(default_factory=dict)
    writers: tuple[str, ...] = ()
    heads: tuple[HeadPair, ...] = ()
    banks: Mapping[str, BankRole] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Turn:
    """How a Linear is turned. norm: whose weight it takes over, by its name in the same place."""

    inputs: Side | None = None
    outputs: Side | None = None
    norm: str | None = None


def turns_of(roles: Roles, width: int) -> dict[str, Turn]:
    """How the Linears are turned. width: of the stream."""
    stream = Side(Rotation(width, STREAM_SEED))
    found = {name: Turn(inputs=stream, norm=norm) for name, norm in roles.readers.items()}
    for name in roles.writers:
        found[name] = Turn(found[name].inputs, stream, found[name].norm) if name in found else Turn(outputs=stream)
    for pair in roles.heads:
        turn = Rotation(pair.size, HEAD_SEED)
        value, reader = found.get(pair.value, Turn()), found.get(pair.reader, Turn())
        found[pair.value] = Turn(value.inputs, Side(turn, pair.first, pair.values), value.norm)
        found[pair.reader] = Turn(Side(turn, 0, pair.reads), reader.outputs, reader.norm)
    return found
