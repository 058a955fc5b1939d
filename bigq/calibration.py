"""Calibration and evaluation data as rows of token ids [N, T]: of one length, without padding, the same for the same seed.

Sources: a text file; JSONL (also ``.gz``) with a ``text`` field; token ids in a safetensors file (``input_ids``);
"c4", the shard of C4 that the GPTQ paper used; "builtin", the text that ships with bigq; data given in Python.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigq.calibration_data import GIVEN, MAX_IDS, CalibrationData, sequences, texts
from bigq.errors import CalibrationError, CheckpointError, UsageError
from bigq.io.hub import fetch_dataset_file
from bigq.io.index import read_header
from bigq.io.json_file import read_json_object, show_name, show_value
from bigq.io.reader import read_tensor
from bigq.io.text_files import documents, text_pieces

ASSETS = Path(__file__).parent / "assets"
BUILTIN_CALIBRATION = ASSETS / "calibration.txt"
BUILTIN_HELDOUT = ASSETS / "heldout.txt"
C4_REPOSITORY, C4_FILE = "allenai/c4", "en/c4-train.00000-of-01024.json.gz"

#: Rows are drawn from this many times the tokens asked for, where the text has as many.
SURPLUS = 4
#: Characters of documents that are held at once to draw from; 1024 long books have fewer.
MAX_KEPT_CHARS = 2**29
#: Bytes of one tokenizer file; the largest published ones have 35 MB.
MAX_TOKENIZER_BYTES = 2**28


def calibration_rows(source: str, model_folder: Path, *, samples: int, seqlen: int, seed: int, trust_remote_code: bool = False) -> Tensor:
    """``samples`` rows of ``seqlen`` token ids, int64 [N, T].

    source: a path, a name, or ``CalibrationData``. Token ids are taken in order; rows of text are drawn by ``seed``.
    Raises CalibrationError, UsageError where data that was given in Python is missing, ResourceError (c4, offline).
    """
    data = _open(source, "--calibration", BUILTIN_CALIBRATION)
    if data.ids is not None:
        rows = data.ids(samples, seqlen)
    else:
        tokenizer = load_tokenizer(model_folder, trust_remote_code=trust_remote_code)
        enough = samples * seqlen * SURPLUS
        if data.documents is not None:
            rows = _pack(_sample_documents(data.name, data.documents, tokenizer, enough, seed), seqlen)
        else:
            rows = _pack(_joined_tokens(data.pieces(), tokenizer, enough), seqlen)
    if len(rows) < samples:
        have, need = len(rows) * seqlen, samples * seqlen
        remedy = f"--samples {len(rows)}" if len(rows) else "a smaller --seqlen"
        raise CalibrationError(
            f"{data.name}: has {len(rows)} rows of {seqlen} tokens, {samples} were asked for: {need - have} tokens are missing; "
            f"give more text, or use {remedy}"
        )
    if data.ids is not None:
        return rows[:samples]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:samples].sort().values]


def evaluation_rows(source: str, model_folder: Path, *, seqlen: int, samples: int | None, trust_remote_code: bool = False) -> Tensor:
    """All full rows of a text in order, or the first ``samples`` of them, int64 [N, T]. source: as for ``calibration_rows``.

    Raises CalibrationError.
    """
    data = _open(source, "--data", BUILTIN_HELDOUT)
    if data.ids is not None:
        rows = data.ids(samples, seqlen)
    else:
        tokenizer = load_tokenizer(model_folder, trust_remote_code=trust_remote_code)
        limit = None if samples is None else samples * seqlen
        joined = data.documents is None
        rows = _pack(_joined_tokens(data.pieces(), tokenizer, limit) if joined else _tokens(data.pieces(), tokenizer, limit), seqlen)
    if not len(rows):
        raise CalibrationError(f"{data.name}: holds less than one row of {seqlen} tokens; give more text or a shorter --seqlen")
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

    _check_tokenizer(folder)
    # A damaged or missing tokenizer raises nearly any exception, depending on the tokenizer's class; a panic of its Rust part is not
    # even an Exception.
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise CalibrationError(
            f"{folder}: its tokenizer cannot be loaded ({_reason(error)}); add the tokenizer files, or give token ids in a safetensors file"
        ) from error
    tokenizer.model_max_length = 10**9
    return tokenizer


def _encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
    except BaseException as error:  # as in load_tokenizer: files that load may still be damaged
        if not _is_failure(error):
            raise
        raise CalibrationError(
            f"the model's tokenizer fails on the text ({_reason(error)}); give token ids in a safetensors file"
        ) from error
    return ids


def _is_failure(error: BaseException) -> bool:
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {show_name(' '.join(str(error).split())[:200])}"


def _check_tokenizer(folder: Path) -> None:
    """Raise CalibrationError where tokenizer files are too large, or would make transformers open other files or run other code.

    transformers looks the tokenizer's class up by name among all that it exports, classes that unpickle or download included. It
    passes what tokenizer_config.json and special_tokens_map.json say to that class, paths of files included.
    """
    for path in folder.glob("*"):
        if path.suffix in (".json", ".model", ".txt", ".spm", ".jinja", ".vocab") and path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CalibrationError(f"{path}: is larger than the {MAX_TOKENIZER_BYTES} bytes that bigq reads of a tokenizer file")
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            values = read_json_object(path, repeats=True)
        except CheckpointError as error:
            raise CalibrationError(str(error)) from None
        if name != "special_tokens_map.json":
            _require_tokenizer_class(path, values.get("tokenizer_class"))
        if name != "config.json":
            _require_own_files(path, values)


def _require_tokenizer_class(path: Path, name: Any) -> None:
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
    from transformers.utils.import_utils import DummyObject

    if name is None:
        return
    if not isinstance(name, str) or not name.isidentifier():
        raise CalibrationError(f"{path}: tokenizer_class {show_value(name)} is not the name of a class; correct it")
    for spelling in (name, name.removesuffix("Fast"), name.removesuffix("Fast") + "Fast"):
        found = tokenizer_class_from_name(spelling)
        missing_package = isinstance(found, DummyObject)  # transformers names the package itself
        if found is not None and not missing_package and not (isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)):
            raise CalibrationError(f"{path}: tokenizer_class {show_value(name)} is not a tokenizer; correct it, or give token ids")


def _require_own_files(path: Path, values: Any) -> None:
    """Raise CalibrationError where a string in a JSON value is the path of an existing file outside the folder of ``path``."""
    left = [values]
    for value in left:
        if isinstance(value, (dict, list)):
            left.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, str) and 0 < len(value) < 4096 and "\0" not in value:
            with contextlib.suppress(OSError, ValueError):  # a string that is not a path
                if os.path.isfile(value) and path.parent.resolve() not in Path(os.path.abspath(value)).parents:
                    raise CalibrationError(f"{path}: names a file outside the model's folder, {show_value(value)}; remove the entry")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Data that was opened. name: for messages. Exactly one of the others is there.

    ids: (rows wanted or None for all, tokens per row) → rows of token ids. documents: a new pass over separate texts.
    text: a new pass over the pieces of one text.
    """

    name: str
    ids: Callable[[int | None, int], Tensor] | None = None
    documents: Callable[[], Iterable[str]] | None = None
    text: Callable[[], Iterable[str]] | None = None

    def pieces(self) -> Iterable[str]:
        """A pass over the texts in order."""
        opened = self.documents or self.text
        assert opened is not None
        return opened()


