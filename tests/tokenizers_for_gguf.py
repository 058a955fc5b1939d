"""Small tokenizers of every kind that llama.cpp knows too, trained on the shipped text, and texts that tell them apart."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bigq.data.opening import BUILTIN_CALIBRATION

SPECIAL = ("<s>", "</s>")
#: Words, contractions, numbers, runs of spaces and line ends, other scripts, combining marks, emoji, capitals, control characters.
TEXTS = (
    "def replace(self, key):\n    return self._data[key]  # what's there, isn't it? I'LL see, WE'VE seen\n",
    "1234567890 3.14159 x1y22z333 0x7fff 10,000,000",
    "  two   three    four\t\ttabs \t mixed \n\n\n  \r\n  end   ",
    "Größe naïve façade Ελληνικά русский язык עברית العربية 日本語のテキスト 中文字符 한국어 ไทย हिन्दी",
    "🙂 👩‍👩‍👧 ½ ² Ⅷ é ǅ ﬁ \u00a0nbsp\u2003em",
    "CamelCaseWords HTTPServer iPhone XMLHttpRequest mcDonald's O'Brien don'T",
    "!!! ... --- /* c */ // x\n//\n a/b/c \\n @#$%^&*()_+{}|:\"<>?[];',./`~",
    "",
    " ",
    "a",
    "<s>text with</s> special tokens <s>",
)

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _corpus() -> list[str]:
    return [*TEXTS[:-1]] * 20 + BUILTIN_CALIBRATION.read_text(encoding="utf-8").splitlines()[:300]


def byte_level(pattern: str | None, *, ignore_merges: bool = False, bos: bool = False, size: int = 2500) -> Tokenizer:
    """Byte-level BPE. pattern: what words are; GPT-2's if there is none.

    Merges are learned from texts that are not split, so that they reach across whatever words may end at: where text is split shows.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False, special_tokens=list(SPECIAL))
    tokenizer.train_from_iterator(_corpus(), trainer)
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def byte_fallback(*, prefix: bool = True, size: int = 1200) -> Tokenizer:
    """SentencePiece's BPE as transformers has it: every pair of pieces that makes up a piece is a merge, in the order of the pieces."""
    prepare = [normalizers.Prepend("▁")] if prefix else []
    normalizer = normalizers.Sequence([*prepare, normalizers.Replace(" ", "▁")])
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizer
    # Of the characters only some: others are told byte by byte.
    learned.train_from_iterator(_corpus(), trainers.BpeTrainer(vocab_size=size, limit_alphabet=100, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    merged = ["".join(pair) for pair in model["merges"]]
    letters = [text for text in model["vocab"] if len(text) == 1]
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(merged), *letters]
    vocabulary = {text: id for id, text in enumerate(pieces)}
    known = set(merged) | set(letters)
    pairs = [
        (text[:i], text[i:])
        for text in dict.fromkeys(merged)
        for i in sorted(range(1, len(text)), key=lambda i: vocabulary.get(text[:i], 0))
        if text[:i] in known and text[i:] in known
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", *SPECIAL)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def sentencepiece_bytes(tokenizer: Tokenizer, *, prefix: bool = True, kind: int = 2) -> bytes:
    """The same pieces as SentencePiece's own file: a protobuf with scores by rank."""

    def field(number: int, value: bytes | int | float) -> bytes:
        if isinstance(value, float):
            return bytes([number * 8 + 5]) + struct.pack("<f", value)
        if isinstance(value, int):
            return bytes([number * 8, value])
        size = len(value)
        length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
        return bytes([number * 8 + 2]) + length + value

    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    out = b""
    for text, id in pieces:
        type = 2 if id == 0 else 3 if id < 3 else 6 if id < 259 else 1
        score = -float(id - 259) if id >= 259 else 0.0
        out += field(1, field(1, text.encode()) + field(2, score) + (field(3, type) if type != 1 else b""))
    return out + field(2, field(3, kind) + field(4, 3)) + field(3, field(1, b"identity") + field(3, int(prefix)))


#: Kind → what makes it.
TOKENIZERS: Mapping[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: byte_level(None),
    "llama-bpe": lambda: byte_level(_WORDS + r"\p{N}{1,3}" + _SIGNS, ignore_merges=True, bos=True),
    "qwen2": lambda: byte_level(_WORDS + r"\p{N}" + _SIGNS),
    "byte fallback": byte_fallback,
    "byte fallback, no prefix": lambda: byte_fallback(prefix=False),
    "sentencepiece": byte_fallback,
    "sentencepiece beside tokenizer.json": byte_fallback,
}


@functools.cache
def _trained(make: Callable[[], Tokenizer]) -> str:
    """Once: where counts are equal, training does not always come to the same order."""
    return str(make().to_str())


def save_tokenizer(folder: Path, kind: str) -> Tokenizer:
    """Write a tokenizer's files into a model folder."""
    tokenizer = Tokenizer.from_str(_trained(TOKENIZERS[kind]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    if "sentencepiece" in kind:
        (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(tokenizer))
    if kind != "sentencepiece":
        tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer
