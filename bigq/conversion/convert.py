"""Conversion of a packed checkpoint to another format: codes, scales and zero points stay the same, or the conversion is refused.

The source may be any packed checkpoint that bigq reads, by whatever tool. Each shard becomes one shard.
Everything is written into a staging folder next to the output, which is renamed to the output when it is complete.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigq.conversion.gguf import write_gguf
from bigq.conversion.repack import Repacking, read_linear
from bigq.conversion.staging import output_folder, staging_folder
from bigq.errors import BigqError, CheckpointError, UsageError
from bigq.io.atomic import json_bytes, write_bytes, write_json
from bigq.io.containment import require_contained
from bigq.io.formats import FORMATS, Format, Quantization
from bigq.io.formats.base import Misfit, bank_of, listed
from bigq.io.formats.gptq_config import GptqSchemes
from bigq.io.index import INDEX_NAME, read_json_object
from bigq.io.side_files import side_files
from bigq.io.sources.packed import PackedSource
from bigq.io.writer import write_shard
from bigq.job.conversion_record import ConversionRecord, Provenance, provenance_of, write_conversion
from bigq.job.finish import CARD_NAME, copy_side_files, is_card
from bigq.job.journal import Commit, modification_time
from bigq.model import skeleton
from bigq.model.blocks import block_linears
from bigq.model.experts.pages import StoredBank
from bigq.model.pager import Pager
from bigq.model.quantization import described_quantization, without_quantization
from bigq.progress.sizes import show_size
from bigq.scheme import QuantScheme, Rule
from bigq.version import __version__

#: Units of a job, whose commits keep their names in a converted folder.
_JOB_UNIT = re.compile(r"(rest|block|head)-\d+|experts-\d+-\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """The result of a conversion. linears: the number of packed Linears. bytes_before, bytes: of the shards, or of the GGUF file."""

    format_before: str
    format: str
    linears: int
    bytes_before: int
    bytes: int


def convert(
    model: str | Path, out: str | Path, to: str, *, trust_remote_code: bool = False, say: Callable[[str], None] = lambda line: None
) -> Conversion:
    """Write the packed checkpoint in the folder ``model`` to the folder ``out``, in the format ``to``; to the file ``out`` for "gguf".

    say: receives a line for each shard, or block. Raises UsageError if the format cannot hold the weights exactly, CheckpointError,
    UnsupportedModelError, ResourceError. After an error ``out`` is unchanged.
    """
    source = Path(os.path.expanduser(model))
    if to not in (*FORMATS, "gguf"):
        raise UsageError(f"--to {to}: must be one of {', '.join(FORMATS)}, gguf")
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder; convert takes the folder of a quantized model")
    require_contained(source)
    place = output_folder(source, out)
    skeleton.silence_transformers()
    with torch.no_grad():
        pager = Pager(source, device=torch.device("cpu"), trust_remote_code=trust_remote_code)
        if pager.schemes is None:
            raise UsageError(f"{source}: is not quantized; convert takes a packed checkpoint, such as the output of bigq quantize")
        points = pager.schemes.format.points
        if to == "gguf" and points != "int":
            raise UsageError(f"{source}: holds points of {points}, which GGUF does not; keep the model in its present format")
        if to == "gguf":
            return _to_gguf(pager, Path(os.path.expanduser(out)), trust_remote_code, say)
        _require_same_inputs(source, pager.schemes.format, to)
        if pager.schemes.format.name == to:
            raise UsageError(f"{source}: is in the {to} format already")
        return _to_folder(pager, place, FORMATS[to], say)


def _to_folder(pager: Pager, place: Path, target: Format, say: Callable[[str], None]) -> Conversion:
    assert pager.schemes is not None
    _require_fit(pager, target)
    source, before = pager.folder, pager.schemes.format.name
    provenance = _provenance(source, say)
    size = sum(info.nbytes for info in pager.checkpoint.tensors.values())
    with staging_folder(place, size) as folder:
        commits = _write_shards(pager, target, folder, provenance, say)
        written = sum(commit.shard.size for commit in commits)
        _copy_side_files(source, folder)
        _write_configs(pager, target, folder, commits)
        record = ConversionRecord(
            at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            bigq=__version__,
            format_before=before,
            format=target.name,
            source=os.path.realpath(source),
            source_bytes=size,
            fingerprint=pager.checkpoint.fingerprint,
            blocks=len(pager.blocks),
            job=provenance.job,
            run=provenance.run,
        )
        write_conversion(folder, record, commits)
    linears = sum(len(commit.linears) for commit in commits)
    return Conversion(format_before=before, format=target.name, linears=linears, bytes_before=size, bytes=written)


def _provenance(source: Path, say: Callable[[str], None]) -> Provenance:
    """The provenance from the source's own record. If the record is damaged, there is only a warning."""
    try:
        return provenance_of(source)
    except BigqError as error:
        say(f"warning: {error}; the converted folder will not say how its source was quantized")
        return Provenance(job=None, run=None, commits={})