def _open(source: str, option: str, builtin: Path) -> _Source:
    """Raises UsageError, CalibrationError, ResourceError."""
    if isinstance(source, CalibrationData):
        return _open_given(source, option)
    if source == GIVEN:
        raise UsageError(
            f"{option}: the data of this job was given in Python, and no file holds it; resume it in Python, by bigq.quantize with the "
            "settings and the calibration data that it was begun with"
        )
    if source == "builtin":
        path = builtin
    elif source == "c4":
        path = fetch_dataset_file(C4_REPOSITORY, C4_FILE)
    else:
        path = Path(source).expanduser()
    if not path.is_file():
        raise CalibrationError(f"{option} {source}: no such file; give a text, JSONL or safetensors file, c4, or builtin")
    if path.suffix == ".safetensors":
        return _Source(name=str(path), ids=lambda _, seqlen: _rows_from_ids(path, seqlen))
    if _is_jsonl(path):
        return _Source(name=str(path), documents=lambda: documents(path))
    return _Source(name=str(path), text=lambda: text_pieces(path))


def _open_given(data: CalibrationData, option: str) -> _Source:
    name = option.removeprefix("--")
    if texts(data) is not None:
        return _Source(name=name, documents=lambda: texts(data) or ())
    if data.tokens is not None:
        tokens = data.tokens
        return _Source(name=name, ids=lambda _, seqlen: _rows_of(name, tokens, seqlen))
    return _Source(name=name, ids=lambda samples, seqlen: _rows_from_sequences(name, sequences(data), samples, seqlen))


