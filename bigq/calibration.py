"""Text to token ids [N, T]: packed rows of one length, no padding, the same for the same seed.

Sources: a text file; JSONL (also ``.gz``) with a ``text`` field; token ids in a safetensors file (``input_ids``);
"c4", the shard of C4 that the GPTQ paper used; "builtin", the text that ships with bigq.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigq.errors import CalibrationError
from bigq.io.hub import fetch_dataset_file
from bigq.io.index import read_header
from bigq.io.reader import read_tensor

ASSETS = Path(__file__).parent / "assets"
BUILTIN_CALIBRATION = ASSETS / "calibration.txt"
BUILTIN_HELDOUT = ASSETS / "heldout.txt"
C4_REPOSITORY, C4_FILE = "allenai/c4", "en/c4-train.00000-of-01024.json.gz"

#: Text is tokenized in pieces of about this many characters, cut at line ends.
PIECE_CHARS = 65536
#: Rows are drawn from this many times the tokens asked for, where the text has them.
SURPLUS = 4


def calibration_rows(source: str, model_folder: Path, *, samples: int, seqlen: int, seed: int, trust_remote_code: bool = False) -> Tensor:
    """``samples`` rows of ``seqlen`` token ids, int64 [N, T]. Raises CalibrationError, ResourceError (c4, offline)."""
    path = _source_path(source, "--calibration", BUILTIN_CALIBRATION)
    if path.suffix == ".safetensors":
        rows = _rows_from_ids(path, seqlen)
    else:
        tokenizer = load_tokenizer(model_folder, trust_remote_code=trust_remote_code)
        enough = samples * seqlen * SURPLUS
        if _is_jsonl(path):
            rows = _pack(_sampled_documents(path, tokenizer, enough, seed), seqlen)
        else:
            rows = _pack(_text_tokens(path, tokenizer, enough), seqlen)
    if len(rows) < samples:
        have, need = len(rows) * seqlen, samples * seqlen
        raise CalibrationError(
            f"{path}: has {len(rows)} rows of {seqlen} tokens, {samples} were asked for: {need - have} tokens are missing; "
            f"give more text, or use --samples {max(len(rows), 1)}"
        )
    if path.suffix == ".safetensors":
        return rows[:samples]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:samples].sort().values]


def evaluation_rows(source: str, model_folder: Path, *, seqlen: int, samples: int | None, trust_remote_code: bool = False) -> Tensor:
    """All whole rows of a text, in order (the first ``samples`` of them), int64 [N, T]. Raises CalibrationError."""
    path = _source_path(source, "--data", BUILTIN_HELDOUT)
    if path.suffix == ".safetensors":
        rows = _rows_from_ids(path, seqlen)
    else:
        tokenizer = load_tokenizer(model_folder, trust_remote_code=trust_remote_code)
        limit = None if samples is None else samples * seqlen
        texts = _documents(path) if _is_jsonl(path) else None
        rows = _pack(_text_tokens(path, tokenizer, limit) if texts is None else _tokens(texts, tokenizer, limit), seqlen)
    if not len(rows):
        raise CalibrationError(f"{path}: holds less than one row of {seqlen} tokens; give more text or a shorter --seqlen")
    return rows if samples is None else rows[:samples]


def require_vocabulary(rows: Tensor, vocabulary: int) -> None:
    """Raise CalibrationError where a token id has no row in the embedding."""
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= vocabulary:
        raise CalibrationError(
            f"token ids reach from {low} to {high}, but the model's vocabulary has {vocabulary}; the tokens belong to another model"
        )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder. Raises CalibrationError."""
    from transformers import AutoTokenizer

    # A damaged or missing tokenizer surfaces as nearly any exception, depending on the tokenizer's class.
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {reason}); "
            "add the tokenizer files, or give token ids in a safetensors file"
        ) from error
    tokenizer.model_max_length = 10**9
    return tokenizer


def _source_path(source: str, flag: str, builtin: Path) -> Path:
    if source == "builtin":
        return builtin
    if source == "c4":
        return fetch_dataset_file(C4_REPOSITORY, C4_FILE)
    path = Path(source).expanduser()
    if not path.is_file():
        raise CalibrationError(f"{flag} {source}: no such file; give a text, JSONL or safetensors file, c4, or builtin")
    return path


def _is_jsonl(path: Path) -> bool:
    name = path.name.removesuffix(".gz")
    return name.endswith((".jsonl", ".json"))


def _rows_from_ids(path: Path, seqlen: int) -> Tensor:
    tensors, _ = read_header(path)
    info = tensors.get("input_ids")
    if info is None or info.dtype not in (torch.int64, torch.int32) or len(info.shape) not in (1, 2):
        raise CalibrationError(f"{path}: needs a tensor input_ids of int64 or int32, [N, T] or one long row")
    ids = read_tensor(info).long()
    if ids.ndim == 1 or ids.shape[0] == 1:
        return _pack(ids.flatten().tolist(), seqlen)
    if ids.shape[1] < seqlen:
        raise CalibrationError(f"{path}: its rows have {ids.shape[1]} tokens, {seqlen} were asked for; use --seqlen {ids.shape[1]}")
    return ids[:, :seqlen].contiguous()


def _pack(tokens: Iterable[int], seqlen: int) -> Tensor:
    flat = torch.tensor(list(tokens), dtype=torch.int64)
    whole = len(flat) // seqlen
    return flat[: whole * seqlen].view(whole, seqlen)


def _text_tokens(path: Path, tokenizer: Any, limit: int | None) -> list[int]:
    """Tokens of a text file; special tokens once, at its start."""
    tokens: list[int] = []
    try:
        with _open_text(path) as file:
            while lines := file.readlines(PIECE_CHARS):
                text = "".join(lines)
                tokens += tokenizer(text, add_special_tokens=not tokens).input_ids
                if limit is not None and len(tokens) >= limit:
                    break
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    return tokens


def _tokens(texts: Iterable[str], tokenizer: Any, limit: int | None) -> list[int]:
    """Tokens of documents one after another, each with the special tokens that its tokenizer adds."""
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text).input_ids
        if limit is not None and len(tokens) >= limit:
            break
    return tokens


def _documents(path: Path) -> Iterator[str]:
    """The ``text`` field of every line of a JSONL file."""
    number = 0
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                    raise CalibrationError(f"{path}, line {number}: needs an object with a string field 'text'")
                yield record["text"]
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise CalibrationError(f"{path}, line {number}: cannot be read as JSONL ({error})") from error


def _sampled_documents(path: Path, tokenizer: Any, enough: int, seed: int) -> list[int]:
    """Tokens of documents drawn evenly from a file of any length: reservoir sampling, grown until it holds enough."""
    size = 1024
    while True:
        draw = random.Random(seed)
        kept: list[str] = []
        total = 0
        for total, text in enumerate(_documents(path), 1):
            if len(kept) < size:
                kept.append(text)
            elif (place := draw.randrange(total)) < size:
                kept[place] = text
        draw.shuffle(kept)
        tokens = _tokens(kept, tokenizer, enough)
        if len(tokens) >= enough or total <= size:
            return tokens
        size *= 4


def _open_text(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8")
