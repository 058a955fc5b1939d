"""A model folder's tokenizer as llama.cpp's metadata says it.

Two kinds are known to both: byte-level BPE ("gpt2", where merges and the way of splitting text into words count) and SentencePiece's BPE
with byte fallback ("llama", where pieces and their scores count). llama.cpp knows ways of splitting by name; those here were compared with
it token by token (``scripts/check_gguf.py``). Others are refused: a model that gets other tokens than it was trained on is worse than none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.gguf_file import Value, special_tokens
from bigq.io.json_file import MAX_JSON_BYTES, open_regular, read_json_object, shown

#: Types of tokens, as llama.cpp counts them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Splitting(NamedTuple):
    """llama.cpp's name for a way of splitting text into words, and whether words that are tokens need no merges with it."""

    name: str
    ignore_merges: bool


#: The pattern in tokenizer.json that words are split by → what llama.cpp calls it. "tekken" is not among them: llama.cpp takes combining
#: marks and capitals that are not ASCII otherwise than Mistral's pattern does.
SPLITTINGS: Mapping[str, Splitting] = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}": Splitting("llama-bpe", True),
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}": Splitting("qwen2", False),
}
#: GPT-2's own, which tokenizer.json has no pattern for.
GPT2_SPLITTING = Splitting("gpt-2", False)

#: llama.cpp asks for at least one merge. This one never happens: words are characters first, and none of them is "[PAD]".
NO_MERGE = "[PAD] [PAD]"

#: SentencePiece's mark for a space.
SPACE = "▁"


@dataclass(slots=True)
class _Tokens:
    """Token by id: text, type, score."""

    texts: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)

    @classmethod
    def unused(cls, size: int) -> _Tokens:
        return cls([f"[PAD{i}]" for i in range(size)], [UNUSED] * size, [-10000.0] * size)

    def put(self, path: Path, id: Any, text: Any, type: int, score: float) -> None:
        if not isinstance(text, str) or isinstance(id, bool) or not isinstance(id, int) or id < 0:
            raise CheckpointError(f"{path}: {shown(text)} with id {shown(id)} is no token; fetch it again")
        if id >= len(self.texts):
            raise CheckpointError(
                f"{path}: token {shown(text)} has id {id}, but the model's embedding has {len(self.texts)} rows; the two belong to "
                "different models"
            )
        self.texts[id], self.types[id], self.scores[id] = text, type, score


def read_vocabulary(folder: Path, rows: int) -> dict[str, Value]:
    """Everything under ``tokenizer.`` for the model in ``folder``, whose embedding has so many rows.

    A folder without tokenizer files gives a file without vocabulary: llama.cpp then takes token ids only.
    Raises CheckpointError where files are damaged, UnsupportedModelError where llama.cpp has no such tokenizer.
    """
    document, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    if document.exists():
        read = read_json_object(document, repeats=True)
        model = _object(document, read, "model")
        if model.get("type") == "BPE" and not model.get("byte_fallback") and _types(read.get("decoder")) == ["ByteLevel"]:
            found = _byte_level(document, read, model, rows)
        elif pieces.exists():
            found = _sentencepiece(pieces, _added(document, read), rows)
        else:
            found = _byte_fallback(document, read, model, rows)
        adds = {"bos": False, "eos": False}
    elif pieces.exists():
        found, adds = _sentencepiece(pieces, (), rows), {"bos": True, "eos": False}
    elif any((folder / name).exists() for name in ("vocab.json", "tokenizer_config.json", "tekken.json")):
        raise UnsupportedModelError(
            f"{folder}: has a tokenizer, but neither tokenizer.json nor tokenizer.model, which a GGUF file is made from; let transformers "
            "write it (AutoTokenizer.from_pretrained(…).save_pretrained(…)), or use --format gptq"
        )
    else:
        return {"tokenizer.ggml.model": "none"}
    ids, said, template = special_tokens(folder, rows)
    ids = _named(folder, found) | ids
    found |= {f"tokenizer.ggml.{_KEYS.get(kind, kind)}_token_id": id for kind, id in ids.items() if kind in _SPECIAL}
    found |= {f"tokenizer.ggml.add_{kind}_token": value for kind, value in (adds | said).items() if kind in ("bos", "eos")}
    if template is not None:
        found["tokenizer.chat_template"] = template
    return found


def _named(folder: Path, found: Mapping[str, Any]) -> dict[str, int]:
    """Ids of the special tokens that tokenizer_config.json names, be they added tokens or not."""
    path = folder / "tokenizer_config.json"
    said = read_json_object(path, repeats=True) if path.exists() else {}
    texts = {kind: token.get("content") if isinstance(token := said.get(f"{kind}_token"), dict) else token for kind in _SPECIAL}
    ids = {text: id for id, text in enumerate(found["tokenizer.ggml.tokens"])}
    return {kind: ids[text] for kind, text in texts.items() if isinstance(text, str) and text in ids}


_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "eot", "eom")
_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}