def _is_jsonl(path: Path) -> bool:
    name = path.name.removesuffix(".gz")
    return name.endswith((".jsonl", ".json"))


def _rows_from_ids(path: Path, seqlen: int) -> Tensor:
    tensors, _ = read_header(path)
    info = tensors.get("input_ids")
    if info is None or info.dtype not in (torch.int64, torch.int32) or len(info.shape) not in (1, 2):
        raise CalibrationError(f"{path}: needs a tensor input_ids of int64 or int32, [N, T] or one long row")
    if info.nbytes > MAX_IDS * info.dtype.itemsize:
        raise CalibrationError(f"{path}: holds more than {MAX_IDS} token ids, which is more than bigq reads; give fewer rows")
    return _rows_of(str(path), read_tensor(info).long(), seqlen)


def _rows_of(name: str, ids: Tensor, seqlen: int) -> Tensor:
    """Rows of ``seqlen`` token ids from ids [N, T], each cut to that length, or from one long sequence [T] or [1, T]."""
    if ids.ndim == 1 or ids.shape[0] == 1:
        return _cut(ids.flatten(), seqlen)
    if ids.shape[1] < seqlen:
        raise CalibrationError(f"{name}: its rows have {ids.shape[1]} tokens, {seqlen} were asked for; use --seqlen {ids.shape[1]}")
    return ids[:, :seqlen].contiguous()


def _rows_from_sequences(name: str, found: Iterator[Tensor], samples: int | None, seqlen: int) -> Tensor:
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
        return _rows_of(name, torch.stack(kept), seqlen)
    return _cut(torch.cat(kept), seqlen)


def _pack(tokens: Iterable[int], seqlen: int) -> Tensor:
    return _cut(torch.tensor(list(tokens), dtype=torch.int64), seqlen)


def _cut(flat: Tensor, seqlen: int) -> Tensor:
    rows = len(flat) // seqlen
    return flat[: rows * seqlen].view(rows, seqlen)


def _joined_tokens(pieces: Iterable[str], tokenizer: Any, limit: int | None) -> list[int]:
    """Tokens of one text in pieces; special tokens only at its start."""
    tokens: list[int] = []
    for text in pieces:
        tokens += _encode(tokenizer, text, special=not tokens)
        if limit is not None and len(tokens) >= limit:
            break
    return tokens


def _tokens(texts: Iterable[str], tokenizer: Any, limit: int | None) -> list[int]:
    """Tokens of documents in order, each with the special tokens that the tokenizer adds."""
    tokens: list[int] = []
    for text in texts:
        tokens += _encode(tokenizer, text, special=True)
        if limit is not None and len(tokens) >= limit:
            break
    return tokens


def _sample_documents(name: str, documents: Callable[[], Iterable[str]], tokenizer: Any, enough: int, seed: int) -> list[int]:
    """Tokens of documents drawn evenly from any number of them: reservoir sampling, grown until it holds enough.

    documents: a new pass over all of them.
    """
    size = 1024
    while True:
        draw = random.Random(seed)
        kept: list[str] = []
        total = characters = 0
        for total, text in enumerate(documents(), 1):
            if len(kept) < size:
                kept.append(text)
                characters += len(text)
            elif (place := draw.randrange(total)) < size:
                characters += len(text) - len(kept[place])
                kept[place] = text
            if characters > MAX_KEPT_CHARS:
                raise CalibrationError(f"{name}: its documents are too long to draw {size} of them; cut them, or give fewer")
        draw.shuffle(kept)
        tokens = _tokens(kept, tokenizer, enough)
        if len(tokens) >= enough or total <= size:
            return tokens
        size *= 4
