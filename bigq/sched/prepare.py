"""What a job finds out before it begins: its calibration rows, its shards, and whether they can be what they are to be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from bigq import skeleton
from bigq.arch import block_linears
from bigq.calibration import calibration_rows, require_vocabulary
from bigq.config import DEFAULT_SEQLEN, JobConfig
from bigq.errors import UsageError
from bigq.io.index import TensorInfo
from bigq.kernels.grid import FEWEST_SCALE_BITS, SCALE_BITS
from bigq.sched.described import Described
from bigq.sched.head import Head, head_scheme
from bigq.sched.pager import Pager
from bigq.sched.structure import SMALLEST
from bigq.scheme import QuantScheme, scheme_for
from bigq.skeleton import linear_weight

#: Tensors outside the blocks are gathered into shards of at most this size (a larger tensor has one of its own).
REST_SHARD_BYTES = 5 * 10**9


def row_length(model_config: object, config: JobConfig) -> int:
    """Tokens per calibration row. Raises UsageError where the model has fewer positions than asked for."""
    limit = skeleton.max_positions(model_config)
    if config.seqlen is None:
        return min(DEFAULT_SEQLEN, limit or DEFAULT_SEQLEN)
    if limit is not None and config.seqlen > limit:
        raise UsageError(f"--seqlen {config.seqlen}: the model has {limit} positions; use --seqlen {limit} or less")
    return config.seqlen


def rows_for(pager: Pager, config: JobConfig) -> Tensor | None:
    """The calibration rows [N, T] of a job whose row length is settled; None where the method does not look at any."""
    if config.method == "rtn":
        return None
    assert config.seqlen is not None
    rows = calibration_rows(
        config.calibration,
        pager.folder,
        samples=config.samples,
        seqlen=config.seqlen,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
    )
    require_vocabulary(rows, pager.embedding.num_embeddings)
    return rows


def settled_scheme(model: Described, config: JobConfig) -> QuantScheme:
    """The scheme of a job, with what it leaves open settled. Raises UsageError where its scales would not fit the format."""
    return dataclasses.replace(config.scheme, scale_bits=_scale_bits(model, config))


def _scale_bits(model: Described, config: JobConfig) -> int:
    prefix, asked = model.blocks_path + ".", config.scheme.scale_bits
    types = {info.dtype for name, info in model.sources.items() if name.startswith(prefix) and name.endswith(".weight")}
    if config.lm_head and (head := model.sources.get(f"{model.head_name}.weight")) is not None:
        types.add(head.dtype)
    of_type = 8 if torch.bfloat16 in types else SCALE_BITS
    if asked is not None:
        if asked > of_type and config.made.scales_as_weights:
            raise UsageError(
                f"--scale-bits {asked}: {model.folder} is bf16, and so are the scales of --format {config.format}, which hold {of_type} "
                f"significant bits; use --scale-bits {of_type}, or leave it out"
            )
        return asked
    asymmetric = not config.scheme.symmetric or any((rule.overrides or {}).get("sym") is False for rule in config.rules)
    return FEWEST_SCALE_BITS if config.format == "gguf" and asymmetric else of_type  # so that minimums are fp16 numbers


def rest_shards(pager: Pager, head: Head | None = None) -> list[list[TensorInfo]]:
    """The tensors outside the blocks (and those that the model has no place for), gathered into shards; without a head that is packed."""
    in_blocks = {info.name for name, info in pager.sources.items() if name.startswith(pager.blocks_path + ".")}
    shards: list[list[TensorInfo]] = []
    size = 0
    for name, info in pager.checkpoint.tensors.items():
        if name in in_blocks or (head is not None and name == head.source.name):
            continue
        if not shards or size + info.nbytes > REST_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


def check_shapes(model: Described, config: JobConfig) -> None:
    """Raise UsageError where a Linear fits neither the format nor its group size, or none is to be quantized."""
    quantized = False
    for i, block in enumerate(model.blocks):
        for name, module in block_linears(block).items():
            full = f"{model.blocks_path}.{i}.{name}"
            scheme = scheme_for(full, config.base_scheme, config.rules)
            m, n = linear_weight(module).shape
            if scheme is not None and min(m, n) >= SMALLEST:
                config.made.require(full, m, n, scheme, transposed=skeleton.stored_transposed(module))
                quantized = True
    if not quantized and head_scheme(model, config) is None:
        raise UsageError("--skip: no Linear is left that would be quantized; give narrower patterns")


def refuse_nesting(source: Path, out: Path) -> None:
    """Raise UsageError where one of the two folders lies in the other."""
    a, b = source.resolve(), out.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UsageError(f"{out}: OUT and MODEL ({source}) must be folders apart from each other")
