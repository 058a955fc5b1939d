"""One GGUF file for llama.cpp from a finished folder: packed Linears with the same codes, everything else unchanged.

Only types that hold the quantized weights exactly are used: Q4_0 for 4 bits symmetric, Q4_1 for 4 bits asymmetric if minimums are
fp16 numbers, Q8_0 for 8 bits symmetric. A conversion that would need rounding is refused, before a job begins (``check_gguf_job``) and
before anything is written (``write_gguf``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bigq.config import JobConfig
from bigq.conversion.gguf_families import Family, family_of, metadata, rope_factors, sliding_window, tensor_name
from bigq.errors import CheckpointError, UsageError
from bigq.io.formats import PackedWeight
from bigq.io.formats.base import Misfit, listed
from bigq.io.gguf_file import (
    BLOCK,
    BLOCK_BYTES,
    PLAIN,
    GgufTensor,
    Value,
    block_type,
    blocks,
    gguf_misfit,
    minimums,
    require_gguf,
    size_label,
    write_gguf_file,
)
from bigq.io.gguf_vocab import read_vocabulary
from bigq.io.index import TensorInfo
from bigq.io.reader import as_bytes, iter_chunks, read_tensor
from bigq.job.fit import GGUF_BITS
from bigq.model.description import ModelDescription
from bigq.model.pager import Pager
from bigq.model.tied import has_own_head
from bigq.scheme import QuantScheme, scheme_for

#: ``general.file_type``, llama.cpp's number of the type that most weights have.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
#: Version of the block types.
QUANTIZATION_VERSION = 2
#: Significant bits of a scale whose product with a zero point of 4 bits is still an fp16 number.
SCALE_BITS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class _TensorPlan:
    """A tensor of the file: GGUF name and type, the parameter that it comes from, and the order of its rows, None for unchanged."""

    name: str
    type: str
    parameter: str
    order: Tensor | None


def check_gguf(pager: Pager) -> None:
    """Raise an error if a folder cannot be written as a GGUF file:

    UsageError: no block type holds a Linear exactly, or the ``gguf`` package is not installed. UnsupportedModelError: llama.cpp does
    not have the family, a setting or the tokenizer. CheckpointError: damaged tokenizer files.
    """
    _check(pager, _scheme_as_packed(pager))
    _check_values(pager)


def check_gguf_job(model: ModelDescription, config: JobConfig) -> None:
    """Raise as ``check_gguf`` if the output of a job could not be written as a GGUF file."""
    _check(model, _scheme_by_rule(model, config))


def _check(model: ModelDescription, scheme_of: Callable[[str], QuantScheme | None]) -> None:
    require_gguf()
    family = family_of(model)
    _plan(model, family, scheme_of)
    metadata(model, family)
    read_vocabulary(model.folder, model.embedding.num_embeddings)


def write_gguf(
    folder: Path,
    file: Path,
    *,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
    written: Callable[[int, int], None] = lambda done, blocks: None,
) -> None:
    """Write the model in ``folder``, packed or not, to ``file``, one tensor in memory at a time.

    say: receives notes about the file. written: receives (blocks written, blocks) after each block.
    The file gets its name when it is complete. Raises as ``check_gguf``, and ResourceError if writing fails.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise UsageError(f"{file}: is a folder, or its folder does not exist; name a file in an existing folder")
    pager = Pager(folder, device=torch.device("cpu"), trust_remote_code=trust_remote_code)
    check_gguf(pager)
    family = family_of(pager)
    plans = _plan(pager, family, _scheme_as_packed(pager))
    tensors = [_tensor(pager, one) for one in plans]
    factors = rope_factors(pager.config)
    if factors is not None:
        tensors.append(_in_memory("rope_freqs.weight", "F32", tuple(factors.shape), lambda: factors))
    values = (
        _general(str(pager.config.model_type), tensors) | metadata(pager, family) | read_vocabulary(folder, pager.embedding.num_embeddings)
    )
    if values["tokenizer.ggml.model"] == "none":
        say(f"{folder} has no tokenizer: {file.name} takes token ids only")
    if sliding_window(pager.config) is not None:
        say(f"{file.name} has a context length of {values['.context_length']}, the sliding window, which llama.cpp ignores for this family")
    write_gguf_file(file, family.arch, values, tensors, _block_counter(written, tensors))