def _byte_level(path: Path, document: Mapping[str, Any], model: Mapping[str, Any], rows: int) -> dict[str, Value]:
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _unknown(path, f"model.{name} is {shown(model[name])}")
    merges = list(_merges(path, model))
    vocabulary = _object(path, model, "vocab")
    splitting = _splitting(path, document, bool(merges) or any(len(text) > 1 for text in vocabulary))
    if merges and bool(model.get("ignore_merges")) != splitting.ignore_merges:
        raise _unknown(path, f"model.ignore_merges is not what llama.cpp takes it to be for {splitting.name}")
    tokens = _Tokens.unused(rows)
    for text, id in vocabulary.items():
        tokens.put(path, id, text, NORMAL, 0.0)
    for id, text, type in _added(path, document):
        tokens.put(path, id, text, type, 0.0)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": splitting.name,
        "tokenizer.ggml.tokens": tokens.texts,
        "tokenizer.ggml.token_type": tokens.types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges] or [NO_MERGE],
    }


def _splitting(path: Path, document: Mapping[str, Any], matters: bool) -> Splitting:
    """How text is split into words. matters: whether tokens are longer than a byte, so that it makes a difference."""
    normalizer = document.get("normalizer")
    if _types(normalizer) not in ([], ["NFC"]):
        raise _unknown(path, f"it normalizes text by {shown(normalizer)}")
    steps = list(_steps(document.get("pre_tokenizer"), "pretokenizers"))
    if any(step.get("add_prefix_space") for step in steps):
        raise _unknown(path, "it puts a space before every text")
    match steps:
        case [{"type": "ByteLevel", **rest}] if rest.get("use_regex", True) or not matters:
            return GPT2_SPLITTING
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"}, {"type": "ByteLevel", "use_regex": False}]:
            if pattern in SPLITTINGS:
                return SPLITTINGS[pattern]
    raise _unknown(path, f"it splits text into words by {shown(document.get('pre_tokenizer'))}")


def _byte_fallback(path: Path, document: Mapping[str, Any], model: Mapping[str, Any], rows: int) -> dict[str, Value]:
    """SentencePiece's BPE as tokenizer.json has it: pieces whose order is that of their merges."""
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise _unknown(path, f"it is of kind {shown(model.get('type'))}")
    vocabulary = _object(path, model, "vocab")
    added = _added(path, document)
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
            raise _unknown(path, f"{shown(text)} is not merged from all pairs of tokens that make it up")
    return _pieces(path, tokens, added, _prefixed(path, document))


def _prefixed(path: Path, document: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text, which SentencePiece's marks for spaces then begin with."""
    normalizers = list(_steps(document.get("normalizer"), "normalizers"))
    words = list(_steps(document.get("pre_tokenizer"), "pretokenizers"))
    match normalizers, words:
        case [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}], []:
            return True
        case [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}], []:
            return False
        case [], [{"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}]:
            return bool(scheme != "never")
    raise _unknown(path, "it prepares text in a way that SentencePiece does not")


def _sentencepiece(path: Path, added: Iterable[tuple[int, str, int]], rows: int) -> dict[str, Value]:
    """From a tokenizer.model, a protobuf: pieces (1), of them text (1), score (2) and type (3); trainer (2), normalizer (3)."""
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
        raise CheckpointError(f"{path}: is no SentencePiece model; fetch it again") from None
    if kind != 2:
        raise _unknown(path, "SentencePiece made it by another method than BPE")
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
    """The fields of a protobuf message: (number, an int or bytes). Raises IndexError or ValueError where it is none."""
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
        raise ValueError("a number without end")

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if at + length > len(data):
            raise ValueError("a field beyond the end")
        yield number, data[at : at + length]
        at += length


def _merges(path: Path, model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in model.get("merges") or ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise CheckpointError(f"{path}: {shown(merge)} is no merge of two tokens; fetch it again")
        yield pair[0], pair[1]


def _added(path: Path, document: Mapping[str, Any]) -> list[tuple[int, str, int]]:
    """Tokens that are looked for before anything else: (id, text, type)."""
    found = []
    for token in document.get("added_tokens") or ():
        match token:
            case {"id": int(id), "content": str(text)}:
                found.append((id, text, CONTROL if token.get("special") else USER_DEFINED))
            case _:
                raise CheckpointError(f"{path}: {shown(token)} under added_tokens is no token; fetch it again")
    return found


def _object(path: Path, values: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = values.get(name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {name} is {shown(value)}, not an object; fetch it again")
    return value


def _steps(value: Any, name: str) -> Iterator[dict[str, Any]]:
    """The parts of a tokenizer's stage, which may be one or a sequence of them, listed under ``name``."""
    if isinstance(value, dict):
        if value.get("type") == "Sequence" and isinstance(value.get(name), list):
            for inner in value[name]:
                yield from _steps(inner, name)
        else:
            yield value


def _types(value: Any) -> list[Any]:
    """The types of a normalizer's or a decoder's parts."""
    name = "normalizers" if isinstance(value, dict) and "normalizers" in value else "decoders"
    return [step.get("type") for step in _steps(value, name)]


def _byte(text: str) -> int | None:
    """The byte that a token of the form <0x0A> stands for."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return None
    return None


def _unknown(path: Path, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path}: llama.cpp has no tokenizer like this one ({why}), so no GGUF file is made; use --format gptq, or take the tokenizer's "
        "files out of the folder to make one that takes token ids only"
    )
