"""Opens what a specification names, or what was given in Python: as token ids, as documents, or as one text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from torch import Tensor

from bigq.data.given import GIVEN, CalibrationData, sequences
from bigq.data.given import documents as given_documents
from bigq.data.records import FIELDS, Document, document, is_known
from bigq.data.spec import BUILTIN, HubText, Part, parts_of
from bigq.data.token_ids import rows_from_file, rows_from_sequences, rows_of
from bigq.errors import CalibrationError, UsageError
from bigq.io.hub import fetch_dataset_file
from bigq.io.parquet_file import parquet_records, require_pyarrow
from bigq.io.text_files import PIECE_CHARS, Contents, contents_of, json_array, json_lines, text_pieces

ASSETS = Path(__file__).parents[1] / "assets"
BUILTIN_CALIBRATION = ASSETS / "calibration.txt"
BUILTIN_HELDOUT = ASSETS / "heldout.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Data that was opened. name: for messages. label: a short name, without folders. Exactly one of the others is there.

    ids: (rows wanted or None for all, tokens per row) → rows of token ids. documents: a new pass over separate documents.
    text: a new pass over the pieces of one text.
    """

    name: str
    label: str
    ids: Callable[[int | None, int], Tensor] | None = None
    documents: Callable[[], Iterable[Document]] | None = None
    text: Callable[[], Iterable[str]] | None = None

    def pieces(self) -> Iterable[Document]:
        """A pass over the documents or pieces in order."""
        opened = self.documents or self.text
        assert opened is not None
        return opened()


def open_parts(source: str, option: str, text_field: str | None) -> tuple[tuple[Part, ...], list[Source]]:
    """The parts of a mix, and what each of them holds. option: that names them, --calibration or --data.

    text_field: of the records of files and of data given in Python. Raises UsageError, CalibrationError, ResourceError.
    """
    if isinstance(source, CalibrationData):
        return (Part(text=GIVEN),), [_open_given(source, option, text_field)]
    parts = parts_of(source, option)
    for part in parts:
        part.require_there(option)
    return parts, [_open_part(part, option, text_field) for part in parts]


def require_texts(source: str) -> None:
    """Raise CalibrationError, UsageError or ResourceError for a text that cannot be opened, as far as that shows without reading it."""
    if isinstance(source, CalibrationData):
        return
    for part in parts_of(source, "--calibration"):
        part.require_there("--calibration")
        if part.hub is not None and part.hub.file.endswith(".parquet"):
            require_pyarrow(f"--calibration {part.text}")


def _open_part(part: Part, option: str, text_field: str | None) -> Source:
    if part.name == GIVEN:
        raise UsageError(
            f"{option}: the data of this job was given in Python, and no file holds it; resume it in Python, by bigq.quantize with the "
            "settings and the calibration data that it was begun with"
        )
    evaluation = option == "--data"
    if part.name == BUILTIN:
        path = BUILTIN_HELDOUT if evaluation else BUILTIN_CALIBRATION
        return _open_files([path], str(path), BUILTIN, None)
    if part.hub is not None:
        file = part.hub.file_for(evaluation=evaluation)
        if file.endswith(".parquet"):
            require_pyarrow(f"{option} {part.text}")
        return _open_hub_text(part.text, part.hub, fetch_dataset_file(part.hub.repository, file, option))
    name = str(part.files[0]) if len(part.files) == 1 else part.text
    return _open_files(part.files, name, name.rpartition("/")[2], text_field)


def _open_hub_text(name: str, text: HubText, path: Path) -> Source:
    """A text by name, whose file was fetched to ``path``."""
    opened = _open_files([path], str(path), name, text.field)
    if not text.joined or opened.documents is None:
        return opened
    read = opened.documents
    return Source(name=str(path), label=name, text=lambda: _joined(read()))


def _open_files(paths: Sequence[Path], name: str, label: str, text_field: str | None) -> Source:
    kinds = {path: contents_of(path, lambda record: is_known(record, text_field)) for path in paths}
    held = {"text" if kind == "text" else "token ids" if kind == "safetensors" else "records" for kind in kinds.values()}
    if len(held) > 1:
        raise CalibrationError(f"{name}: matches files of {' and of '.join(sorted(held))}; name them apart, with a comma between")
    if held == {"token ids"}:
        return Source(name=name, label=label, ids=lambda samples, seqlen: rows_from_file(paths, samples, seqlen))
    if held == {"text"}:
        return Source(name=name, label=label, text=lambda: chain.from_iterable(map(text_pieces, paths)))
    return Source(name=name, label=label, documents=lambda: chain.from_iterable(documents(path, kinds[path], text_field) for path in paths))


def documents(path: Path, kind: Contents, text_field: str | None = None) -> Iterator[Document]:
    """The documents of a file of records of a kind (see ``contents_of``). Raises CalibrationError, ResourceError without pyarrow."""
    if kind == "parquet":
        records = parquet_records(path, FIELDS if text_field is None else (text_field, *FIELDS))
    else:
        records = json_array(path) if kind == "array" else json_lines(path)
    return (
        document({"text": record} if kind == "array" and isinstance(record, str) else record, where, text_field)
        for where, record in records
    )


def _joined(paragraphs: Iterable[Document]) -> Iterator[str]:
    """The paragraphs of one text with blank lines between them, in pieces of about ``PIECE_CHARS`` characters."""
    held: list[str] = []
    length, between = 0, ""
    for paragraph in paragraphs:
        held += [between, str(paragraph)]
        length += len(paragraph)
        between = "\n\n"
        if length > PIECE_CHARS:
            yield "".join(held)
            held, length = [], 0
    yield "".join(held)


def _open_given(data: CalibrationData, option: str, text_field: str | None) -> Source:
    name = option.removeprefix("--")
    if given_documents(data, text_field) is not None:
        return Source(name=name, label=GIVEN, documents=lambda: given_documents(data, text_field) or ())
    if data.tokens is not None:
        tokens = data.tokens
        return Source(name=name, label=GIVEN, ids=lambda samples, seqlen: rows_of(name, tokens, samples, seqlen))
    return Source(name=name, label=GIVEN, ids=lambda samples, seqlen: rows_from_sequences(name, sequences(data), samples, seqlen))
