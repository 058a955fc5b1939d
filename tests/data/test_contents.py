"""What a file is follows from its contents, whatever it is named; what cannot be read is refused in bigq's words."""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_ids, save_ids
from texts import ids_of, save_lines, tokenizer_folder, words
from torch import Tensor

from bigq.calibration import calibration_rows, evaluation_rows
from bigq.data.records import is_known
from bigq.errors import BigqError, CalibrationError, ResourceError
from bigq.io import text_files
from bigq.io.text_files import contents_of, json_array

DOCUMENTS = [ids_of(30, 30 * i) for i in range(40)]
RECORDS = [{"n": len(d), "text": words(d)} for d in DOCUMENTS]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
TEXT = "\n".join(words(d) for d in DOCUMENTS) + "\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("model"), bos=True)


def rows_of(path: Path | str, model: Path, **changes: Any) -> Tensor:
    return calibration_rows(str(path), model, **{"samples": 6, "seqlen": 16, "seed": 0, **changes})


@pytest.fixture(scope="module")
def of_records(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    path = tmp_path_factory.mktemp("reference") / "t.jsonl"
    path.write_text(LINES)
    return rows_of(path, model)


@pytest.fixture(scope="module")
def of_text(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    path = tmp_path_factory.mktemp("reference") / "t.txt"
    path.write_text(TEXT)
    return rows_of(path, model)


@pytest.mark.parametrize("name", ["t.txt", "t.ndjson", "t.jsonl", "t.json", "t", "t.jsonl.txt", "t.gz"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("form", ["lines", "array", "pretty array"])
def test_records_are_read_under_any_name(form: str, packed: bool, name: str, tmp_path: Path, model: Path, of_records: Tensor) -> None:
    made = {"lines": LINES, "array": json.dumps(RECORDS), "pretty array": json.dumps(RECORDS, indent=2)}
    data = made[form].encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if packed else data)
    assert torch.equal(rows_of(path, model), of_records)


@pytest.mark.parametrize("name", ["t.txt", "t.md", "t.gz", "t"])
def test_text_is_read_under_any_name(name: str, tmp_path: Path, model: Path, of_text: Tensor) -> None:
    (tmp_path / name).write_text(TEXT)
    assert torch.equal(rows_of(tmp_path / name, model), of_text)


@pytest.mark.parametrize(
    "beginning",
    [
        "{",
        "[",
        "{w3} ",
        "[w3] ",
        '{"w3": ',
        '["w3"]\n',
        "[{w3}]\n",
        '{"level": 3}\nw5 ',
        "{}\n",
        "[]\n",
        "[{",
        '{"text": "w3"\n',
        "[[1, 2]]",
    ],
)
def test_text_that_begins_like_json_stays_text(beginning: str, tmp_path: Path, model: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text(beginning + TEXT)
    assert contents_of(path, is_known) == "text"
    assert evaluation_rows(str(path), model, seqlen=16, samples=None)[-1].tolist() == evaluation_rows_of(beginning + TEXT, tmp_path, model)


def evaluation_rows_of(text: str, tmp_path: Path, model: Path) -> list[int]:
    """The last row, by the tokenizer itself."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text).input_ids
    last: list[int] = ids[: len(ids) // 16 * 16][-16:]
    return last


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8"])
@pytest.mark.parametrize("form", ["text", "lines", "array"])
def test_a_byte_order_mark_is_read(form: str, encoding: str, tmp_path: Path, model: Path, of_text: Tensor, of_records: Tensor) -> None:
    """The mark itself is no token, and no part of the JSON."""
    text = {"text": TEXT, "lines": LINES, "array": json.dumps(RECORDS)}[form]
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    path = tmp_path / "t.txt"
    path.write_bytes((mark + text).encode(encoding))
    assert torch.equal(rows_of(path, model), of_text if form == "text" else of_records)


def test_a_mark_within_joined_files(tmp_path: Path, model: Path, of_records: Tensor) -> None:
    lines = LINES.splitlines(keepends=True)
    (tmp_path / "t.jsonl").write_text("\ufeff".join([*lines[:3], *lines[3:]]))
    assert torch.equal(rows_of(tmp_path / "t.jsonl", model), of_records)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (TEXT.encode("utf-16-le"), "looks like UTF-16LE without a byte order mark; convert it: iconv -f UTF-16LE -t UTF-8 FILE"),
        (TEXT.encode("utf-16-be"), "looks like UTF-16BE without a byte order mark"),
        ("café w3 ".encode("latin-1") * 100, r"is not UTF-8 text \(byte 0xe9\); if it is text, convert it: iconv"),
        (b"\xef\xbb\xbfw3 \xff" * 100, r"is not UTF-8 text \(byte 0xff\)"),
        (b"\xff\xfe" + b"\x00\xdc" * 9, "is not the UTF-16-?L?E? text that its byte order mark promises"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "is compressed with zstd, which bigq does not read; decompress it first: zstd -d FILE"),
        (b"PK\x03\x04" + bytes(100), "is a zip archive"),
        (b"%PDF-1.7\n" + bytes(100), "is a PDF"),
        (gzip.compress(b"\x28\xb5\x2f\xfd" + bytes(100), mtime=0), "is compressed with zstd"),
    ],
)
@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.json"])
def test_what_is_no_utf8_text_is_refused(name: str, data: bytes, said: str, tmp_path: Path, model: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    for read in (lambda: rows_of(path, model), lambda: evaluation_rows(str(path), model, seqlen=8, samples=None)):
        with pytest.raises(CalibrationError, match=said) as error:
            read()
        assert str(error.value).startswith(str(path)) and "codec" not in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("name", ["ids", "ids.txt", "ids.safetensors"])
def test_token_ids_are_read_under_any_name(name: str, tmp_path: Path, model: Path) -> None:
    ids = random_ids(10, 20)
    save_ids(tmp_path / "x.safetensors", ids).rename(tmp_path / name)
    assert torch.equal(rows_of(tmp_path / name, model), ids[:6, :16])


# Arrays.


def test_elements_of_every_length_around_that_of_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "PIECE_CHARS", 16)
    values: list[Any] = [{"text": "x" * n} for n in range(40)] + [12345678901234567890, [], {}, "a", None, {"a": [{"b": "]},"}]}]
    for indent in (None, 1):
        (tmp_path / "t.json").write_text(json.dumps(values, indent=indent) + "\n \n")
        assert [value for _, value in json_array(tmp_path / "t.json")] == values
    (tmp_path / "t.json").write_text("[ ]")
    assert list(json_array(tmp_path / "t.json")) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"text": "w3"}, {"text": "w4"]', "record 2: is not JSON"),
        ('[{"text": "w3"}, {"text": "w4"}', "record 2: no comma or bracket follows it; the file is damaged or incomplete"),
        ('[{"text": "w3"} {"text": "w4"}]', "record 1: no comma or bracket"),
        ('[{"text": "w3"}] [{"text": "w4"}]', "record 1: text follows the end of the array"),
        ('[{"text": "w3"}, 7]', "record 2: is no JSON object"),
        ('[{"text": "w3"}, {"text": ' + "9" * 5000 + "}]", "record 2: is not JSON"),
        ('[{"text": "w3"}, ' + '{"a":' * 100000 + "]", "record 2: "),
        ('[{"text": "w3"}, {"text": "\\ud800"}]', "record 2: its text holds half of a surrogate pair"),
    ],
)
def test_a_damaged_array_names_the_record(text: str, said: str, tmp_path: Path, model: Path) -> None:
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(CalibrationError, match=said) as error:
        rows_of(tmp_path / "t.txt", model)
    assert str(error.value).startswith(str(tmp_path / "t.txt")) and str(error.value).isprintable()


def test_an_array_is_not_held_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps([{"text": "w3 " * 1000}] * 4000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in json_array(path)) == 4000
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 8
    finally:
        tracemalloc.stop()


def test_a_long_element_is_refused(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "LONGEST_DOCUMENT", 2**17)
    path = tmp_path / "t.json"
    path.write_text(json.dumps([{"text": "w3 " * 2**17}]))
    with pytest.raises(CalibrationError, match=r"record 1: .*longer than 131072 characters"):
        rows_of(path, model)


def test_strings_of_an_array_are_documents(tmp_path: Path, model: Path, of_records: Tensor) -> None:
    (tmp_path / "t.json").write_text(json.dumps([record["text"] for record in RECORDS]))
    assert torch.equal(rows_of(tmp_path / "t.json", model), of_records)


# Parquet.


@pytest.mark.parametrize("name", ["t.parquet", "t.txt", "t"])
def test_parquet_is_read_under_any_name(name: str, tmp_path: Path, model: Path, of_records: Tensor) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / name, row_group_size=7)
    assert torch.equal(rows_of(tmp_path / name, model), of_records)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:-9])
    with pytest.raises(CalibrationError, match=re.escape(str(tmp_path / name)) + ".*cannot be read as parquet") as error:
        rows_of(tmp_path / name, model)
    assert str(error.value).isprintable()


def test_damaged_parquet_raises_nothing_else(tmp_path: Path, model: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS[:8]), path)
    data, rng, said = path.read_bytes(), random.Random(0), list[str]()
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(4, len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            rows_of(path, model)
        except BigqError as error:
            said.append(str(error))
    assert len(said) > 30 and all(each.isprintable() and str(tmp_path) in each for each in said)


def test_parquet_that_expands_far_is_refused(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    from bigq.io import parquet_file

    monkeypatch.setattr(parquet_file, "FREE_EXPANSION", 0)
    table = pyarrow.Table.from_pylist([{"text": f"{i} " + "w3 " * 10000} for i in range(100)])
    parquet.write_table(table, tmp_path / "t.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(CalibrationError, match="expands to more than 100 times its size"):
        rows_of(tmp_path / "t.parquet", model)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t").write_bytes(b"PAR1" + bytes(100))
    for source in (str(tmp_path / "t"), "ultrachat", "wikitext2"):
        with pytest.raises(ResourceError, match="reading parquet needs the package pyarrow: pip install pyarrow"):
            rows_of(source, model)


def test_records_that_no_field_of_is_known_are_refused(tmp_path: Path, model: Path) -> None:
    """Lines of JSON objects are not text; the message names the field with the longest text, and that works."""
    path = save_lines(tmp_path / "t.txt", [{"id": i, "source": "w3", "body": record["text"]} for i, record in enumerate(RECORDS)])
    with pytest.raises(CalibrationError, match=r"line 1: has no field 'text', and no conversation \(it has id, source, body\)") as error:
        rows_of(path, model)
    advised = str(error.value).rpartition("--text-field ")[2]
    assert advised == "body"
    assert len(rows_of(path, model, text_field=advised)) == 6
