"""GGUF: blocks, the file, and tokenizers in its metadata."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers_for_gguf import TOKENIZERS, byte_fallback, byte_level, save_tokenizer, sentencepiece_bytes
from torch import Tensor

from bigq import faults
from bigq.data.opening import ASSETS
from bigq.errors import CheckpointError, ResourceError, UnsupportedModelError
from bigq.io import gguf_file
from bigq.io.formats import PackedWeight
from bigq.io.gguf_file import BLOCK_BYTES, GgufTensor, block_type, blocks, minimums, require_gguf, write_gguf_file
from bigq.io.gguf_vocab import read_vocabulary
from bigq.io.reader import as_bytes
from bigq.kernels.dequantize import dequantize
from bigq.kernels.pack import pack

M, N = 24, 192


def made_up(bits: int, symmetric: bool, groups: int, scale_bits: int = 11, seed: int = 0) -> tuple[PackedWeight, Tensor]:
    """A packed Linear of M × N with scales of all sizes, including subnormal ones, and its weight."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (M, N), generator=generator, dtype=torch.uint8)
    fraction = torch.randint(2 ** (scale_bits - 1), 2**scale_bits, (M, groups), generator=generator)
    scales = (fraction * 2.0 ** torch.randint(-24, 0, (M, groups), generator=generator)).half()
    low, high = (2 ** (bits - 1),) * 2 if symmetric else (0, 2**bits - 1)
    zeros = torch.randint(low, high + 1, (M, groups), generator=generator, dtype=torch.uint8)
    return PackedWeight(pack(codes.T, bits), scales, zeros), dequantize(codes, scales, zeros, torch.float32)


def by_gguf(stored: PackedWeight, bits: int, type: str, order: Tensor | None = None) -> Tensor:
    """The weight that the gguf package decodes from the blocks."""
    data = b"".join(bytes(piece) for piece in blocks(stored, type, bits, order))
    rows = np.frombuffer(data, dtype=np.uint8).reshape(M, N // 32 * BLOCK_BYTES[type])
    return torch.tensor(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type]))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("bits", "symmetric", "scale_bits"), [(4, True, 11), (8, True, 11), (4, False, 7)])
def test_blocks_hold_the_weight_exactly(bits: int, symmetric: bool, scale_bits: int, groups: int) -> None:
    stored, weight = made_up(bits, symmetric, groups, scale_bits)
    type = block_type(bits, symmetric)
    assert type is not None
    assert torch.equal(by_gguf(stored, bits, type), weight)


def test_rows_are_reordered_with_their_scales() -> None:
    stored, weight = made_up(4, True, 2)
    order = torch.randperm(M, generator=torch.Generator().manual_seed(1))
    assert torch.equal(by_gguf(stored, 4, "Q4_0", order), weight[order])
    assert not torch.equal(by_gguf(stored, 4, "Q4_0"), weight[order])


def test_the_number_of_rows_per_piece_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, weight = made_up(4, False, 2, 7)
    monkeypatch.setattr(gguf_file, "CODES_AT_ONCE", 5 * N)
    assert [len(piece) for piece in blocks(stored, "Q4_1", 4)] == [5 * N // 32 * 20] * 4 + [4 * N // 32 * 20]
    assert torch.equal(by_gguf(stored, 4, "Q4_1"), weight)


def test_minimums_of_scales_of_7_bits_are_fp16_numbers_and_others_are_not() -> None:
    for seed in range(20):
        assert minimums(made_up(4, False, 6, 7, seed)[0]) is not None
    assert minimums(made_up(4, False, 6, 11)[0]) is None
    words, scales, zeros = made_up(4, False, 1, 7)[0]
    too_large = PackedWeight(words, torch.full_like(scales, 2.0**13), torch.full_like(zeros, 15))
    assert minimums(too_large) is None
    no_half = PackedWeight(words, torch.full_like(scales, 2.0**-30, dtype=torch.float32), torch.zeros_like(zeros))
    assert minimums(no_half) is None


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (2, False), (3, False), (8, False)])
def test_other_schemes_have_no_block_type(bits: int, symmetric: bool) -> None:
    assert block_type(bits, symmetric) is None


def plain(name: str, tensor: Tensor) -> GgufTensor:
    type = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[tensor.dtype]
    rows = tensor.split(2)
    return GgufTensor(name=name, type=type, shape=tuple(tensor.shape), chunks=lambda: [as_bytes(row.contiguous()) for row in rows])


METADATA: dict[str, Any] = {
    "general.name": "ä",
    ".block_count": 3,
    ".rope.freq_base": 5e5,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.tokens": ["a", "▁b"],
    "tokenizer.ggml.scores": [0.0, -1.5],
    "tokenizer.ggml.token_type": [1, 3],
}


