"""A model card in a finished folder, in place of the source's README.md.

The manifest drops README.md before that is replaced, so the folder is sound at every instant. A job that is run again leaves the card
unchanged. From then on people may edit or remove it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bigq.io.atomic import write_bytes
from bigq.io.folders import STATE_FOLDER
from bigq.job.finish import CARD_NAME, free_card
from bigq.job.owner import Holder, Owner, refuse_if_held


def put_card(out: Path, card: bytes, say: Callable[[str], None]) -> Path:
    """Write the model card of the finished folder ``out``; returns its path.

    say: receives a line before a wait. Raises UsageError if a job is running in the folder, CheckpointError if its manifest is damaged,
    ResourceError if writing fails.
    """
    state = out / STATE_FOLDER
    refuse_if_held(state)
    holder = Holder.read(state)
    facts = {} if holder is None else holder.facts
    owner = Owner(state, lambda: facts, steal=False, say=say)
    try:
        free_card(out)
        write_bytes(out / CARD_NAME, card)
    finally:
        owner.release("finished", facts)
    return out / CARD_NAME
