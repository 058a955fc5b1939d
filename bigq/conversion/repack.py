"""The tensors of a shard in another format: codes, scales and zero points stay the same, or the shard is refused.

Only one Linear is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from torch import Tensor

from bigq.errors import CheckpointError, UsageError
from bigq.io.formats import Format, PackedWeight
from bigq.io.index import TensorInfo
from bigq.io.reader import as_bytes, read_tensor
from bigq.io.writer import OutputTensor
from bigq.model.pager import Pager
from bigq.scheme import QuantScheme


class Repacking:
    """Re-packs the Linears of a checkpoint in another format.

    schemes: of the packed Linears, by the prefix of their tensors.
    """

    def __init__(self, pager: Pager, schemes: Mapping[str, QuantScheme], target: Format) -> None:
        self._pager, self._schemes, self._target = pager, schemes, target
        self._done: set[str] = set()

    def tensors(self, infos: Sequence[TensorInfo]) -> tuple[list[OutputTensor], list[str]]:
        """(the tensors of a new shard, the prefixes of the Linears in it) for the tensors ``infos`` of a source shard.

        A Linear goes where the first of its tensors was.
        """
        assert self._pager.schemes is not None
        before = self._pager.schemes.format
        old = {*before.suffixes(symmetric=False), *before.spare}
        tensors: list[OutputTensor] = []
        prefixes: list[str] = []
        for info in infos:
            prefix, suffix = before.split(info.name)
            if prefix not in self._schemes or suffix not in old:
                tensors.append(OutputTensor.copy_of(info))
            elif prefix not in self._done:
                self._done.add(prefix)
                prefixes.append(prefix)
                tensors += _LinearWriter(self._pager, prefix, self._schemes[prefix], self._target).tensors()
        return tensors, prefixes


class _LinearWriter:
    """A packed Linear in its new format: read when the first of its tensors is written, held until the last one is."""

    def __init__(self, pager: Pager, prefix: str, scheme: QuantScheme, target: Format) -> None:
        self._pager, self._prefix, self._scheme, self._target = pager, prefix, scheme, target
        self._made: dict[str, Tensor] = {}

    def tensors(self) -> list[OutputTensor]:
        """They must be written in this order."""
        assert self._pager.schemes is not None
        linear = self._pager.schemes.format.geometry(self._prefix, self._pager.checkpoint.tensors)
        layout = self._target.layout(self._prefix, linear, self._scheme.symmetric, self._pager.dtype)
        return [
            OutputTensor(name=name, dtype=dtype, shape=shape, chunks=functools.partial(self._chunks, name))
            for name, (dtype, shape) in layout.items()
        ]

    def _chunks(self, name: str) -> list[memoryview]:
        if not self._made:
            stored = read_linear(self._pager, self._prefix, self._scheme)
            if bool((stored.zeros < self._target.min_zero).any()):
                raise UsageError(
                    f"{self._prefix}: has zero points of 0, which the {self._target.name} format cannot hold; use --to gptq_v2"
                )
            self._made = self._target.store(self._prefix, stored, self._scheme, self._pager.dtype)
        return [as_bytes(self._made.pop(name).contiguous())]


def read_linear(pager: Pager, prefix: str, scheme: QuantScheme) -> PackedWeight:
    """A packed Linear. Raises CheckpointError where it has zero points that contradict the config, whether readers need them or not."""
    assert pager.schemes is not None
    format, checkpoint = pager.schemes.format, pager.checkpoint
    zeros, middle = format.tensor(prefix, format.zeros), 2 ** (scheme.bits - 1)
    as_stored = dataclasses.replace(scheme, symmetric=scheme.symmetric and zeros not in checkpoint)
    stored = format.read(prefix, lambda name: read_tensor(checkpoint[name], keep_cached=False), as_stored)
    if scheme.symmetric and bool((stored.zeros != middle).any()):
        raise CheckpointError(
            f"{checkpoint[zeros].file}: tensor {zeros} holds zero points other than {middle}, although the quantization_config of "
            f"{pager.folder / 'config.json'} does not say {format.symmetric_key}: false; "
            f"add that if the zero points are right, or download the checkpoint again"
        )
    return stored
