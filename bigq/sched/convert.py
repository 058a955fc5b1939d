"""Re-packing a packed checkpoint in another format: codes, scales and zero points stay what they are, or it is refused.

What is read may be any packed checkpoint that bigq reads, others' too. A shard becomes a shard; in memory is one of them. Everything is
written into a folder beside the one that was asked for, which gets its name when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import bigq
from bigq import skeleton
from bigq.arch import block_linears
from bigq.errors import ResourceError, UsageError
from bigq.io.atomic import copy_file, json_bytes, remedy, sync_folder, write_bytes, write_json
from bigq.io.formats import FORMATS, Format, Quantization
from bigq.io.formats.gptq_config import GptqSchemes
from bigq.io.index import INDEX_NAME, TensorInfo, read_json_object
from bigq.io.reader import read_tensor
from bigq.io.writer import OutputTensor, write_shard
from bigq.sched.finish import is_side_file
from bigq.sched.pager import Pager
from bigq.sched.to_gguf import write_gguf
from bigq.scheme import QuantScheme, Rule
from bigq.sizes import show_size

#: In a folder that is being written, so that no other is taken for one.
MARK = ".bigq-convert"


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
    source, out = Path(os.path.expanduser(model)), Path(os.path.expanduser(out))
    if to not in (*FORMATS, "gguf"):
        raise UsageError(f"--to {to}: must be one of {', '.join(FORMATS)}, gguf")
    skeleton.silence()
    with torch.no_grad():
        pager = Pager(source, device=torch.device("cpu"), trust_remote_code=trust_remote_code)
        if pager.schemes is None:
            raise UsageError(f"{source}: is not quantized; convert takes a packed checkpoint, such as the output of bigq quantize")
        if to == "gguf":
            return _to_gguf(pager, out, trust_remote_code, say)
        target = FORMATS[to]
        if pager.schemes.format.name == to:
            raise UsageError(f"{source}: is in the {to} format already")
        schemes = {prefix: pager.schemes.scheme(name.removesuffix(".weight")) for name, prefix in pager.packed.items()}
        _require(pager, target)
        size = sum(info.nbytes for info in pager.checkpoint.tensors.values())
        with _unfinished(out, size) as folder:
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
                if path.is_file() and is_side_file(path.name):
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

    def written(done: int, blocks: int) -> None:
        say(f"{out.name}: block {done} of {blocks}")

    write_gguf(pager.folder, out, trust_remote_code=trust_remote_code, say=say, written=written)
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
        target.require(name.removesuffix(".weight"), m, n, scheme, transposed=skeleton.stored_transposed(module))


@contextlib.contextmanager
def _unfinished(out: Path, size: int) -> Any:
    """A folder to write to, which becomes ``out`` at the end, or goes if there is an error. size: the bytes that it will take."""
    folder = out.with_name(out.name + ".partial")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out}: is there and not empty; choose another folder, or empty it")
        if folder.exists() and not (folder / MARK).is_file():
            raise UsageError(f"{folder}: is in the way and was not made by bigq convert; remove it, or choose another folder")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / MARK).touch()
        free = shutil.disk_usage(folder).free
        if free < size:
            raise ResourceError(f"{out}: takes about {show_size(size)}, but only {show_size(free)} of disk space are free there")
        yield folder
        (folder / MARK).unlink()
        sync_folder(folder)
        os.rename(folder, out)
        sync_folder(out.parent)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ResourceError(f"{out}: cannot be written: {error.strerror}; {remedy(error)}") from error
    except BaseException:
        if (folder / MARK).is_file():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _repacked(
    infos: list[TensorInfo], pager: Pager, schemes: Mapping[str, QuantScheme], target: Format, done: set[str]
) -> list[OutputTensor]:
    """The tensors of a shard; those of packed Linears in the new format, where the first of them was. done: Linears that were packed."""
    assert pager.schemes is not None
    before = pager.schemes.format
    tensors: list[OutputTensor] = []
    for info in infos:
        prefix, _, suffix = info.name.rpartition(".")
        if prefix not in schemes or suffix not in before.suffixes(symmetric=False):
            tensors.append(OutputTensor.copy_of(info))
            continue
        if prefix in done:
            continue
        done.add(prefix)
        scheme = schemes[prefix]
        stored = before.read(prefix, lambda name: read_tensor(pager.checkpoint[name]), scheme)
        if bool((stored.zeros < target.min_zero).any()):
            raise UsageError(f"{prefix}: has zero points of 0, which the {target.name} format cannot hold; use gptq_v2")
        tensors += [OutputTensor.of(name, tensor) for name, tensor in target.store(prefix, stored, scheme, pager.dtype).items()]
    return tensors


def _quantization(pager: Pager, target: Format) -> dict[str, Any]:
    """The quantization config of the re-packed checkpoint."""
    schemes = pager.schemes
    assert schemes is not None
    packed = {name.removesuffix(".weight"): schemes.scheme(name.removesuffix(".weight")) for name in pager.packed}
    said = read_json_object(pager.folder / "config.json")["quantization_config"]
    meta = {
        **(said.get("meta") if isinstance(said.get("meta"), dict) else {}),
        "converted": f"{schemes.format.name} by bigq:{bigq.__version__}",
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
