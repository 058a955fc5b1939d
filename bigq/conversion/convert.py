"""Re-packing a packed checkpoint in another format: codes, scales and zero points stay what they are, or it is refused.

What is read may be any packed checkpoint that bigq reads, others' too. A shard becomes a shard; in memory is one Linear at a time.
Everything is written into a folder beside the one that was asked for, which gets its name when it is complete.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigq.conversion.gguf import write_gguf
from bigq.conversion.staging import place_for, unfinished
from bigq.errors import CheckpointError, UsageError
from bigq.io.atomic import copy_file, json_bytes, write_bytes, write_json
from bigq.io.formats import FORMATS, Format, PackedWeight, Quantization
from bigq.io.formats.gptq_config import GptqSchemes
from bigq.io.index import INDEX_NAME, TensorInfo, read_json_object
from bigq.io.reader import as_bytes, read_tensor
from bigq.io.writer import OutputTensor, write_shard
from bigq.job.finish import CARD_NAME, is_card, is_side_file
from bigq.model import skeleton
from bigq.model.blocks import block_linears
from bigq.model.pager import Pager
from bigq.progress.sizes import show_size
from bigq.scheme import QuantScheme, Rule
from bigq.version import __version__


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was done. Sizes in bytes."""

    format_before: str
    format: str
    linears: int
    bytes_before: int
    bytes: int


def convert(
    model: str | Path, out: str | Path, to: str, *, trust_remote_code: bool = False, say: Callable[[str], None] = lambda line: None
) -> Conversion:
    """Write the packed checkpoint in the folder ``model`` to the folder ``out``, in the format ``to``; to the file ``out`` for "gguf".

    say: gets a line for each shard, or block. Raises UsageError where the format cannot hold what is there exactly, CheckpointError,
    UnsupportedModelError, ResourceError; then ``out`` is as it was.
    """
    source = Path(os.path.expanduser(model))
    if to not in (*FORMATS, "gguf"):
        raise UsageError(f"--to {to}: must be one of {', '.join(FORMATS)}, gguf")
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder; convert takes the folder of a quantized model")
    place = place_for(source, out)
    skeleton.silence_transformers()
    with torch.no_grad():
        pager = Pager(source, device=torch.device("cpu"), trust_remote_code=trust_remote_code)
        if pager.schemes is None:
            raise UsageError(f"{source}: is not quantized; convert takes a packed checkpoint, such as the output of bigq quantize")
        if to == "gguf":
            return _to_gguf(pager, Path(os.path.expanduser(out)), trust_remote_code, say)
        target = FORMATS[to]
        if pager.schemes.format.name == to:
            raise UsageError(f"{source}: is in the {to} format already")
        schemes = {prefix: pager.schemes.scheme(name.removesuffix(".weight")) for name, prefix in pager.packed.items()}
        _require(pager, target)
        size = sum(info.nbytes for info in pager.checkpoint.tensors.values())
        with unfinished(place, size) as folder:
            written, done = 0, set[str]()
            weight_map: dict[str, str] = {}
            files = sorted({info.file for info in pager.checkpoint.tensors.values()})
            for number, file in enumerate(files, 1):
                tensors = _repacked([i for i in pager.checkpoint.tensors.values() if i.file == file], pager, schemes, target, done)
                shard = write_shard(folder / file.name, tensors)
                weight_map |= dict.fromkeys(shard.tensors, file.name)
                written += shard.size
                say(f"{file.name}: {show_size(shard.size)} ({number} of {len(files)})")
            for path in sorted(source.iterdir()):
                if path.is_file() and is_side_file(path.name) and not (path.name == CARD_NAME and is_card(path)):
                    copy_file(path, folder / path.name)
            write_json(folder / INDEX_NAME, {"metadata": {"total_size": written}, "weight_map": dict(sorted(weight_map.items()))})
            quantization = _quantization(pager, target)
            if target.config_file is not None:
                write_json(folder / target.config_file, quantization)
            config = read_json_object(source / "config.json") | {"quantization_config": quantization}
            write_bytes(folder / "config.json", json_bytes(config))
    return Conversion(format_before=pager.schemes.format.name, format=to, linears=len(schemes), bytes_before=size, bytes=written)


def _to_gguf(pager: Pager, out: Path, trust_remote_code: bool, say: Callable[[str], None]) -> Conversion:
    assert pager.schemes is not None
    if out.exists():
        raise UsageError(f"{out}: is there already; name a file that is not")
    format = pager.schemes.format
    if format.zeros not in format.suffixes(symmetric=True):  # then GGUF's writer does not look at them
        for name, prefix in pager.packed.items():
            scheme = pager.schemes.scheme(name.removesuffix(".weight"))
            if scheme.symmetric and f"{prefix}.{format.zeros}" in pager.checkpoint:
                _read_as_said(pager, prefix, scheme)

    def written(done: int, blocks: int) -> None:
        say(f"{out.name}: block {done} of {blocks}")

    try:
        write_gguf(pager.folder, out, trust_remote_code=trust_remote_code, say=say, written=written)
    except UsageError as error:
        what, _, flags = str(error).partition("; ")
        raise UsageError(f"{what}; that takes another run of bigq quantize: {flags}") if "--" in flags else error from None
    return Conversion(
        format_before=pager.schemes.format.name,
        format="gguf",
        linears=len(pager.packed),
        bytes_before=sum(info.nbytes for info in pager.checkpoint.tensors.values()),
        bytes=out.stat().st_size,
    )