def test_the_gguf_package_reads_what_was_written(tmp_path: Path) -> None:
    stored, weight = made_up(4, True, 2)
    tensors = [
        plain("a", torch.randn(3)),
        plain("b", torch.randn(5, 7)),
        GgufTensor(name="c", type="Q4_0", shape=(M, N), chunks=lambda: blocks(stored, "Q4_0", 4)),
        plain("d", torch.randn(3, 5).half()),
    ]
    heard: list[str] = []
    write_gguf_file(tmp_path / "x.gguf", "llama", METADATA, tensors, lambda tensor: heard.append(tensor.name))
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert heard == [tensor.name for tensor in reader.tensors] == ["a", "b", "c", "d"]
    for tensor, wrote in zip(reader.tensors, tensors, strict=True):
        assert tensor.tensor_type.name == wrote.type
        assert tuple(int(size) for size in reversed(tensor.shape)) == wrote.shape
        assert tensor.data_offset % 32 == 0
        assert bytes(tensor.data) == b"".join(bytes(piece) for piece in wrote.chunks())
    assert torch.equal(torch.tensor(gguf.quants.dequantize(reader.tensors[2].data, reader.tensors[2].tensor_type)), weight)
    for key, value in METADATA.items():
        got = reader.get_field("llama" + key if key.startswith(".") else key)
        assert got is not None and got.contents() == value


@pytest.mark.parametrize("point", ["file.opened", "gguf.piece", "gguf.piece:3", "file.written", "file.synced"])
def test_a_full_disk_leaves_an_older_file_unchanged(point: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"before")
    faults.arm(f"{point}:ENOSPC" if ":" in point else f"{point}:1:ENOSPC")
    try:
        with pytest.raises(ResourceError, match=r"x\.gguf.*free some space"):
            write_gguf_file(path, "llama", METADATA, [plain("b", torch.randn(9, 7))], lambda _: None)
    finally:
        faults.disarm()
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"] and path.read_bytes() == b"before"


def test_a_missing_gguf_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_gguf() is gguf
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ResourceError, match=r"pip install 'bigq\[gguf\]'"):
        require_gguf()


# Tokenizers. scripts/check_gguf.py checks that llama.cpp makes the same tokens with this metadata.


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_and_merges_are_unchanged(kind: str, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, kind)
    size = tokenizer.get_vocab_size()
    said = read_vocabulary(tmp_path, size + 3)
    texts, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert isinstance(texts, list) and isinstance(types, list)
    assert texts[:size] == [tokenizer.id_to_token(id) for id in range(size)]
    assert types[size:] == [5, 5, 5] and len(set(texts)) == size + 3
    bos = tokenizer.token_to_id("<s>")
    assert types[bos] == types[tokenizer.token_to_id("</s>")] == 3
    assert said["tokenizer.ggml.bos_token_id"] == bos
    assert said["tokenizer.ggml.add_bos_token"] == (tokenizer.encode("a").ids[0] == bos)
    assert said["tokenizer.ggml.add_eos_token"] is False
    if kind in ("gpt-2", "llama-bpe", "qwen2"):
        assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("gpt2", kind)
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        assert said["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    else:
        assert said["tokenizer.ggml.model"] == "llama" and types[0] == 2 and types.count(6) == 256
        assert said["tokenizer.ggml.add_space_prefix"] == ("no prefix" not in kind)


def test_pieces_have_the_order_of_sentencepiece_whatever_file_they_come_from(tmp_path: Path) -> None:
    said = []
    for kind in ("sentencepiece", "byte fallback"):
        (tmp_path / kind).mkdir()
        said.append(read_vocabulary(tmp_path / kind, save_tokenizer(tmp_path / kind, kind).get_vocab_size()))
    orders = []
    for one in said:
        scores, types = one.pop("tokenizer.ggml.scores"), one["tokenizer.ggml.token_type"]
        assert isinstance(scores, list) and isinstance(types, list)
        merged = [id for id, type in enumerate(types) if type == 1 and len(one["tokenizer.ggml.tokens"][id]) > 1]  # type: ignore[index,arg-type]
        orders.append(sorted(merged, key=lambda id: -scores[id]))
    assert said[0] == said[1] and orders[0] == orders[1]


def test_the_shipped_tokenizer(tmp_path: Path) -> None:
    said = read_vocabulary(ASSETS / "tiny-llama", 258)
    assert said["tokenizer.ggml.pre"] == "gpt-2" and said["tokenizer.ggml.merges"] == ["[PAD] [PAD]"]
    assert (said["tokenizer.ggml.bos_token_id"], said["tokenizer.ggml.eos_token_id"]) == (256, 257)
    assert said["tokenizer.ggml.add_bos_token"] is False


def test_the_chat_template_is_written(tmp_path: Path) -> None:
    size = save_tokenizer(tmp_path, "gpt-2").get_vocab_size()
    assert "tokenizer.chat_template" not in read_vocabulary(tmp_path, size)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert read_vocabulary(tmp_path, size)["tokenizer.chat_template"] == "{{ messages }}"


def test_a_folder_without_tokenizer_gives_no_vocabulary(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path, 100) == {"tokenizer.ggml.model": "none"}


def _without_normalizer(values: dict[str, Any]) -> None:
    values["normalizer"] = {"type": "Lowercase"}


def _prefix_space(values: dict[str, Any]) -> None:
    values["pre_tokenizer"]["add_prefix_space"] = True


def _split_no_words(values: dict[str, Any]) -> None:
    values["pre_tokenizer"]["use_regex"] = False


def _own_words(values: dict[str, Any]) -> None:
    split = {"type": "Split", "pattern": {"Regex": r"\w+|\W+"}, "behavior": "Isolated", "invert": False}
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}]}


