"""The settings of ``evaluate`` and ``generate``. Imports no torch; see ``bigq.options``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bigq.common_options import (
    batch_option,
    device_option,
    dtype_option,
    quiet_option,
    seed_option,
    seqlen_option,
    text_field_option,
    trust_option,
)
from bigq.data.given import calibration_source
from bigq.options import Converted, Effect, Range, at_least, option, settle
from bigq.vocabulary import DtypeName

TEXT, TOKENS = "text", "how tokens are chosen"

DRAWN = Effect(unless="without --temperature or --top-p", holds=lambda config, _: config.draws)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """An evaluation. docs/options.md lists the fields with units and defaults. Raises UsageError for a value that cannot be used."""

    data: Converted[str, Any] = option(
        "builtin",
        help="file, pattern or name, as for quantize --calibration; wikitext2 and ultrachat are their test texts",
        group=TEXT,
        placeholder="FILE|NAME",
        convert=calibration_source,
    )
    text_field: str | None = text_field_option(group=TEXT)
    seqlen: int | None = seqlen_option(group=TEXT)
    samples: int | None = option(
        None,
        help="rows to evaluate",
        group=TEXT,
        unit="rows",
        unset="all of the text",
        range=at_least(1),
    )
    batch: int | None = batch_option()
    device: str = device_option()
    dtype: DtypeName = dtype_option()
    trust_remote_code: bool = trust_option()
    quiet: bool = quiet_option()

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """A generation. docs/options.md lists the fields with units and defaults. Raises UsageError for a value that cannot be used.

    Without temperature and top_p every token is the most likely one.
    """

    max_new_tokens: int = option(
        128,
        help="tokens to add, at most",
        group=TOKENS,
        unit="tokens",
        range=at_least(1),
    )
    temperature: float | None = option(
        None,
        help="sample tokens at random; a higher value flattens the distribution",
        group=TOKENS,
        placeholder="X",
        unset="no sampling: always the most likely token",
        range=Range(must="be above 0; leave it out to get the most likely tokens", holds=lambda t: math.isfinite(t) and t > 0),
    )
    top_p: float | None = option(
        None,
        help="sample from the most likely tokens that together have this probability",
        group=TOKENS,
        placeholder="P",
        unset="all tokens",
        range=Range(must="be above 0 and at most 1", holds=lambda p: 0 < p <= 1),
    )
    seed: int = seed_option(help="random seed for sampling", group=TOKENS, effects=(DRAWN,))
    chat: bool = option(False, help="put the prompt into the tokenizer's chat template", group=TOKENS, opposite=None)
    device: str = device_option()
    dtype: DtypeName = dtype_option()
    trust_remote_code: bool = trust_option()

    def __post_init__(self) -> None:
        settle(self)

    @property
    def draws(self) -> bool:
        """Whether tokens are sampled."""
        return self.temperature is not None or self.top_p is not None

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments of transformers' ``generate`` that say how tokens are chosen."""
        if not self.draws:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature or 1.0, "top_p": self.top_p or 1.0, "top_k": 0}