def _require(pager: Pager, target: Format) -> None:
    """Raise UsageError, naming it, where a packed Linear does not fit the format; what its values are is seen when it is packed."""
    assert pager.schemes is not None
    for name in pager.packed:
        module = pager.model.get_submodule(name.removesuffix(".weight"))
        m, n = skeleton.linear_weight(module).shape
        scheme = pager.schemes.scheme(name.removesuffix(".weight"))
        try:
            target.require(name.removesuffix(".weight"), m, n, scheme, transposed=skeleton.is_transposed(module))
        except UsageError as error:  # its remedies are those of a job
            raise UsageError(f"{str(error).partition('; ')[0]}; choose another format with --to") from None


class _Repacked:
    """A packed Linear in its new format: read when the first of its tensors is written, and held until the last of them is."""

    def __init__(self, pager: Pager, prefix: str, scheme: QuantScheme, target: Format) -> None:
        self._pager, self._prefix, self._scheme, self._target = pager, prefix, scheme, target
        self._made: dict[str, Tensor] = {}

    def tensors(self) -> list[OutputTensor]:
        """To be written in this order."""
        assert self._pager.schemes is not None
        linear = self._pager.schemes.format.geometry(self._prefix, self._pager.checkpoint.tensors)
        layout = self._target.layout(self._prefix, linear, self._scheme.symmetric, self._pager.dtype)
        return [
            OutputTensor(name=name, dtype=dtype, shape=shape, chunks=functools.partial(self._chunks, name))
            for name, (dtype, shape) in layout.items()
        ]

    def _chunks(self, name: str) -> list[memoryview]:
        if not self._made:
            stored = _read_as_said(self._pager, self._prefix, self._scheme)
            if bool((stored.zeros < self._target.min_zero).any()):
                raise UsageError(
                    f"{self._prefix}: has zero points of 0, which the {self._target.name} format cannot hold; use --to gptq_v2"
                )
            self._made = self._target.store(self._prefix, stored, self._scheme, self._pager.dtype)
        return [as_bytes(self._made.pop(name).contiguous())]


def _read_as_said(pager: Pager, prefix: str, scheme: QuantScheme) -> PackedWeight:
    """A packed Linear. Raises CheckpointError where zero points are there that the config denies, whether they would be needed or not."""
    assert pager.schemes is not None
    format, checkpoint = pager.schemes.format, pager.checkpoint
    zeros, middle = f"{prefix}.{format.zeros}", 2 ** (scheme.bits - 1)
    as_stored = dataclasses.replace(scheme, symmetric=scheme.symmetric and zeros not in checkpoint)
    stored = format.read(prefix, lambda name: read_tensor(checkpoint[name], keep_cached=False), as_stored)
    if scheme.symmetric and bool((stored.zeros != middle).any()):
        raise CheckpointError(
            f"{checkpoint[zeros].file}: tensor {zeros} holds zero points other than {middle}, although the quantization_config of "
            f"{pager.folder / 'config.json'} does not say {format.symmetric_key}: false; say so if they are meant, else fetch it again"
        )
    return stored


def _repacked(
    infos: list[TensorInfo], pager: Pager, schemes: Mapping[str, QuantScheme], target: Format, done: set[str]
) -> list[OutputTensor]:
    """The tensors of a shard; those of packed Linears in the new format, where the first of them was. done: Linears that were packed."""
    assert pager.schemes is not None
    before = pager.schemes.format
    old = {*before.suffixes(symmetric=False), *before.spare}
    tensors: list[OutputTensor] = []
    for info in infos:
        prefix, _, suffix = info.name.rpartition(".")
        if prefix not in schemes or suffix not in old:
            tensors.append(OutputTensor.copy_of(info))
        elif prefix not in done:
            done.add(prefix)
            tensors += _Repacked(pager, prefix, schemes[prefix], target).tensors()
    return tensors


def _quantization(pager: Pager, target: Format) -> dict[str, Any]:
    """The quantization config of the re-packed checkpoint."""
    schemes = pager.schemes
    assert schemes is not None
    packed = {name.removesuffix(".weight"): schemes.scheme(name.removesuffix(".weight")) for name in pager.packed}
    said = read_json_object(pager.folder / "config.json")["quantization_config"]
    meta = {
        **(said.get("meta") if isinstance(said.get("meta"), dict) else {}),
        "converted": f"{schemes.format.name} by bigq:{__version__}",
    }
    left_out: tuple[str, ...] = ()
    if isinstance(schemes, GptqSchemes):
        base, rules = schemes.base, schemes.rules
    else:
        kinds = list(packed.values())
        base = max(dict.fromkeys(kinds), key=kinds.count)
        rules = tuple(Rule(f"{re.escape(name)}$", _said(scheme)) for name, scheme in packed.items() if scheme != base)
        inside = (f"{pager.blocks_path}.{i}.{name}" for i, block in enumerate(pager.blocks) for name in block_linears(block))
        left_out = tuple(name for name in inside if name not in packed)
    others = tuple(name for name in pager.linears if name not in packed)
    told = Quantization(
        scheme=base,
        rules=rules,
        packed=packed,
        left_out=left_out,
        others=others,
        head=pager.head_name if pager.head_name in packed else None,
        meta=meta,
    )
    config = target.config(told)
    # What else the source said of how it was made, such as the damping, is still so.
    return {key: said.get(key, value) if key in ("damp_percent", "static_groups") else value for key, value in config.items()}


def _said(scheme: QuantScheme) -> dict[str, int | float | bool]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