def _write_shards(pager: Pager, target: Format, folder: Path, provenance: Provenance, say: Callable[[str], None]) -> list[Commit]:
    """Write every shard in the new format; returns their commits."""
    assert pager.schemes is not None
    packed = pager.packed_sources()
    modules = {source.prefix: name for name, source in packed.items()}
    repacking = Repacking(pager, {prefix: packed[name].scheme for prefix, name in modules.items()}, target)
    files = sorted({info.file for info in pager.checkpoint.tensors.values()}, key=str)
    commits = []
    for number, file in enumerate(files):
        tensors, prefixes = repacking.tensors([info for info in pager.checkpoint.tensors.values() if info.file == file])
        shard = write_shard(folder / file.name, tensors)
        known = provenance.commits.get(file.name)
        unit = known.unit if known is not None and _JOB_UNIT.fullmatch(known.unit) else f"shard-{number}"
        records = [_linear_record(pager, modules[prefix], packed[modules[prefix]]) for prefix in prefixes]
        commits.append(
            Commit(
                unit=unit,
                shard=shard,
                linears=tuple(_with_errors(records, known)),
                modified=modification_time(folder / file.name),
                left_out=() if known is None else known.left_out,
                skipped=None if known is None else known.skipped,
            )
        )
        say(f"{file.name}: {show_size(shard.size)} ({number + 1} of {len(files)})")
    return commits


def _linear_record(pager: Pager, module: str, source: PackedSource) -> dict[str, Any]:
    """The journal's record of a packed Linear. block: its number, None outside the blocks."""
    inside = module.removeprefix(f"{pager.blocks_path}.") if module.startswith(f"{pager.blocks_path}.") else ""
    block, scheme = inside.partition(".")[0], source.scheme
    return {
        "name": module,
        "block": int(block) if block.isdecimal() else None,
        "shape": list(source.shape),
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
    }


def _with_errors(records: Sequence[dict[str, Any]], known: Commit | None) -> list[dict[str, Any]]:
    """The records, with the source job's results for the same Linears, such as their errors; in the source's order."""
    measured = {str(record.get("name")): (place, record) for place, record in enumerate(() if known is None else known.linears)}

    def place(record: Mapping[str, Any]) -> int:
        return measured[record["name"]][0] if record["name"] in measured else len(measured)

    merged = []
    for record in sorted(records, key=place):
        found = measured[record["name"]][1] if record["name"] in measured else {}
        same = all(found.get(name) == record[name] for name in ("shape", "bits", "group_size"))
        merged.append({**found, **record} if same else record)
    return merged


def _copy_side_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer, licence and other side files, but not bigq's model card, which describes the source."""
    names = side_files(source).files
    copy_side_files(source, [name for name in names if not (name == CARD_NAME and is_card(source / CARD_NAME))], folder)


def _write_configs(pager: Pager, target: Format, folder: Path, commits: Sequence[Commit]) -> None:
    """Write the index, and the configs with the new format."""
    weight_map = {name: commit.shard.file for commit in commits for name in commit.shard.tensors}
    total = sum(commit.shard.size for commit in commits)
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    quantization = _quantization(pager, target)
    if target.config_file is not None:
        write_json(folder / target.config_file, quantization)
    config = without_quantization(read_json_object(pager.folder / "config.json")) | {"quantization_config": quantization}
    write_bytes(folder / "config.json", json_bytes(config))


def _to_gguf(pager: Pager, out: Path, trust_remote_code: bool, say: Callable[[str], None]) -> Conversion:
    assert pager.schemes is not None
    if out.exists():
        raise UsageError(f"{out}: exists already; name a file that does not")
    format = pager.schemes.format
    if format.zeros not in format.suffixes(symmetric=True):  # then the GGUF writer does not read them
        for name, prefix in pager.packed.items():
            scheme = pager.schemes.scheme(name.removesuffix(".weight"))
            if scheme.symmetric and f"{prefix}.{format.zeros}" in pager.checkpoint:
                read_linear(pager, prefix, scheme)

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


