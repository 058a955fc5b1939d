"""Options that several commands have, and the groups of the help. Imports no torch."""

from __future__ import annotations

from typing import Any

from bigq.errors import UsageError
from bigq.options import Range, at_least, option

#: The greatest seed that torch takes.
MAX_SEED = 2**64 - 1
DEFAULT_SEQLEN = 2048
NEVER = "never"

CALIBRATION, BUDGETS, RUN, OUTPUT = "calibration", "memory and disk", "how it runs", "output"

_SEED = Range(must="be from 0 to 2**64 − 1", holds=lambda seed: 0 <= seed <= MAX_SEED)


def seqlen_option(**more: Any) -> Any:
    unset = f"{DEFAULT_SEQLEN}, or the model's limit if that is less"
    return option(None, help="tokens per row", unit="tokens", unset=unset, range=at_least(1), **more)


def text_field_option(**more: Any) -> Any:
    unset = "text; or messages, ShareGPT conversations, or prompt and completion, through the chat template"
    help = "field of records that holds the text, or a list of messages"
    return option(None, help=help, placeholder="NAME", unset=unset, range=Range(must="not be empty", holds=bool), **more)


def batch_option(**more: Any) -> Any:
    """Rows per batch; defaults to ``default_batch``."""
    unset = "8 on a GPU, about 2048 tokens on a CPU; fewer if memory is short"
    return option(None, help="rows that pass through a block at once", group=RUN, unit="rows", unset=unset, range=at_least(1), **more)


def seed_option(*, help: str, **more: Any) -> Any:
    return option(0, help=help, range=_SEED, placeholder="N", **more)


def fold_option(**more: Any) -> Any:
    help = "scales of a Linear's inputs, which the module before it divides by and its weights are multiplied by"
    return option(None, help=help, unset="awq with --method awq, else none", **more)


def input_scales_option(**more: Any) -> Any:
    help = "of formats whose readers round inputs: dynamic, a scale for each token, or static, one for each Linear from its largest "
    return option("dynamic", help=help + "calibration input", **more)


def device_option(**more: Any) -> Any:
    return option("auto", help="auto, cpu or cuda:N; auto is the first GPU, or the CPU without one", group=RUN, **more)


def dtype_option(**more: Any) -> Any:
    return option("auto", help="precision of the forward passes; auto is that of the checkpoint", group=RUN, **more)


def trust_option(**more: Any) -> Any:
    return option(False, help="run model code that comes with the checkpoint", group=RUN, **more)


def quiet_option() -> Any:
    return option(False, help="print no progress and no summary, only errors", group=OUTPUT, opposite=None)


def seconds_or_never(given: Any, label: str) -> Any:
    """The ``convert`` of a number of seconds; None for "never". Raises UsageError."""
    if not isinstance(given, str):
        return given
    try:
        return None if given == NEVER else float(given)
    except ValueError:
        raise UsageError(f"{label}: must be a number of seconds, such as 60, or never") from None


def default_batch(device_type: str, seqlen: int) -> int:
    """Rows per batch: a GPU needs large products; on a CPU larger ones soon only take more memory.

    On the model of ``scripts/bench_small.py``, 2048 tokens at once take 6 % less time than 1024 and 35 MiB more; 4096 save no more time.
    """
    return 8 if device_type == "cuda" else max(1, 2048 // seqlen)
