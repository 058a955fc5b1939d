"""Conversion of a model folder's tokenizer to GGUF metadata.

Two kinds of tokenizers are supported: byte-level BPE ("gpt2", defined by its merges and its pre-tokenizer) and SentencePiece BPE with
byte fallback ("llama", defined by its pieces and their scores). llama.cpp knows pre-tokenizers by name. Those here were compared with
llama.cpp token by token (``scripts/check_gguf.py``). Others are refused, since a model must get the tokens that it was trained on.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.gguf_file import Value, special_tokens
from bigq.io.json_file import MAX_JSON_BYTES, open_regular, read_json_object, show_value

#: llama.cpp's token types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class PreTokenizer(NamedTuple):
    """llama.cpp's name for a pre-tokenizer, and whether words that are tokens are taken whole, without merges."""

    name: str
    ignore_merges: bool


#: The pattern of the pre-tokenizer in tokenizer.json → its name in llama.cpp. "tekken" is missing, since llama.cpp treats combining marks
#: and non-ASCII capitals differently than Mistral's pattern does.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}": PreTokenizer("llama-bpe", True),
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}": PreTokenizer("qwen2", False),
}
#: GPT-2's, for which tokenizer.json has no pattern.
GPT2_PRE_TOKENIZER = PreTokenizer("gpt-2", False)

#: llama.cpp needs at least one merge. This one never applies: words start as single characters, and "[PAD]" is not one.
NO_MERGE = "[PAD] [PAD]"


@dataclass(slots=True)
class _Tokens:
    """The vocabulary, by token id: texts, types, scores."""

    texts: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)

    @classmethod
    def unused(cls, size: int) -> _Tokens:
        return cls([f"[PAD{i}]" for i in range(size)], [UNUSED] * size, [-10000.0] * size)

    def put(self, path: Path, id: Any, text: Any, type: int, score: float) -> None:
        if not isinstance(text, str) or isinstance(id, bool) or not isinstance(id, int) or id < 0:
            raise CheckpointError(f"{path}: {show_value(text)} with id {show_value(id)} is not a valid token; fetch it again")
        if id >= len(self.texts):
            raise CheckpointError(
                f"{path}: token {show_value(text)} has id {id}, but the model's embedding has {len(self.texts)} rows; fetch the "
                "tokenizer of this model"
            )
        self.texts[id], self.types[id], self.scores[id] = text, type, score


def read_vocabulary(folder: Path, rows: int) -> dict[str, Value]:
    """The metadata under ``tokenizer.`` for the model in ``folder``. rows: those of its embedding.

    A folder without tokenizer files gives metadata without vocabulary; llama.cpp then accepts only token ids.
    Raises CheckpointError if files are damaged, UnsupportedModelError if llama.cpp has no such tokenizer.
    """
    document, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    if document.exists():
        read = read_json_object(document, repeats=True)
        model = _object(document, read, "model")
        if model.get("type") == "BPE" and not model.get("byte_fallback") and _types(read.get("decoder")) == ["ByteLevel"]:
            found = _byte_level(document, read, model, rows)
        elif pieces.exists():
            found = _sentencepiece(pieces, _added_tokens(document, read), rows)
        else:
            found = _byte_fallback(document, read, model, rows)
        adds = {"bos": False, "eos": False}
    elif pieces.exists():
        found, adds = _sentencepiece(pieces, (), rows), {"bos": True, "eos": False}
    elif any((folder / name).exists() for name in ("vocab.json", "tokenizer_config.json", "tekken.json")):
        raise UnsupportedModelError(
            f"{folder}: has a tokenizer, but no tokenizer.json or tokenizer.model, which GGUF needs; write one with "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…) of transformers, or use --format gptq"
        )
    else:
        return {"tokenizer.ggml.model": "none"}
    ids, added, template = special_tokens(folder, rows)
    ids = _special_ids(folder, found) | ids
    found |= {f"tokenizer.ggml.{_KEYS.get(kind, kind)}_token_id": id for kind, id in ids.items() if kind in _SPECIAL}
    found |= {f"tokenizer.ggml.add_{kind}_token": value for kind, value in (adds | added).items() if kind in ("bos", "eos")}
    if template is not None:
        found["tokenizer.chat_template"] = template
    return found


