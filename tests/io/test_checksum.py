"""Sealed records: the change of a single byte is detected, and no contents of a file raise anything but bigq's own errors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigq.errors import CheckpointError, ResourceError
from bigq.io import checksum
from bigq.io.checksum import load_record, read_record_bytes, save_record, seal, unseal

VALUES: list[dict[str, Any]] = [
    {},
    {"a": 1},
    {"unit": "block-7", "sizes": [1, 2.5, -0.0, 1e300, 2**70], "deep": {"ü": None, "x\ny": [True, False, {}, []]}, "empty": ""},
    {"line": "a\u2028b\x00\ud800", "nan": [float("inf")]},
]
KINDS = pytest.mark.parametrize("line", [False, True], ids=["file", "line"])


@KINDS
@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_seal_and_unseal(value: dict[str, Any], line: bool) -> None:
    data = seal(value, line=line)
    assert unseal(data, line=line) == value
    assert data.endswith(b"\n") and (not line or data.count(b"\n") == 1)
    assert json.loads(data) == {**value, "check": json.loads(data)["check"]}, "any JSON reader can read it"


def test_tuples_are_read_as_lists() -> None:
    assert unseal(seal({"a": (1, (2,))})) == {"a": [1, [2]]}


@KINDS
@pytest.mark.parametrize("value", VALUES[:3], ids=range(3))
def test_no_byte_can_be_changed_deleted_or_inserted(value: dict[str, Any], line: bool) -> None:
    data = seal(value, line=line)
    for at in range(len(data)):
        assert unseal(data[:at] + data[at + 1 :], line=line) is None, f"without byte {at}"
        for bit in range(8):
            assert unseal(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :], line=line) is None, f"bit {bit} of byte {at}"
    for at in range(len(data) + 1):
        for byte in b' \t\r\n\x000a",}':
            inserted = data[:at] + bytes([byte]) + data[at:]
            assert unseal(inserted, line=line) is None, f"{byte:#x} before byte {at}"


@KINDS
def test_every_byte_value_in_every_place(line: bool) -> None:
    data = seal({"n": 10, "s": "E"}, line=line)
    for at in range(len(data)):
        for byte in range(256):
            if byte != data[at]:
                assert unseal(data[:at] + bytes([byte]) + data[at + 1 :], line=line) is None


@KINDS
def test_a_torn_record_is_none(line: bool) -> None:
    data = seal(VALUES[2], line=line)
    assert all(unseal(data[:length], line=line) is None for length in range(len(data)))


def test_one_line_and_indented_forms_are_distinguished() -> None:
    assert unseal(seal(VALUES[2]), line=True) is None and unseal(seal(VALUES[2], line=True)) is None


def test_the_same_object_in_other_json_text_is_none() -> None:
    """Although the checksum is right."""
    value = {"a": 1, "b": [2.0, "ü"]}
    whole = json.loads(seal(value))
    others = [
        json.dumps(whole, indent=1) + "\n",
        json.dumps(whole, indent=2),
        json.dumps(whole, indent=2, ensure_ascii=False) + "\n",
        json.dumps({"check": whole["check"], **value}, indent=2) + "\n",
        json.dumps({"b": whole["b"], "a": 1, "check": whole["check"]}, indent=2) + "\n",
        (json.dumps(whole, indent=2) + "\n").replace("2.0", "2.00"),
        (json.dumps(whole, indent=2) + "\n").replace('"a": 1', '"a": 3,\n  "a": 1'),
    ]
    assert [unseal(other.encode()) for other in others] == [None] * len(others)


def test_a_checksum_of_something_else_is_none() -> None:
    body = json.dumps({"a": 1}, indent=2) + "\n"
    for check in ("", None, 5, [], hashlib.sha256(b"x").hexdigest()[:32], hashlib.sha256(body.encode()).hexdigest()):
        assert unseal((json.dumps({"a": 1, "check": check}, indent=2) + "\n").encode()) is None
    assert unseal((json.dumps({"a": 1, "check": hashlib.sha256(body.encode()).hexdigest()[:32]}, indent=2) + "\n").encode()) == {"a": 1}


GARBAGE = {
    "empty": b"",
    "newline": b"\n",
    "null": b"null\n",
    "list": b"[]\n",
    "number": b"1\n",
    "empty object": b"{}\n",
    "zeros": b"\x00" * 4096,
    "not UTF-8": b"\xff\xfe{}",
    "UTF-16": "{}".encode("utf-16"),
    "BOM": b"\xef\xbb\xbf" + seal({"a": 1}),
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "deep and whole": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b',"check":"x"}\n',
    "deep within Python's own limit": b'{"a":' + b"[" * 900 + b"]" * 900 + b',"check":"x"}\n',
    "digits": b'{"a":' + b"9" * 100_000 + b',"check":"x"}\n',
    "exponent": b'{"a":1e999999999,"check":"x"}\n',
    "NaN": b'{"a":NaN,"check":"x"}\n',
    "surrogate": b'{"a":"\\ud800","check":"\\udfff"}\n',
    "large": b'{"a":"' + b"x" * 2**22 + b'"}\n',
}


@KINDS
@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_none_and_the_error_names_the_file(data: bytes, line: bool, tmp_path: Path) -> None:
    assert unseal(data, line=line) is None
    path = tmp_path / "job.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"job\.json: damaged or edited by hand; turn back$"):
        load_record(path, "turn back")


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_none(data: bytes) -> None:
    assert unseal(data) is None and unseal(data, line=True) is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=5).filter(lambda key: key != "check"), _JSON, max_size=5), st.data())
@settings(max_examples=200, deadline=None)
def test_any_object_is_read_and_any_alteration_is_detected(value: dict[str, Any], data: st.DataObject) -> None:
    line = data.draw(st.booleans())
    whole = seal(value, line=line)
    assert unseal(whole, line=line) == value
    at = data.draw(st.integers(0, len(whole) - 1))
    with_this = data.draw(st.binary(max_size=3).filter(lambda part: part != whole[at : at + 1]))
    altered = whole[:at] + with_this + whole[at + 1 :]
    assert altered == whole or unseal(altered, line=line) is None


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert load_record(path, "") is None and read_record_bytes(path) is None
    save_record(path, VALUES[2])
    assert load_record(path, "") == VALUES[2] and read_record_bytes(path) == seal(VALUES[2])
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert read_record_bytes(path / "below") is None, "below a file there is nothing either"


def test_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=f"^{tmp_path}: cannot be read: Is a directory; check the disk"):
        read_record_bytes(tmp_path)
    with pytest.raises(ResourceError, match="cannot be written"):
        save_record(tmp_path, {})


def test_a_record_above_the_maximum_size_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with open(path, "wb") as file:
        file.truncate(2**40)
    limit, checksum.MAX_BYTES = checksum.MAX_BYTES, 2**20
    try:
        with pytest.raises(CheckpointError, match=r"journal\.jsonl: larger than 1048576 bytes"):
            read_record_bytes(path)
        os.truncate(path, 2**20)
        assert len(read_record_bytes(path) or b"") == 2**20
    finally:
        checksum.MAX_BYTES = limit


@pytest.mark.parametrize(("failures", "comes"), [(1, True), (2, True), (3, False)])
def test_a_file_replaced_over_nfs_is_read_again(failures: int, comes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "owner.json"
    path.write_bytes(b"x")
    left = [failures]

    def opening(*args: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return open(*args)

    monkeypatch.setattr(checksum, "open", opening, raising=False)
    if comes:
        assert read_record_bytes(path) == b"x"
    else:
        with pytest.raises(ResourceError, match=r"owner\.json: cannot be read: Stale file handle"):
            read_record_bytes(path)
