"""Finds the module in which a block's values stop being finite, for error messages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from bigq.kernels.finiteness import is_finite
from bigq.model.forward.block_call import BlockCall, OutputForm, hidden_of
from bigq.model.forward.capture import StopForward
from bigq.solver.hessian import finite_tokens

#: The most row numbers that a message lists.
MAX_LISTED_ROWS = 6


def sound_tokens(output: Tensor) -> Tensor:
    """Which tokens of hidden states [B, T, …, d] are finite: bool [B, T]."""
    sound = finite_tokens(output)
    return sound if sound.ndim == 2 else sound.flatten(2).all(-1)


def nonfinite_rows(output: Tensor, lo: int) -> str:
    """Text that names the calibration rows of a batch [B, T, d] with non-finite tokens. lo: the number of the batch's first row."""
    rows = [lo + i for i, sound in enumerate(sound_tokens(output).all(1).tolist()) if not sound]
    listed = ", ".join(map(str, rows[:MAX_LISTED_ROWS]))
    if len(rows) > MAX_LISTED_ROWS:
        return f"calibration rows {listed} … {rows[-1]} ({len(rows)} rows)"
    return f"calibration row{'s' if len(rows) > 1 else ''} {listed}"


def first_nonfinite(block: nn.Module, call: BlockCall, hidden: Tensor) -> str:
    """Text that names the first non-finite value when the block runs on hidden states [B, T, d], such as "the output of mlp.up_proj"."""
    if not is_finite(hidden):
        return "the block's input"
    found: list[str] = []

    def note(tensor: Any, words: str) -> None:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not is_finite(tensor):
            found.append(words)
            raise StopForward

    def before(name: str) -> Callable[..., None]:
        """Checks only the hidden states: masks contain infinities on purpose."""

        def check(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            note(args[0] if args else kwargs.get("hidden_states"), f"the input of {name}")

        return check

    def after(name: str) -> Callable[..., None]:
        def check(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if OutputForm.fits(output):
                note(hidden_of(output), f"the output of {name}")

        return check

    with contextlib.ExitStack() as stack:
        for name, module in block.named_modules():
            if name:
                stack.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after(name)).remove)
        with contextlib.suppress(StopForward):
            call.run(block, hidden)
    return found[0] if found else "the block's output"
