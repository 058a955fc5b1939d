"""A model card in a finished folder, in the place of the source's README.md.

The manifest stops to speak of README.md before that is replaced, so the folder is sound at every instant; a job that is run again
leaves the card as it is. From then on it is its writers', who may change it or take it away.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bigq.io.atomic import write_bytes
from bigq.io.folders import STATE_FOLDER
from bigq.job.finish import CARD_NAME, free_card
from bigq.job.owner import Holder, Owner, refuse_if_held


def put_card(out: Path, card: bytes, say: Callable[[str], None]) -> Path:
    """Write the model card of the finished job in ``out``; returns its path.

    say: told when there is something to wait for. Raises UsageError where a job is at the folder, CheckpointError where its manifest is
    damaged, ResourceError where nothing can be written.
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