def _plan(model: ModelDescription, family: Family, scheme_of: Callable[[str], QuantScheme | None]) -> list[_TensorPlan]:
    """Every tensor of the file except ``rope_freqs``; those of a block are adjacent.

    Raises UsageError, naming all Linears that no block type holds exactly.
    """
    planned = []
    misfits: dict[str, Misfit] = {}
    parameters = dict(model.model.named_parameters(remove_duplicate=False))
    tied = model.head.weight is model.embedding.weight and not has_own_head(model.model, model.sources)
    for parameter in model.model.state_dict():
        name, order = tensor_name(model, family, parameter)
        if tied and name == "output.weight":
            continue  # without it llama.cpp uses the embedding
        module = parameter.rpartition(".")[0]
        scheme = scheme_of(module) if parameter.endswith(".weight") else None
        if scheme is not None:
            inputs = parameters[parameter].shape[1]
            type = block_type(scheme.bits, scheme.symmetric) or ""
            if (misfit := gguf_misfit(inputs, scheme)) is not None:
                misfits[module] = misfit
        else:
            type = _plain_type(model.sources.get(parameter))
        planned.append(_TensorPlan(name=name, type=type, parameter=parameter, order=order))
    if misfits:
        raise UsageError(f"{listed(misfits)}; {_remedy(misfits)}")
    return planned


def _remedy(misfits: Mapping[str, Misfit]) -> str:
    """What to do with a packed model that does not fit. The advice of a job, which knows its options, comes from ``require_fit``."""
    kinds = {misfit.kind for misfit in misfits.values()}
    options = [f"--bits {GGUF_BITS}"] * ("bits" in kinds) + [f"--group-size {BLOCK}"] * ("group_size" in kinds)
    options += [f"--skip '({'|'.join(re.escape(name) for name, each in misfits.items() if each.kind == 'shape')})$'"] * ("shape" in kinds)
    return f"quantize the original model with --format gguf {' '.join(options)}"


def _scheme_as_packed(pager: Pager) -> Callable[[str], QuantScheme | None]:
    def scheme_of(module: str) -> QuantScheme | None:
        if pager.schemes is None or f"{module}.weight" not in pager.packed:
            return None
        return pager.schemes.scheme(module)

    return scheme_of


def _scheme_by_rule(model: ModelDescription, config: JobConfig) -> Callable[[str], QuantScheme | None]:
    inside = {name for name in model.linears if name.startswith(f"{model.blocks_path}.") or (config.lm_head and name == model.head_name)}

    def scheme_of(module: str) -> QuantScheme | None:
        scheme = scheme_for(module, config.base_scheme, config.rules) if module in inside else None
        if (
            scheme is not None
            and block_type(scheme.bits, scheme.symmetric) == "Q4_1"
            and (scheme.scale_bits or SCALE_BITS + 1) > SCALE_BITS
        ):
            raise _minimums_lost(module, f"use --scale-bits {SCALE_BITS}, or leave out --scale-bits")
        return scheme

    return scheme_of


def _minimums_lost(module: str, remedy: str) -> UsageError:
    return UsageError(f"{module}: the products of its zero points and scales are not fp16 numbers, which Q4_1 of GGUF needs; {remedy}")


def _check_values(pager: Pager) -> None:
    """Raise UsageError where a block type cannot hold the scales and zero points of a packed Linear. Codes are not read."""
    if pager.schemes is None:
        return
    for parameter in (name for name in pager.model.state_dict() if name in pager.packed):
        module = parameter.removesuffix(".weight")
        scheme = pager.schemes.scheme(module)
        stored = _read(pager, parameter, codes=False)
        if not scheme.symmetric:
            if minimums(stored) is None:
                raise _minimums_lost(module, "quantize the model with --format gguf")
        elif bool((stored.zeros != 1 << (scheme.bits - 1)).any()) or not torch.equal(stored.scales.half().float(), stored.scales.float()):
            raise CheckpointError(
                f"{pager.folder}: config.json says that {module} is symmetric, but Q4_0 and Q8_0 cannot hold its zero points or scales; "
                "quantize it again"
            )


