"""What a job finds out before it begins: its calibration rows, its shards, and whether they can be what they are to be."""

from __future__ import annotations

from torch import Tensor

from bigq.calibration import calibration_rows, require_vocabulary
from bigq.config import JobConfig
from bigq.io.index import TensorInfo
from bigq.model.pager import Pager
from bigq.sched.head import Head

#: Tensors outside the blocks are gathered into shards of at most this size (a larger tensor has one of its own).
REST_SHARD_BYTES = 5 * 10**9


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