def _require_same_inputs(source: Path, before: Format, to: str) -> None:
    """Raise UsageError where one format's readers quantize the inputs of Linears and the other's do not."""
    if before.name == to or before.quantized_inputs == (FORMATS[to].quantized_inputs if to in FORMATS else ""):
        return
    which = before.name if before.quantized_inputs else to
    raise UsageError(
        f"{source}: readers of {which} quantize the inputs of Linears too, so another format is another model; quantize the original model "
        f"with --format {to}"
    )


def _require_fit(pager: Pager, target: Format) -> None:
    """Raise UsageError, naming the packed Linears that do not fit the format. Their values are checked when they are packed."""
    assert pager.schemes is not None
    found = _misfits(pager, target)
    if found:
        fitting = [
            f"--to {format.name}"
            for format in FORMATS.values()
            if format not in (target, pager.schemes.format) and not _misfits(pager, format)
        ]
        advice = f"use {' or '.join(fitting)}" if fitting else "keep the model in its present format"
        raise UsageError(f"{listed(found)}; {advice}")
    packed = pager.packed_sources().keys()
    clash = target.clash(packed, [name for name in pager.plain_modules().every if name not in packed])
    if clash is not None:
        raise UsageError(
            f"{clash[0]} is not packed, and readers of {target.name} find its name in {clash[1]}, which is; keep the model in its present "
            "format"
        )


def _misfits(pager: Pager, target: Format) -> dict[str, Misfit]:
    assert pager.schemes is not None
    found = {}
    packed = pager.packed_sources()
    sizes = [source.scheme.group_size for source in packed.values()]
    usual = max(dict.fromkeys(sizes), key=sizes.count) if sizes else -1
    for name, source in packed.items():
        m, n = source.shape
        expert = bank_of(name) is not None
        transposed = not expert and skeleton.is_transposed(pager.model.get_submodule(name))
        misfit = target.misfit(m, n, source.scheme, transposed=transposed, expert=expert) or target.other_size(source.scheme, usual)
        if misfit is not None:
            found[name] = misfit
    return found


def _quantization(pager: Pager, target: Format) -> dict[str, Any]:
    """The quantization config of the converted checkpoint."""
    schemes = pager.schemes
    assert schemes is not None
    packed = {name: source.scheme for name, source in pager.packed_sources().items()}
    _, before = described_quantization(read_json_object(pager.folder / "config.json"))
    meta = {
        **(before.get("meta") if isinstance(before.get("meta"), dict) else {}),
        "converted": f"{schemes.format.name} by bigq:{__version__}",
    }
    left_out: tuple[str, ...] = ()
    if isinstance(schemes, GptqSchemes):
        base, rules = schemes.base, schemes.rules
    else:
        kinds = list(packed.values())
        base = max(dict.fromkeys(kinds), key=kinds.count)
        rules = tuple(Rule(pattern, _overrides(scheme)) for pattern, scheme in _patterns(packed).items() if scheme != base)
        inside = (f"{pager.blocks_path}.{i}.{name}" for i, block in enumerate(pager.blocks) for name in block_linears(block))
        left_out = tuple(name for name in inside if name not in packed)
    modules = pager.plain_modules()
    quantization = Quantization(
        scheme=base,
        rules=rules,
        packed=packed,
        left_out=left_out,
        others=tuple(name for name in modules.every if name not in packed),
        outside=tuple(name for name in modules.outside if name not in packed),
        apart=(*modules.apart, *(path for bank in pager.banks.values() for path in _unquantized(bank))),
        head=pager.head_name if pager.head_name in packed else None,
        meta=meta,
    )
    config = target.config(quantization)
    # Other entries of the source's config about its quantization, such as the damping, remain valid.
    return {key: before.get(key, value) if key in ("damp_percent", "static_groups") else value for key, value in config.items()}


def _unquantized(bank: StoredBank) -> list[str]:
    """The path of a bank in the checkpoint, if its experts are not packed."""
    return [] if any(bank.packed()) else sorted({path for name in bank.linears() if (path := bank_of(name)) is not None})


def _patterns(packed: Mapping[str, QuantScheme]) -> dict[str, QuantScheme]:
    """The schemes of packed Linears by patterns for their names. One pattern stands for a bank of experts, which readers look up by its
    path, if all of them have one scheme."""
    banks: dict[str, set[QuantScheme]] = {}
    for name, scheme in packed.items():
        if (bank := bank_of(name)) is not None:
            banks.setdefault(bank, set()).add(scheme)
    patterns = {}
    for name, scheme in packed.items():
        bank = bank_of(name)
        whole = bank is not None and len(banks[bank]) == 1
        patterns[rf"{re.escape(str(bank))}(\.|$)" if whole else f"{re.escape(name)}$"] = scheme
    return patterns


def _overrides(scheme: QuantScheme) -> dict[str, int | float | bool]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
