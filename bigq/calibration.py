"""Calibration and evaluation data as rows of token ids [N, T]: of one length, without padding, the same for the same seed.

Sources: files of text, of JSON records (lines or an array, also gzipped) or parquet; conversations, through the model's chat
template; token ids in safetensors files (``input_ids``); texts by name; mixes of these; data given in Python. ``bigq.data`` reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigq.data.given import GIVEN, CalibrationData
from bigq.data.opening import Source, open_parts
from bigq.data.rows import Pool, pool_in_order, pool_to_draw_from
from bigq.data.spec import Part, parts_of, shares, without_folders
from bigq.data.token_ids import shorter_rows
from bigq.data.tokenizer import Tokenizer, load_tokenizer
from bigq.errors import CalibrationError, UsageError
from bigq.io.hub import cached_dataset_file
from bigq.progress.sizes import show_size

#: Bytes of files that a plan reads; larger ones take seconds.
MAX_FORETOLD = 2**25


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What was made of one text. Fields as those of ``Pool``; rows: how many were taken. label: its name, without folders.

    note: why nothing was made of it yet, or "".
    """

    label: str
    kind: str = ""
    rows: int = 0
    tokens: int = 0
    documents: int | None = None
    conversations: int = 0
    note: str = ""

    def text(self) -> str:
        """One line."""
        if self.note:
            return f"{self.label}: {self.note}"
        if self.kind == "token ids":
            return f"{self.label}: {self.rows} rows of {self.tokens} token ids"
        of = "one text"
        if self.kind != "text":
            plain = (self.documents or 0) - self.conversations
            of = " and ".join(
                f"{count} {what}{'' if count == 1 else 's'}{how}"
                for count, what, how in ((plain, "document", ""), (self.conversations, "conversation", " by the chat template"))
                if count
            )
        return f"{self.label}: {self.rows} rows from {self.tokens} tokens of {of or 'no documents'}"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"chat_template": bool(self.conversations)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of token ids, int64 [N, T], and what they were made of, one entry per text."""

    rows: Tensor
    made: tuple[Made, ...]


def read_calibration(
    source: str,
    model_folder: Path,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    text_field: str | None = None,
    trust_remote_code: bool = False,
) -> Rows:
    """``samples`` rows of ``seqlen`` token ids. Token ids are taken in order; rows of text are drawn by ``seed``.

    source: as ``bigq.data.spec`` describes it, or ``CalibrationData``; of a mix, each text gives its share of rows, in the order named.
    text_field: the field of records that holds the text, instead of those that bigq knows.
    Raises CalibrationError, UsageError where data that was given in Python is missing, ResourceError (the hub; pyarrow).
    """
    parts, sources = open_parts(source, "--calibration", text_field)
    counts = shares(parts, samples)
    if 0 in counts:
        raise CalibrationError(_no_share(parts, counts, samples))
    tokenizer = Tokenizer(model_folder, trust_remote_code=trust_remote_code)
    pools = [pool_to_draw_from(each, tokenizer, count, seqlen, seed) for each, count in zip(sources, counts, strict=True)]
    if any(len(pool.rows) < count for pool, count in zip(pools, counts, strict=True)):
        raise CalibrationError(_too_short(parts, sources, pools, counts, samples, seqlen))
    chosen = [_drawn(each, pool, count, seed) for each, pool, count in zip(sources, pools, counts, strict=True)]
    return _rows(sources, pools, chosen)


def foretell(source: str, model_folder: Path, *, vocabulary: int, text_field: str | None, **settings: Any) -> tuple[Made, ...]:
    """What ``read_calibration`` will make of the texts, for a plan: read if all of them and the tokenizer are here and they are small.

    vocabulary: of the model. Raises as ``read_calibration`` and ``require_vocabulary`` for texts that are here, and cannot be used.
    """
    if isinstance(source, CalibrationData):
        return _if_tokenizer(source, model_folder, vocabulary, text_field, **settings)
    parts = parts_of(source, "--calibration")
    notes = [_unread(part) for part in parts]
    if not any(notes):
        return _if_tokenizer(source, model_folder, vocabulary, text_field, **settings)
    return tuple(
        Made(label=without_folders(part.text), note=note or "is here; counted when the job begins")
        for part, note in zip(parts, notes, strict=True)
    )


def _unread(part: Part) -> str:
    """Why a plan does not read a text, or ""."""
    if part.name == GIVEN:
        return "was given in Python, and is not here"
    if part.hub is not None:
        if cached_dataset_file(part.hub.repository, part.hub.file) is None:
            return f"is not fetched yet; the job fetches {part.hub.file} of {part.hub.repository}"
        return "is fetched; rows are drawn when the job begins"
    if part.name is None and not part.files:
        return "no such file here"
    if (size := sum(file.stat().st_size for file in part.files)) > MAX_FORETOLD:
        return f"is here, {show_size(size)}; rows are drawn when the job begins"
    return ""


def _if_tokenizer(source: str, model_folder: Path, vocabulary: int, text_field: str | None, **settings: Any) -> tuple[Made, ...]:
    _, sources = open_parts(source, "--calibration", text_field)
    if any(each.ids is None for each in sources):
        try:
            load_tokenizer(model_folder, trust_remote_code=bool(settings.get("trust_remote_code")))
        except CalibrationError:
            note = "is here; not counted, as the model's tokenizer is not here"
            return tuple(Made(label=each.label, note=note) for each in sources)
    found = read_calibration(source, model_folder, text_field=text_field, **settings)
    require_vocabulary(found.rows, vocabulary)
    return found.made


def calibration_rows(source: str, model_folder: Path, **settings: Any) -> Tensor:
    """The rows of ``read_calibration``, int64 [N, T]."""
    return read_calibration(source, model_folder, **settings).rows


def evaluation_rows(
    source: str,
    model_folder: Path,
    *,
    seqlen: int,
    samples: int | None,
    text_field: str | None = None,
    trust_remote_code: bool = False,
) -> Tensor:
    """All full rows of a text in order, or the first ``samples`` of them, int64 [N, T]. source, text_field: as for ``read_calibration``.

    Of several texts, the rows of one follow those of the other. Raises as ``read_calibration``.
    """
    parts, sources = open_parts(source, "--data", text_field)
    if any(part.weight for part in parts):
        raise UsageError(f"--data {source}: takes no weights, since all rows count equally; leave them out")
    tokenizer = Tokenizer(model_folder, trust_remote_code=trust_remote_code)
    found: list[Tensor] = []
    for each in sources:
        left = None if samples is None else samples - sum(map(len, found))
        if left == 0:
            break
        pool = pool_in_order(each, tokenizer, left, seqlen)
        if not len(pool.rows):
            raise CalibrationError(
                f"{each.name}: has {pool.tokens} tokens, which is less than one row of {seqlen} tokens; {shorter_rows(pool.tokens, 1)}"
            )
        found.append(pool.rows if left is None else pool.rows[:left])
    return torch.cat(found)


def require_vocabulary(rows: Tensor, vocabulary: int) -> None:
    """Raise CalibrationError where a token id has no row in the embedding."""
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= vocabulary:
        raise CalibrationError(
            f"token ids reach from {low} to {high}, but the model's vocabulary has {vocabulary}; the tokens belong to another model"
        )


def _drawn(source: Source, pool: Pool, samples: int, seed: int) -> Tensor:
    if source.ids is not None:
        return pool.rows[:samples]
    order = torch.randperm(len(pool.rows), generator=torch.Generator().manual_seed(seed))
    return pool.rows[order[:samples].sort().values]


def _rows(sources: Sequence[Source], pools: Sequence[Pool], chosen: Sequence[Tensor]) -> Rows:
    made = [
        Made(
            label=source.label,
            kind="token ids" if source.ids is not None else "documents" if source.documents is not None else "text",
            rows=len(rows),
            tokens=pool.tokens,
            documents=pool.documents,
            conversations=pool.conversations,
        )
        for source, pool, rows in zip(sources, pools, chosen, strict=True)
    ]
    return Rows(rows=chosen[0] if len(chosen) == 1 else torch.cat(list(chosen)), made=tuple(made))


def _no_share(parts: Sequence[Part], counts: Sequence[int], samples: int) -> str:
    named = parts[counts.index(0)].text
    enough = next((n for n in range(samples + 1, 2**16) if 0 not in shares(parts, n)), None)
    remedy = "give it a larger weight" if enough is None else f"use --samples {enough}, give it a larger weight"
    return f"--calibration: {named} gets none of the {samples} rows; {remedy}, or leave it out"


def _too_short(
    parts: Sequence[Part], sources: Sequence[Source], pools: Sequence[Pool], counts: Sequence[int], samples: int, seqlen: int
) -> str:
    """The message for the first text that has too few rows, with advice that holds for all of them."""
    name, pool, count = next(
        (each.name, pool, count) for each, pool, count in zip(sources, pools, counts, strict=True) if len(pool.rows) < count
    )
    share = "" if len(parts) == 1 else f" as its share of {samples}"
    in_all = "" if len(pool.rows) else f" ({pool.tokens} tokens in all)"
    said = (
        f"{name}: has {len(pool.rows)} rows of {seqlen} tokens{in_all}, {count} were asked for{share}: "
        f"{(count - len(pool.rows)) * seqlen} tokens are missing; give more text"
    )

    def enough(wanted: int, tokens_per_row: Callable[[Pool], int]) -> bool:
        asked = shares(parts, wanted)
        return 0 not in asked and all(tokens_per_row(pool) >= n for pool, n in zip(pools, asked, strict=True))

    fewer = next((n for n in range(samples - 1, 0, -1) if enough(n, lambda pool: len(pool.rows))), None)
    if fewer is not None:
        return f"{said}, or use --samples {fewer}"
    shorter = min(pool.tokens // n for pool, n in zip(pools, counts, strict=True))
    if shorter > 1:
        return f"{said}, or use --seqlen {shorter}"
    if len(parts) == 1 and pool.tokens > 1:
        return f"{said}, or use --samples 1 --seqlen {pool.tokens}"
    return said if len(parts) == 1 else f"{said}, or leave it out"
