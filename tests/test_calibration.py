"""Text to rows of token ids: every source, the same rows for the same seed, exact complaints.

The tokenizer makes token i of the word "wi", so that rows can be read back against the text.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import re
import shutil
import struct
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from models import FIRST_ID, VOCABULARY, random_ids, save_ids, word_tokenizer
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bigq.calibration import calibration_rows, evaluation_rows, require_vocabulary
from bigq.data.given import GIVEN, calibration_source
from bigq.data.opening import BUILTIN_CALIBRATION, BUILTIN_HELDOUT
from bigq.errors import BigqError, CalibrationError, UsageError
from bigq.io.text_files import LONGEST_LINE, PIECE_CHARS, json_lines, text_pieces

PERIOD = VOCABULARY - FIRST_ID


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as far as calibration looks at one."""
    folder = tmp_path_factory.mktemp("model")
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bos")
    word_tokenizer(bos=True).save_pretrained(folder)
    return folder


def ids_of(count: int, start: int = 0) -> list[int]:
    """A long sequence of ids without a short period: i², wrapped."""
    return [FIRST_ID + (i * i + i // PERIOD) % PERIOD for i in range(start, start + count)]


def words(ids: Iterable[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def text_file(path: Path, ids: list[int], per_line: int = 10) -> Path:
    lines = [words(ids[i : i + per_line]) + "\n" for i in range(0, len(ids), per_line)]
    path.write_text("".join(lines))
    return path


def jsonl(path: Path, documents: list[list[int]]) -> Path:
    data = "".join(json.dumps({"text": words(d), "n": len(d)}) + "\n" for d in documents).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def rows_of(path: Path, model: Path, samples: int = 6, seqlen: int = 16, seed: int = 0) -> Tensor:
    rows = calibration_rows(str(path), model, samples=samples, seqlen=seqlen, seed=seed)
    assert rows.dtype == torch.int64 and rows.shape == (samples, seqlen)
    return rows


def is_slice_of(row: Tensor, ids: list[int]) -> bool:
    return words(row.tolist()) + " " in words(ids) + " "


def test_text_is_cut_into_whole_rows(tmp_path: Path, model: Path) -> None:
    """Rows are stretches of the text at multiples of the length, none twice, in the text's order; nothing is padded."""
    ids = ids_of(400)
    rows = rows_of(text_file(tmp_path / "t.txt", ids), model)
    whole = [ids[i : i + 16] for i in range(0, 400, 16)]
    places = [whole.index(row) for row in rows.tolist()]
    assert places == sorted(set(places))
    assert int(rows.min()) >= FIRST_ID


def test_rows_are_drawn_from_all_of_a_moderate_text(tmp_path: Path, model: Path) -> None:
    """Up to four times the tokens asked for: not just the text's beginning."""
    ids = ids_of(16 * 24)
    path = text_file(tmp_path / "t.txt", ids)
    whole = [ids[i : i + 16] for i in range(0, len(ids), 16)]
    seen = {whole.index(row) for seed in range(20) for row in rows_of(path, model, seed=seed).tolist()}
    assert seen == set(range(24))


def test_exactly_enough_text_is_enough(tmp_path: Path, model: Path) -> None:
    ids = ids_of(6 * 16)
    rows = rows_of(text_file(tmp_path / "t.txt", ids), model)
    assert rows.flatten().tolist() == ids


@pytest.mark.parametrize("kind", ["t.txt", "t.txt.gz", "t.jsonl", "t.jsonl.gz", "t.json"])
def test_same_seed_same_rows_other_seed_other_rows(kind: str, tmp_path: Path, model: Path) -> None:
    path = tmp_path / kind
    if "json" in kind:
        jsonl(path, [ids_of(30, 30 * i) for i in range(40)])
    elif kind.endswith(".gz"):
        path.write_bytes(gzip.compress((words(ids_of(1200)) + "\n").encode()))
    else:
        text_file(path, ids_of(1200))
    one, same, other = (rows_of(path, model, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_gzip_changes_nothing(tmp_path: Path, model: Path) -> None:
    documents = [ids_of(30, 30 * i) for i in range(40)]
    plain = rows_of(jsonl(tmp_path / "t.jsonl", documents), model)
    assert torch.equal(plain, rows_of(jsonl(tmp_path / "t.jsonl.gz", documents), model))
    text = text_file(tmp_path / "t.txt", ids_of(1200))
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(text.read_bytes()))
    assert torch.equal(rows_of(text, model), rows_of(tmp_path / "t.txt.gz", model))


def test_documents_are_packed_one_after_another(tmp_path: Path, model: Path) -> None:
    """Each document whole, in the order drawn, blank lines passed over; only the last row's rest is dropped."""
    documents = [ids_of(16, 1000 * i) for i in range(6)]
    path = jsonl(tmp_path / "t.jsonl", documents)
    path.write_text(path.read_text().replace("\n", "\n\n  \n"))
    rows = rows_of(path, model)
    assert sorted(rows.tolist()) == sorted(documents)


def test_documents_are_drawn_from_the_whole_of_a_long_file(tmp_path: Path, model: Path) -> None:
    """Reservoir sampling: of 4000 documents the last ones are as likely as the first."""
    documents = [[FIRST_ID + i // 1000] * 16 for i in range(4000)]
    path = jsonl(tmp_path / "t.jsonl", documents)
    rows = rows_of(path, model, samples=100)
    counts = torch.bincount(rows[:, 0], minlength=FIRST_ID + 4)[FIRST_ID:]
    assert int(counts.min()) >= 10 and int(counts.sum()) == 100


def test_short_documents_grow_the_reservoir(tmp_path: Path, model: Path) -> None:
    """Documents of one word: 1024 of them are not enough for what is asked, and more are taken."""
    path = jsonl(tmp_path / "t.jsonl", [[i] for i in ids_of(3000)])
    assert len(rows_of(path, model, samples=150)) == 150


def test_special_tokens_once_per_text_and_once_per_document(tmp_path: Path, model_with_bos: Path) -> None:
    rows = rows_of(text_file(tmp_path / "t.txt", ids_of(16 * 6 - 1)), model_with_bos)
    assert rows.flatten().tolist() == [1, *ids_of(16 * 6 - 1)]
    rows = rows_of(jsonl(tmp_path / "t.jsonl", [ids_of(15, 100 * i) for i in range(6)]), model_with_bos)
    assert rows[:, 0].tolist() == [1] * 6 and int((rows == 1).sum()) == 6


def test_text_longer_than_one_piece(tmp_path: Path, model_with_bos: Path) -> None:
    """Text is tokenized in pieces of 64 K characters; where they meet nothing is lost, doubled or marked as a beginning."""
    ids = ids_of(40000)
    path = text_file(tmp_path / "t.txt", ids)
    assert path.stat().st_size > 2 * 65536
    rows = evaluation_rows(str(path), model_with_bos, seqlen=100, samples=None)
    assert rows.flatten().tolist() == [1, *ids][:40000]


def test_token_ids_are_taken_in_order(tmp_path: Path, model: Path) -> None:
    """Prepared ids are the user's own choice: the first rows, shortened from the end, without a tokenizer."""
    ids = random_ids(10, 20)
    path = save_ids(tmp_path / "ids.safetensors", ids)
    assert torch.equal(rows_of(path, tmp_path / "no-model"), ids[:6, :16])
    assert torch.equal(rows_of(path, model, seed=5), ids[:6, :16])
    assert torch.equal(rows_of(save_ids(tmp_path / "i32.safetensors", ids.int()), model), ids[:6, :16])


@pytest.mark.parametrize("shape", [(-1,), (1, -1)])
def test_one_long_row_is_cut(tmp_path: Path, model: Path, shape: tuple[int, ...]) -> None:
    ids = random_ids(1, 6 * 16 + 5)
    path = save_ids(tmp_path / "ids.safetensors", ids.reshape(shape))
    assert torch.equal(rows_of(path, model), ids[0, : 6 * 16].view(6, 16))


@pytest.mark.parametrize("have", [95, 90, 16, 15, 0])
def test_too_short_text_says_how_much_is_missing(tmp_path: Path, model: Path, have: int) -> None:
    """96 tokens are asked for. What does not fill a row does not count."""
    path = text_file(tmp_path / "t.txt", ids_of(have))
    missing = 96 - have // 16 * 16
    with pytest.raises(CalibrationError, match=rf"\b{missing} tokens are missing") as error:
        rows_of(path, model)
    assert str(path) in str(error.value)
    in_all = "" if have >= 16 else f" ({have} tokens in all)"
    assert f"has {have // 16} rows of 16 tokens{in_all}, 6 were asked for" in str(error.value)
    remedy = f", or use --samples {have // 16}" if have >= 16 else ", or use --seqlen 2" if have else ""
    assert str(error.value).endswith(f"give more text{remedy}")


def test_too_few_rows_of_ids(tmp_path: Path, model: Path) -> None:
    path = save_ids(tmp_path / "ids.safetensors", random_ids(4, 16))
    with pytest.raises(CalibrationError, match=r"32 tokens are missing.*--samples 4"):
        rows_of(path, model)


def test_rows_of_ids_too_short(tmp_path: Path, model: Path) -> None:
    path = save_ids(tmp_path / "ids.safetensors", random_ids(9, 15))
    with pytest.raises(CalibrationError, match=r"15 tokens, 16 were asked for; use --seqlen 15"):
        rows_of(path, model)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(
    "line", ['{"text": "w3"', "plain text", '["w3"]', '{"content": "w3"}', '{"text": 7}', '{"text": null}', "[" * 100000]
)
def test_bad_json_line_is_named(tmp_path: Path, model: Path, line: str, gz: bool) -> None:
    good = json.dumps({"text": words(ids_of(40))})
    text = "\n".join([*[good] * 6, line, *[good] * 6]) + "\n"
    path = tmp_path / ("t.jsonl.gz" if gz else "t.jsonl")
    path.write_bytes(gzip.compress(text.encode()) if gz else text.encode())
    with pytest.raises(CalibrationError, match=r"line 7\b") as error:
        rows_of(path, model)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_invalid_utf8(tmp_path: Path, model: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "' + b"w3 " * 100 + b"\xff\xfe" + b'"}\n')
    with pytest.raises(CalibrationError, match=re.escape(str(path))):
        rows_of(path, model)


@pytest.mark.parametrize("name", ["t.txt.gz", "t.jsonl.gz"])
def test_damaged_gzip(tmp_path: Path, model: Path, name: str) -> None:
    path = tmp_path / name
    data = gzip.compress((json.dumps({"text": words(ids_of(4000))}) + "\n").encode())
    for damaged in (b"not gzip at all", data[: len(data) // 2], data[:20] + b"\x00" * 40 + data[60:]):
        path.write_bytes(damaged)
        with pytest.raises(CalibrationError, match=re.escape(str(path))):
            rows_of(path, model)


def test_missing_file_and_folder(tmp_path: Path, model: Path) -> None:
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(CalibrationError, match=r"--calibration .*no such file"):
            rows_of(path, model)


def test_ids_under_another_name(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "x.safetensors"
    for tensors in ({"ids": random_ids()}, {"input_ids": random_ids().float()}, {"input_ids": random_ids()[None]}):
        save_file(tensors, path)
        with pytest.raises(CalibrationError, match="input_ids"):
            rows_of(path, model)
    path.write_bytes(b"short")
    with pytest.raises(BigqError, match=re.escape(str(path))):
        rows_of(path, model)


def test_tokenizer_missing(tmp_path: Path) -> None:
    path = text_file(tmp_path / "t.txt", ids_of(400))
    (tmp_path / "m").mkdir()
    with pytest.raises(CalibrationError, match=r"tokenizer cannot be loaded"):
        rows_of(path, tmp_path / "m")


def test_vocabulary_bounds() -> None:
    ids = torch.tensor([[0, 5], [9, 3]])
    require_vocabulary(ids, 10)
    with pytest.raises(CalibrationError, match=r"0 to 9.* 9\b"):
        require_vocabulary(ids, 9)
    with pytest.raises(CalibrationError, match="-1"):
        require_vocabulary(ids - 1, 10)


def test_evaluation_takes_all_rows_in_order(tmp_path: Path, model: Path) -> None:
    ids = ids_of(105)
    path = text_file(tmp_path / "t.txt", ids)
    rows = evaluation_rows(str(path), model, seqlen=10, samples=None)
    assert rows.shape == (10, 10) and rows.flatten().tolist() == ids[:100]
    assert torch.equal(evaluation_rows(str(path), model, seqlen=10, samples=3), rows[:3])
    assert torch.equal(evaluation_rows(str(path), model, seqlen=10, samples=50), rows)


def test_evaluation_documents_in_order(tmp_path: Path, model: Path) -> None:
    documents = [ids_of(7, 50 * i) for i in range(9)]
    rows = evaluation_rows(str(jsonl(tmp_path / "t.jsonl", documents)), model, seqlen=10, samples=None)
    assert rows.flatten().tolist() == [i for d in documents for i in d][:60]


def test_evaluation_of_less_than_a_row(tmp_path: Path, model: Path) -> None:
    path = text_file(tmp_path / "t.txt", ids_of(9))
    with pytest.raises(CalibrationError, match=r"less than one row of 10 tokens"):
        evaluation_rows(str(path), model, seqlen=10, samples=None)


def test_rows_are_parts_of_the_text_with_bos(tmp_path: Path, model_with_bos: Path) -> None:
    ids = ids_of(1000)
    rows = rows_of(text_file(tmp_path / "t.txt", ids), model_with_bos)
    assert all(is_slice_of(row, [1, *ids]) for row in rows)


# Files that mean harm.


def test_pieces_of_text_are_those_of_readlines(tmp_path: Path) -> None:
    """Tokens depend on where text is cut: lines around the length of a piece, and one longer than many."""
    sizes = [
        10,
        PIECE_CHARS - 12,
        10,
        PIECE_CHARS - 11,
        1,
        1,
        PIECE_CHARS,
        5,
        3 * PIECE_CHARS,
        0,
        0,
        PIECE_CHARS - 1,
        2,
        *range(0, 9000, 7),
    ]
    path = tmp_path / "t.txt"
    path.write_text("".join("é" * size + ("\r\n" if size % 3 else "\n") for size in sizes) + "no end", encoding="utf-8", newline="")
    expected = []
    with open(path, encoding="utf-8") as file:
        while lines := file.readlines(PIECE_CHARS):
            expected.append("".join(lines))
    assert list(text_pieces(path)) == expected and len(expected) > 5
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert list(text_pieces(tmp_path / "t.txt.gz")) == expected


def test_the_builtin_texts_are_cut_as_ever() -> None:
    for path in (BUILTIN_CALIBRATION, BUILTIN_HELDOUT):
        with open(path, encoding="utf-8") as file:
            assert "".join(text_pieces(path)) == file.read()


def test_a_line_without_end_is_cut(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigq.io.text_files.LONGEST_LINE", 100)
    path = tmp_path / "t.txt"
    path.write_text("w3 " * 1000)
    pieces = list(text_pieces(path))
    assert max(map(len, pieces)) <= PIECE_CHARS + 100 and "".join(pieces) == "w3 " * 1000
    assert rows_of(path, model).unique().tolist() == [3]


def test_a_file_that_is_one_line_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB without a newline, of which no more is held than one line may have."""
    path = tmp_path / "t.txt"
    path.write_text("w3 " * 2**20 * 21)
    tracemalloc.start()
    try:
        assert sum(map(len, text_pieces(path))) == 63 * 2**20
        assert tracemalloc.get_traced_memory()[1] < 6 * LONGEST_LINE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["bomb.txt.gz", "bomb.jsonl.gz", "bomb.json.gz"])
def test_a_gzip_bomb_is_refused(name: str, tmp_path: Path) -> None:
    """A GiB of one line in a MB: what is expanded is bounded, and so is what is held of it."""
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'{"text": "') + gzip.compress(b" " * 2**24) * 64)
    tracemalloc.start()
    try:
        with pytest.raises(CalibrationError, match=r"expands to more than 100 times|longer than") as error:
            for _ in text_pieces(path) if name == "bomb.txt.gz" else json_lines(path):
                pass
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**24
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)


def test_text_that_packs_well_is_read(tmp_path: Path, model: Path) -> None:
    """The same line over and over comes to 300 times its size, but not to much."""
    path = tmp_path / "t.txt.gz"
    path.write_bytes(gzip.compress(b"w3 w4 w5\n" * 200_000))
    assert path.stat().st_size * 100 < 9 * 200_000
    assert len(rows_of(path, model)) == 6


def test_a_long_document_is_refused(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "t.jsonl", [ids_of(40)] * 6)
    size = max(map(len, path.read_text().splitlines(keepends=True)))
    monkeypatch.setattr("bigq.io.text_files.LONGEST_DOCUMENT", size)
    assert len(rows_of(path, model)) == 6
    monkeypatch.setattr("bigq.io.text_files.LONGEST_DOCUMENT", size - 1)
    with pytest.raises(CalibrationError, match=rf"line 1: longer than {size - 1} characters"):
        rows_of(path, model)


def test_long_documents_are_not_all_held(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigq.data.rows.MAX_KEPT_CHARS", 1000)
    with pytest.raises(CalibrationError, match="too long to draw"):
        rows_of(jsonl(tmp_path / "t.jsonl", [ids_of(40)] * 20), model)


@pytest.mark.parametrize(
    "line", [r'{"text": "\ud800"}', '{"text": ' + "9" * 5000 + "}", '{"a":' * 3000 + "1" + "}" * 3000, '{"text": NaN}']
)
def test_a_hostile_line_is_named(line: str, tmp_path: Path, model: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": "w3"}) + "\n" + line + "\n")
    with pytest.raises(CalibrationError, match="line 2") as error:
        rows_of(path, model)
    assert str(error.value).isprintable()


def test_more_token_ids_than_anyone_asks_for(tmp_path: Path, model: Path) -> None:
    """A sparse file of a terabyte, whose header is sound."""
    path = tmp_path / "ids.safetensors"
    header = json.dumps({"input_ids": {"dtype": "I64", "shape": [2**20, 2**17], "data_offsets": [0, 2**40]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    try:
        os.truncate(path, 8 + len(header) + 2**40)
    except OSError:
        pytest.skip("this file system has no files of a terabyte")
    with pytest.raises(CalibrationError, match="more than 67108864 token ids"):
        rows_of(path, model)


def test_a_tokenizer_that_fails_on_the_text(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panics of a tokenizer's Rust part are no Exceptions; what the user does is not the tokenizer's failure."""

    class PanicException(BaseException):
        pass

    path = text_file(tmp_path / "t.txt", ids_of(400))
    raised: list[BaseException] = [PanicException("index out\nof bounds"), TypeError("text"), KeyboardInterrupt()]

    def fails(*args: object, **kwargs: object) -> None:
        raise raised[0]

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", fails)
    for said in (r"fails on the text \(PanicException: index out of bounds\)", "TypeError: text"):
        with pytest.raises(CalibrationError, match=said):
            rows_of(path, model)
        raised.pop(0)
    with pytest.raises(KeyboardInterrupt):
        rows_of(path, model)


def test_a_tokenizer_file_beyond_bounds(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    with open(folder / "tokenizer.json", "ab") as file:
        file.truncate(2**29)
    with pytest.raises(CalibrationError, match=r"tokenizer\.json: is larger than"):
        rows_of(text_file(tmp_path / "t.txt", ids_of(400)), folder)


# Data that is given in Python.


class Dataset:
    """Texts that can be read again and again, as those of ``datasets.Dataset``."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def __iter__(self) -> Iterator[dict[str, object]]:
        return iter([{"text": text, "n": len(text)} for text in self._texts])


def given_rows(value: object, model: Path, **changes: int) -> Tensor:
    sizes = {"samples": 6, "seqlen": 16, "seed": 0, **changes}
    return calibration_rows(calibration_source(value, "calibration"), model, **sizes)


@pytest.mark.parametrize("kind", ["list", "tuple", "generator", "dataset", "mappings"])
def test_texts_make_the_rows_of_the_same_jsonl(kind: str, tmp_path: Path, model_with_bos: Path) -> None:
    """The draw from more documents than are needed included."""
    made = [ids_of(30, 30 * i) for i in range(60)]
    texts = [words(d) for d in made]
    given = {
        "list": texts,
        "tuple": tuple(texts),
        "generator": (text for text in texts),
        "dataset": Dataset(texts),
        "mappings": [{"text": text} for text in texts],
    }[kind]
    path = jsonl(tmp_path / "t.jsonl", made)
    source = calibration_source(given, "calibration")
    for seed in (0, 5):
        expected = rows_of(path, model_with_bos, seed=seed)
        assert torch.equal(calibration_rows(source, model_with_bos, samples=6, seqlen=16, seed=seed), expected), "read once more"
    expected = evaluation_rows(str(path), model_with_bos, seqlen=16, samples=5)
    assert torch.equal(evaluation_rows(source, model_with_bos, seqlen=16, samples=5), expected)


def test_sequences_of_different_lengths_are_joined(model: Path) -> None:
    ids = ids_of(100)
    given = [ids[:10], ids[10:50], ids[50:53], ids[53:]]
    assert given_rows(given, model).flatten().tolist() == ids[:96]
    assert given_rows(ids, model).flatten().tolist() == ids[:96], "one long sequence"
    assert given_rows(torch.tensor(ids), model).flatten().tolist() == ids[:96]


def test_no_more_of_an_endless_dataset_is_read_than_needed(model: Path) -> None:
    class Endless:
        def __iter__(self) -> Iterator[dict[str, list[int]]]:
            for start in range(1000):
                assert start < 7, "reads on and on"
                yield {"input_ids": ids_of(20, 20 * start)}

    assert given_rows(Endless(), model).tolist() == [ids_of(20, 20 * i)[:16] for i in range(6)]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "calibration: a NoneType is not calibration data; give a path, c4, builtin"),
        (3.5, "calibration: a float is not"),
        (b"text", "calibration: a bytes is not"),
        ([], "calibration: is empty"),
        ({"labels": [1]}, "calibration: a mapping needs a field input_ids"),
        ([{"labels": [1]}], "calibration: item 0 is a mapping without a text or input_ids field"),
        (["a", None], "calibration: item 1 is a NoneType"),
        (torch.rand(3, 4), r"must be integers \[N, T\] or \[T\], not torch.float32 \[3, 4\]"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), r"not torch.int64 \[2, 2, 2\]"),
        (torch.zeros(3, 4, dtype=torch.bool), "not torch.bool"),
        (torch.zeros(0, 4, dtype=torch.int64), "holds no token ids"),
        ([2**70, 1], "are no token ids"),
    ],
)
def test_what_is_no_data_is_named(value: object, said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        calibration_source(value, "calibration")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([ids_of(8), ids_of(8)], "calibration: its rows have 8 tokens, 16 were asked for; use --seqlen 8"),
        ([ids_of(20), ids_of(16)], "calibration: has 2 rows of 16 tokens, 6 were asked for: 64 tokens are missing"),
        (["w5 w6"], "calibration: has 0 rows"),
        (["w5", {"input_ids": [1]}], "item 1 holds token ids, but the first item holds text"),
        ([{"input_ids": [1.5]}], "calibration: item 0: token ids must be integers"),
        ([{"input_ids": ["a"]}], "calibration: item 0: are no token ids"),
    ],
)
def test_data_that_is_too_little_or_mixed_is_named(value: object, said: str, model: Path) -> None:
    with pytest.raises(CalibrationError, match=said):
        given_rows(value, model)


def test_a_source_is_a_string_in_records_and_copies() -> None:
    source = calibration_source([[1, 2]], "calibration")
    assert source == GIVEN == json.loads(json.dumps(source)) and type(copy.deepcopy(source)) is str
    assert calibration_source(source, "calibration") is source and calibration_source(Path("a/b"), "calibration") == "a/b"
    with pytest.raises(UsageError, match="resume it in Python"):
        calibration_rows(GIVEN, Path("model"), samples=1, seqlen=1, seed=0)
