"""Text to token ids [N, T]: packed rows of one length, no padding, the same for the same seed.

Sources: a text file; JSONL (also ``.gz``) with a ``text`` field; token ids in a safetensors file (``input_ids``);
"c4", the shard of C4 that the GPTQ paper used; "builtin", the text that ships with bigq.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigq.errors import CalibrationError, CheckpointError
from bigq.io.hub import fetch_dataset_file
from bigq.io.index import read_header
from bigq.io.json_file import read_json_object, show_name, show_value
from bigq.io.reader import read_tensor
from bigq.io.text_files import documents, text_pieces

ASSETS = Path(__file__).parent / "assets"
BUILTIN_CALIBRATION = ASSETS / "calibration.txt"
BUILTIN_HELDOUT = ASSETS / "heldout.txt"
C4_REPOSITORY, C4_FILE = "allenai/c4", "en/c4-train.00000-of-01024.json.gz"

#: Rows are drawn from this many times the tokens asked for, where the text has them.
SURPLUS = 4
#: Token ids in a file: 512 MiB of int64.
MAX_IDS = 2**26
#: Characters of documents that are held at once to draw from; 1024 long books have less.
MAX_KEPT_CHARS = 2**29
#: Bytes of one tokenizer file; the largest published ones have 35 MB.
MAX_TOKENIZER_BYTES = 2**28


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
        texts = documents(path) if _is_jsonl(path) else None
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

    _check_tokenizer(folder)
    # A damaged or missing tokenizer surfaces as nearly any exception, depending on the tokenizer's class; a panic of its
    # Rust part is not even an Exception.
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


def _encoded(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
    except BaseException as error:  # as in load_tokenizer: tokenizer files that load may still hold nonsense
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
    """Raise CalibrationError where tokenizer files are too large, or would have transformers open other files or run other code.

    transformers takes the tokenizer's class by name from everything that it exports, classes that unpickle or fetch things
    among it, and hands what tokenizer_config.json and special_tokens_map.json say to that class, paths of files included.
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
        missing_package = isinstance(found, DummyObject)  # which transformers says itself, naming the package
        if found is not None and not missing_package and not (isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)):
            raise CalibrationError(f"{path}: tokenizer_class {show_value(name)} is not a tokenizer; correct it, or give token ids")


def _require_own_files(path: Path, values: Any) -> None:
    """Raise CalibrationError where a text in a JSON value is the name of a file that is there and not in the folder of ``path``."""
    left = [values]
    for value in left:
        if isinstance(value, (dict, list)):
            left.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, str) and 0 < len(value) < 4096 and "\0" not in value:
            with contextlib.suppress(OSError, ValueError):  # a text that is no name of a file
                if os.path.isfile(value) and path.parent.resolve() not in Path(os.path.abspath(value)).parents:
                    raise CalibrationError(f"{path}: names a file outside the model's folder, {show_value(value)}; take the entry out")


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
    if info.nbytes > MAX_IDS * info.dtype.itemsize:
        raise CalibrationError(f"{path}: holds more than {MAX_IDS} token ids, which is more than bigq reads; give fewer rows")
    ids = read_tensor(info).long()
    if ids.ndim == 1 or ids.shape[0] == 1:
        return _cut(ids.flatten(), seqlen)
    if ids.shape[1] < seqlen:
        raise CalibrationError(f"{path}: its rows have {ids.shape[1]} tokens, {seqlen} were asked for; use --seqlen {ids.shape[1]}")
    return ids[:, :seqlen].contiguous()


def _pack(tokens: Iterable[int], seqlen: int) -> Tensor:
    return _cut(torch.tensor(list(tokens), dtype=torch.int64), seqlen)


def _cut(flat: Tensor, seqlen: int) -> Tensor:
    whole = len(flat) // seqlen
    return flat[: whole * seqlen].view(whole, seqlen)


def _text_tokens(path: Path, tokenizer: Any, limit: int | None) -> list[int]:
    """Tokens of a text file; special tokens once, at its start."""
    tokens: list[int] = []
    for text in text_pieces(path):
        tokens += _encoded(tokenizer, text, special=not tokens)
        if limit is not None and len(tokens) >= limit:
            break
    return tokens


def _tokens(texts: Iterable[str], tokenizer: Any, limit: int | None) -> list[int]:
    """Tokens of documents one after another, each with the special tokens that its tokenizer adds."""
    tokens: list[int] = []
    for text in texts:
        tokens += _encoded(tokenizer, text, special=True)
        if limit is not None and len(tokens) >= limit:
            break
    return tokens


def _sampled_documents(path: Path, tokenizer: Any, enough: int, seed: int) -> list[int]:
    """Tokens of documents drawn evenly from a file of any length: reservoir sampling, grown until it holds enough."""
    size = 1024
    while True:
        draw = random.Random(seed)
        kept: list[str] = []
        total = characters = 0
        for total, text in enumerate(documents(path), 1):
            if len(kept) < size:
                kept.append(text)
                characters += len(text)
            elif (place := draw.randrange(total)) < size:
                characters += len(text) - len(kept[place])
                kept[place] = text
            if characters > MAX_KEPT_CHARS:
                raise CalibrationError(f"{path}: its documents are too long to draw {size} of them; cut them, or give fewer")
        draw.shuffle(kept)
        tokens = _tokens(kept, tokenizer, enough)
        if len(tokens) >= enough or total <= size:
            return tokens
        size *= 4
