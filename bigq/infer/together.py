"""What the ranks of an evaluation share, and what they have to agree on before it begins.

They share the batches of one process, not its rows: a row's hidden states may depend, by a last bit, on how many rows pass through a block
with it. So the figures are the bits of one process that takes as many rows at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bigq.common_options import default_batch
from bigq.errors import UsageError
from bigq.infer.options import EvalConfig
from bigq.infer.results import RowSums
from bigq.job.request import code_hashes, model_hashes, versions
from bigq.machine.ranks import Ranks
from bigq.model.pager import Pager
from bigq.sched.together import require_same_request


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A rank's share of an evaluation. batch: rows that pass through a block at once, on every rank. rows: this rank's, of all."""

    batch: int
    rows: range


def share_of(config: EvalConfig, device_type: str, shape: Sequence[int], ranks: Ranks) -> Share:
    """This rank's share of the rows [N, T]: whole batches, but for the last one. Raises UsageError if there is nothing for one of them.

    shape: of the rows. The batch defaults to ``default_batch``, or to as many rows as leave a batch for each rank.
    """
    count, length = shape
    if count < ranks.count:
        raise UsageError(
            f"--data {config.data}: {ranks.count} processes share its rows, and each needs at least one, but there {_are(count)} of "
            f"{length} tokens; start at most {count}, or give more --samples or more text"
        )
    fair = count // ranks.count
    batch = config.batch or min(default_batch(device_type, length), fair)
    batches = -(-count // batch)
    if batches < ranks.count:
        raise UsageError(
            f"--batch {batch}: {ranks.count} processes share the batches, but {count} rows are only {batches}; give --batch {fair} or "
            "less, or start fewer processes"
        )
    mine = ranks.rows(batches)
    return Share(batch=batch, rows=range(mine.start * batch, min(mine.stop * batch, count)))


def require_same_evaluation(config: EvalConfig, pagers: Sequence[Pager], rows: Tensor, share: Share, ranks: Ranks) -> None:
    """Raise UsageError if ranks were started with different options, models, texts or versions: the sum over them would mean nothing."""
    settings = dataclasses.asdict(config) | {"batch": share.batch, "device": pagers[0].device.type}
    for name in ("data", "text_field", "samples", "quiet"):  # the tokens are compared
        del settings[name]
    names = ("MODEL", "--baseline")[: len(pagers)]
    models = {
        name: [model_hashes(pager.folder, pager.checkpoint.fingerprint), code_hashes(pager.folder) if config.trust_remote_code else {}]
        for name, pager in zip(names, pagers, strict=True)
    }
    tokens = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    require_same_request({"settings": settings, **models, "tokens": [*rows.shape, tokens], "versions": versions()}, ranks)


def all_rows(own: Sequence[RowSums], ranks: Ranks) -> list[RowSums]:
    """The sums of all rows in their order, from those of each rank's."""
    of_all: Any = ranks.everyone([dataclasses.astuple(row) for row in own])
    return [RowSums(*values) for part in of_all for values in part]


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"
