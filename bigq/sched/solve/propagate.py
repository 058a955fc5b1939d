"""Replaying a whole block: its outputs become the inputs of the next one."""

from __future__ import annotations

from torch import Tensor, nn

from bigq.errors import NumericsError, UnsupportedModelError
from bigq.kernels.finiteness import is_finite
from bigq.machine.ranks import Ranks
from bigq.model.experts.bank import bank_modules
from bigq.model.forward.block_call import BlockCall
from bigq.sched.rows.shortcut_cache import ShortcutCache
from bigq.sched.rows.store import ActivationStore
from bigq.sched.solve.nan_search import first_nonfinite, nonfinite_rows, sound_tokens
from bigq.solver.hessian import OTHER_DTYPE
from bigq.vocabulary import OnNonfinite


def propagate(
    index: int,
    block: nn.Module,
    store: ActivationStore,
    name: str,
    cache: ShortcutCache | None = None,
    on_nonfinite: OnNonfinite = "stop",
    place: tuple[int, int] | None = None,
    ranks: Ranks | None = None,
) -> int:
    """Replay the whole block; its outputs overwrite its inputs. Returns how many tokens have outputs that are not finite.

    on_nonfinite: "stop" raises for the first such token. "skip" keeps them: the attention of later blocks spreads them to other tokens of
    the same row, never to other rows. place: block and step of this pass (see ``Halving``); by default step 0 of the next block.
    ranks: those that share the rows; the numbers of tokens are of all of them.
    Raises NumericsError, which names the first module with such values; with "skip" only if no token has finite outputs.
    """
    lost = tokens = 0
    cache = cache or ShortcutCache()
    cache.require_banks(bank_modules(block))

    def run(lo: int, hi: int) -> None:
        nonlocal lost, tokens
        with cache.apply(block, store):
            call = store.call(index, lo, hi)
            output, *extras = call.outputs(block, store.fetch(lo, hi))
        here = 0
        if not is_finite(output):
            if on_nonfinite != "skip":
                raise NumericsError(
                    f"{name}: its outputs are not finite (NaN or Inf) for {nonfinite_rows(output, lo)}, beginning with "
                    f"{first_nonfinite(block, call, store.rows(lo, hi))}; {OTHER_DTYPE}; "
                    "when quantizing, --on-nonfinite skip leaves such tokens out"
                )
            here = int((~sound_tokens(output)).sum())
        hand_on(lo, call, extras)  # first: it makes buffers, which may fail, in the first pass
        store.put(lo, output)
        lost, tokens = lost + here, tokens + output.shape[0] * output.shape[1]

    def hand_on(lo: int, call: BlockCall, extras: list[Tensor]) -> None:
        try:
            store.handed_on.put(lo, call.hands_on, extras)
        except ValueError as error:
            raise UnsupportedModelError(f"{name}: hands on {error} besides hidden states; this architecture is not supported") from error

    store.update_pass(*(place or (index + 1, 0)), run)
    if ranks is not None:
        lost, tokens = ranks.number(lost), ranks.number(tokens)
    if lost == tokens:
        raise NumericsError(f"{name}: its outputs contain NaN or Inf for every calibration token; {OTHER_DTYPE}")
    return lost