def _ignore_merges(values: dict[str, Any]) -> None:
    values["model"]["ignore_merges"] = True


def _word_level(values: dict[str, Any]) -> None:
    values["model"]["type"] = "WordLevel"


@pytest.mark.parametrize(
    "change", [_without_normalizer, _prefix_space, _split_no_words, _own_words, _ignore_merges, _word_level], ids=lambda f: f.__name__[1:]
)
def test_tokenizers_that_llama_cpp_does_not_support_are_refused(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    values = json.loads(byte_level(None).to_str())
    change(values)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json: llama\.cpp does not support this tokenizer .*--format gptq"):
        read_vocabulary(tmp_path, 4000)


def test_a_piece_that_is_not_merged_from_every_pair_is_refused(tmp_path: Path) -> None:
    """llama.cpp merges any two pieces that form a third. A tokenizer without that merge would not."""
    values = json.loads(byte_fallback().to_str())
    merges = values["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    del merges[next(i for i, text in enumerate(made) if made.count(text) > 1)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedModelError, match="merges are missing for"):
        read_vocabulary(tmp_path, 4000)


def test_unigram_of_sentencepiece_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes(byte_fallback(), kind=1))
    with pytest.raises(UnsupportedModelError, match="SentencePiece model is not BPE"):
        read_vocabulary(tmp_path, 4000)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    size = save_tokenizer(tmp_path, "gpt-2").get_vocab_size()
    with pytest.raises(CheckpointError, match=rf"has id {size - 1}, but the model's embedding has {size - 1} rows"):
        read_vocabulary(tmp_path, size - 1)


def test_a_tokenizer_in_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"no tokenizer\.json or tokenizer\.model"):
        read_vocabulary(tmp_path, 4000)


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no model": lambda v: v.pop("model"),
    "vocab is a list": lambda v: v["model"].update(vocab=[]),
    "id is a text": lambda v: v["model"]["vocab"].update(a="x"),
    "id is negative": lambda v: v["model"]["vocab"].update(a=-1),
    "merge of one": lambda v: v["model"]["merges"].append(["a"]),
    "merge is a number": lambda v: v["model"]["merges"].append(1),
    "added token is a number": lambda v: v["added_tokens"].append(7),
    "added token without an id": lambda v: v["added_tokens"].append({"content": "x"}),
    "added token with a negative id": lambda v: v["added_tokens"].append({"content": "x", "id": -5}),
    "template is a number": lambda v: v.update(post_processor={"type": "TemplateProcessing", "single": 5}),
}


@pytest.mark.parametrize("base", ["gpt-2", "byte fallback"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tokenizers_are_refused(damage: str, base: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, base)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    DAMAGES[damage](values)
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"fetch (it|them) again"):
        read_vocabulary(tmp_path, 4000)


def test_truncated_and_mutated_sentencepiece_files_are_refused_or_read(tmp_path: Path) -> None:
    whole = sentencepiece_bytes(byte_fallback(size=300))
    path = tmp_path / "tokenizer.model"
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        data = bytearray(whole[: generator.integers(1, len(whole))] if generator.random() < 0.5 else whole)
        data[generator.integers(len(data))] ^= int(generator.integers(1, 256))
        path.write_bytes(data)
        try:
            read_vocabulary(tmp_path, 4000)
            outcomes.add("read")
        except (CheckpointError, UnsupportedModelError):
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