def _read(pager: Pager, parameter: str, *, codes: bool = True) -> PackedWeight:
    """A packed Linear. Without codes, its words are uninitialized."""
    assert pager.schemes is not None
    prefix, scheme = pager.packed[parameter], pager.schemes.scheme(parameter.removesuffix(".weight"))
    mark = f"{prefix}.{pager.schemes.format.mark}"

    def get(name: str) -> Tensor:
        info = pager.checkpoint[name]
        if name == mark and not codes:
            return torch.empty(1, dtype=info.dtype).expand(info.shape)
        return read_tensor(info, keep_cached=False)

    return pager.schemes.format.read(prefix, get, scheme)


def _plain_type(info: TensorInfo | None) -> str:
    """The type of an unquantized tensor: matrices keep theirs unless that is fp64, llama.cpp wants the rest in fp32.

    info: None where headers are unknown.
    """
    return "F32" if info is None or len(info.shape) != 2 else next((type for type, dtype in PLAIN.items() if dtype == info.dtype), "F32")


def _tensor(pager: Pager, one: _TensorPlan) -> GgufTensor:
    if one.type in BLOCK_BYTES:
        assert pager.schemes is not None
        bits = pager.schemes.scheme(one.parameter.removesuffix(".weight")).bits
        shape = tuple(pager.model.get_parameter(one.parameter).shape)
        return GgufTensor(name=one.name, type=one.type, shape=shape, chunks=lambda: _blocks(pager, one, bits))
    info = pager.sources[one.parameter]
    if one.order is None and info.dtype == PLAIN[one.type]:
        return GgufTensor(name=one.name, type=one.type, shape=info.shape, chunks=lambda: iter_chunks(info))

    def ordered() -> Tensor:
        tensor = read_tensor(info, keep_cached=False).to(PLAIN[one.type])
        return tensor if one.order is None else tensor[one.order]

    return _in_memory(one.name, one.type, info.shape, ordered)


def _blocks(pager: Pager, one: _TensorPlan, bits: int) -> Iterator[memoryview]:
    yield from blocks(_read(pager, one.parameter), one.type, bits, one.order)


def _in_memory(name: str, type: str, shape: tuple[int, ...], get: Callable[[], Tensor]) -> GgufTensor:
    """A tensor that is in memory while it is written."""
    return GgufTensor(name=name, type=type, shape=shape, chunks=lambda: [as_bytes(get().contiguous())])


def _general(kind: str, tensors: Iterable[GgufTensor]) -> dict[str, Value]:
    """General metadata. The name comes from the file's content and not from its folder, so the same model makes the same bytes."""
    weights: Counter[str] = Counter()
    parameters = 0
    for tensor in tensors:
        parameters += torch.Size(tensor.shape).numel()
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            weights[tensor.type] += torch.Size(tensor.shape).numel()
    return {
        "general.type": "model",
        "general.name": f"{kind} {size_label(parameters)}",
        "general.size_label": size_label(parameters),
        "general.file_type": FILE_TYPES[weights.most_common(1)[0][0]],
        "general.quantization_version": QUANTIZATION_VERSION,
    }


def _block_counter(written: Callable[[int, int], None], tensors: list[GgufTensor]) -> Callable[[GgufTensor], None]:
    """A function to call after each tensor: it calls ``written`` after the last tensor of each block."""
    last = {tensor.name.split(".")[1]: tensor.name for tensor in tensors if tensor.name.startswith("blk.")}
    done = 0

    def count(tensor: GgufTensor) -> None:
        nonlocal done
        if last.get(tensor.name.split(".")[1]) == tensor.name:
            done += 1
            written(done, len(last))

    return count
