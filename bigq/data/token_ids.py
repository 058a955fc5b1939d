"""Rows from token ids that are given, in safetensors files or in Python. No tokenizer is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bigq.data.given import MAX_IDS
from bigq.errors import CalibrationError
from bigq.io.index import read_header
from bigq.io.reader import read_tensor


def cut(flat: Tensor, seqlen: int) -> Tensor:
    """Token ids [T] in rows [N, seqlen]; what does not fill a row is left out."""
    rows = len(flat) // seqlen
    return flat[: rows * seqlen].view(rows, seqlen)


def shorter_rows(tokens: int, samples: int) -> str:
    """What to do about a text that has ``tokens`` tokens and no full row of the length that was asked for."""
    if tokens >= 2 * samples:
        return f"give more text, or use --seqlen {tokens // samples}"
    return f"give more text, or use --samples 1 --seqlen {tokens}" if tokens > 1 else "give more text"


def rows_from_file(paths: Sequence[Path], samples: int | None, seqlen: int) -> Tensor:
    """The rows of safetensors files. samples: how many are wanted, for messages. Raises CalibrationError."""
    return torch.cat([_rows_from_ids(path, samples, seqlen) for path in paths])


def _rows_from_ids(path: Path, samples: int | None, seqlen: int) -> Tensor:
    tensors, _ = read_header(path)
    info = tensors.get("input_ids")
    if info is None or info.dtype not in (torch.int64, torch.int32) or len(info.shape) not in (1, 2):
        raise CalibrationError(f"{path}: needs a tensor input_ids of int64 or int32, [N, T] or one long row")
    if info.nbytes > MAX_IDS * info.dtype.itemsize:
        raise CalibrationError(f"{path}: holds more than {MAX_IDS} token ids, which is more than bigq reads; give fewer rows")
    return rows_of(str(path), read_tensor(info).long(), samples, seqlen)


def rows_of(name: str, ids: Tensor, samples: int | None, seqlen: int) -> Tensor:
    """Rows of ``seqlen`` token ids from ids [N, T], each cut to that length, or from one long sequence [T] or [1, T].

    samples: how many rows are wanted, for messages. Raises CalibrationError if there is no full row.
    """
    if ids.ndim == 1 or ids.shape[0] == 1:
        return _cut_some(name, ids.flatten(), samples, seqlen)
    if ids.shape[1] < seqlen:
        remedy = f"use --seqlen {ids.shape[1]}" if ids.shape[1] else "give more data"
        remedy += f" --samples {len(ids)}" if ids.shape[1] and len(ids) < (samples or 0) else ""
        raise CalibrationError(f"{name}: its rows have {ids.shape[1]} tokens, {seqlen} were asked for; {remedy}")
    return ids[:, :seqlen].contiguous()


def _cut_some(name: str, flat: Tensor, samples: int | None, seqlen: int) -> Tensor:
    if len(flat) < seqlen:
        said = f"{name}: has {len(flat)} tokens, which is less than one row of {seqlen} tokens"
        raise CalibrationError(f"{said}; {shorter_rows(len(flat), samples or 1)}")
    return cut(flat, seqlen)


def rows_from_sequences(name: str, found: Iterator[Tensor], samples: int | None, seqlen: int) -> Tensor:
    """Rows from sequences of token ids [T].

    Sequences of one length are rows, each cut to ``seqlen``. Where lengths differ, the sequences are joined and cut into rows. Reads
    no more than ``samples`` rows need.
    """
    kept: list[Tensor] = []
    total = 0
    for ids in found:
        kept.append(ids)
        total += len(ids)
        if total > MAX_IDS:
            raise CalibrationError(f"{name}: holds more than {MAX_IDS} token ids, which is more than bigq reads; give fewer rows")
        if samples is not None and len(kept) >= samples and total >= samples * seqlen:
            break
    if not kept:
        raise CalibrationError(f"{name}: holds no token ids; give more data")
    if len({len(ids) for ids in kept}) == 1:
        return rows_of(name, torch.stack(kept), samples, seqlen)
    return _cut_some(name, torch.cat(kept), samples, seqlen)