def _special_ids(folder: Path, found: Mapping[str, Any]) -> dict[str, int]:
    """Ids of the special tokens that tokenizer_config.json names, whether they are added tokens or not."""
    path = folder / "tokenizer_config.json"
    config = read_json_object(path, repeats=True) if path.exists() else {}
    texts = {kind: token.get("content") if isinstance(token := config.get(f"{kind}_token"), dict) else token for kind in _SPECIAL}
    ids = {text: id for id, text in enumerate(found["tokenizer.ggml.tokens"])}
    return {kind: ids[text] for kind, text in texts.items() if isinstance(text, str) and text in ids}


_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "eot", "eom")
_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}


def _byte_level(path: Path, document: Mapping[str, Any], model: Mapping[str, Any], rows: int) -> dict[str, Value]:
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _unsupported(path, f"model.{name} is {show_value(model[name])}")
    merges = list(_merges(path, model))
    vocabulary = _object(path, model, "vocab")
    pre_tokenizer = _pre_tokenizer(path, document, bool(merges) or any(len(text) > 1 for text in vocabulary))
    if merges and bool(model.get("ignore_merges")) != pre_tokenizer.ignore_merges:
        raise _unsupported(path, f"llama.cpp assumes another model.ignore_merges for {pre_tokenizer.name}")
    tokens = _Tokens.unused(rows)
    for text, id in vocabulary.items():
        tokens.put(path, id, text, NORMAL, 0.0)
    for id, text, type in _added_tokens(path, document):
        tokens.put(path, id, text, type, 0.0)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer.name,
        "tokenizer.ggml.tokens": tokens.texts,
        "tokenizer.ggml.token_type": tokens.types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges] or [NO_MERGE],
    }


def _pre_tokenizer(path: Path, document: Mapping[str, Any], matters: bool) -> PreTokenizer:
    """The pre-tokenizer. matters: whether there are tokens of several bytes, so that it makes a difference."""
    normalizer = document.get("normalizer")
    if _types(normalizer) not in ([], ["NFC"]):
        raise _unsupported(path, f"its normalizer is {show_value(normalizer)}")
    steps = list(_steps(document.get("pre_tokenizer"), "pretokenizers"))
    if any(step.get("add_prefix_space") for step in steps):
        raise _unsupported(path, "it adds a space before every text")
    match steps:
        case [{"type": "ByteLevel", **rest}] if rest.get("use_regex", True) or not matters:
            return GPT2_PRE_TOKENIZER
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"}, {"type": "ByteLevel", "use_regex": False}]:
            if pattern in PRE_TOKENIZERS:
                return PRE_TOKENIZERS[pattern]
    raise _unsupported(path, f"its pre-tokenizer is {show_value(document.get('pre_tokenizer'))}")


def _byte_fallback(path: Path, document: Mapping[str, Any], model: Mapping[str, Any], rows: int) -> dict[str, Value]:
    """SentencePiece BPE from tokenizer.json, where the order of merges gives the scores of pieces."""
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise _unsupported(path, f"its type is {show_value(model.get('type'))}")
    vocabulary = _object(path, model, "vocab")
    added = _added_tokens(path, document)
    ranks: dict[str, int] = {}
    pairs = set()
    for rank, (left, right) in enumerate(_merges(path, model)):
        ranks.setdefault(left + right, rank)
        pairs.add((left, right))
    apart = {text for _, text, _ in added} | {text for text in vocabulary if _byte(text) is not None}
    tokens = _Tokens.unused(rows)
    for text, id in vocabulary.items():
        type = UNKNOWN if text == model.get("unk_token") else NORMAL if _byte(text) is None else BYTE
        tokens.put(path, id, text, type, -float(ranks.get(text, len(ranks))))
        if text not in apart and any(
            text[:i] in vocabulary and text[i:] in vocabulary and (text[:i], text[i:]) not in pairs for i in range(1, len(text))
        ):
            raise _unsupported(path, f"merges are missing for {show_value(text)}: every pair of tokens that forms it needs one")
    return _pieces(path, tokens, added, _adds_space_prefix(path, document))


def _adds_space_prefix(path: Path, document: Mapping[str, Any]) -> bool:
    """Whether a space is added before a text."""
    normalizers = list(_steps(document.get("normalizer"), "normalizers"))
    words = list(_steps(document.get("pre_tokenizer"), "pretokenizers"))
    match normalizers, words:
        case [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}], []:
            return True
        case [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}], []:
            return False
        case [], [{"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}]:
            return bool(scheme != "never")
    raise _unsupported(path, "its normalizer and pre-tokenizer are not those of SentencePiece")


def _sentencepiece(path: Path, added: Iterable[tuple[int, str, int]], rows: int) -> dict[str, Value]:
    """Parse a tokenizer.model. It is a protobuf: pieces (1) with text (1), score (2) and type (3); trainer (2); normalizer (3)."""
    try:
        file, size = open_regular(path)
        with file:
            data = file.read(min(size, MAX_JSON_BYTES))
        message = list(_fields(memoryview(data)))
        kind = {number: value for n, spec in message if n == 2 for number, value in _fields(spec)}.get(3, 1)
        prefixed = {number: value for n, spec in message if n == 3 for number, value in _fields(spec)}.get(3, 1)
        tokens = _Tokens.unused(rows)
        for id, piece in enumerate(spec for n, spec in message if n == 1):
            parts = dict(_fields(piece))
            (score,) = struct.unpack("<f", parts.get(2, bytes(4)))
            tokens.put(path, id, str(bytes(parts[1]), "utf-8"), int(parts.get(3, NORMAL)), score)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (IndexError, KeyError, TypeError, ValueError, struct.error):
        raise CheckpointError(f"{path}: not a valid SentencePiece model; fetch it again") from None
    if kind != 2:
        raise _unsupported(path, "its SentencePiece model is not BPE")
    return _pieces(path, tokens, added, bool(prefixed))


def _pieces(path: Path, tokens: _Tokens, added: Iterable[tuple[int, str, int]], prefixed: bool) -> dict[str, Value]:
    for id, text, type in added:
        if not 0 <= id < len(tokens.texts) or tokens.types[id] != UNKNOWN:
            tokens.put(path, id, text, type, -1000.0)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens.texts,
        "tokenizer.ggml.scores": tokens.scores,
        "tokenizer.ggml.token_type": tokens.types,
        "tokenizer.ggml.add_space_prefix": prefixed,
    }


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: (number, int or bytes). Raises IndexError, KeyError or ValueError if it is invalid."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while shift < 64:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ValueError("varint is too long")

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if at + length > len(data):
            raise ValueError("field extends beyond the end")
        yield number, data[at : at + length]
        at += length


def _merges(path: Path, model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in model.get("merges") or ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise CheckpointError(f"{path}: {show_value(merge)} is not a merge of two tokens; fetch it again")
        yield pair[0], pair[1]


def _added_tokens(path: Path, document: Mapping[str, Any]) -> list[tuple[int, str, int]]:
    """Added tokens, which are matched before text is split: (id, text, type)."""
    found = []
    for token in document.get("added_tokens") or ():
        match token:
            case {"id": int(id), "content": str(text)}:
                found.append((id, text, CONTROL if token.get("special") else USER_DEFINED))
            case _:
                raise CheckpointError(f"{path}: {show_value(token)} in added_tokens is not a valid token; fetch it again")
    return found


def _object(path: Path, values: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = values.get(name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {name} is {show_value(value)}, not an object; fetch it again")
    return value


def _steps(value: Any, name: str) -> Iterator[dict[str, Any]]:
    """The steps of a tokenizer stage: a single one, or those of a Sequence, which lists them under ``name``."""
    if isinstance(value, dict):
        if value.get("type") == "Sequence" and isinstance(value.get(name), list):
            for inner in value[name]:
                yield from _steps(inner, name)
        else:
            yield value


def _types(value: Any) -> list[Any]:
    """The types of the steps of a normalizer or decoder."""
    name = "normalizers" if isinstance(value, dict) and "normalizers" in value else "decoders"
    return [step.get("type") for step in _steps(value, name)]


def _byte(text: str) -> int | None:
    """The byte that a token of the form <0x0A> represents, or None."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return None
    return None


def _unsupported(path: Path, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path}: llama.cpp does not support this tokenizer ({why}); use --format gptq, or remove the tokenizer's files from the folder to "
        "write a GGUF file that accepts only token ids"
    )
