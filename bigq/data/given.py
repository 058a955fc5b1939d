"""Calibration and evaluation data that is given in Python instead of in a file. Imports no torch before it is given tensors or ids.

Knows nothing of tokenizers: ``bigq.data.rows`` makes rows of token ids from it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bigq.data.records import Document, conversation, document, is_known, is_messages
from bigq.errors import CalibrationError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

#: The name of such data in records and messages.
GIVEN = "(given in Python)"
#: Characters of texts that an iterator may yield; an iterable that can be read more than once is not copied and has no limit.
MAX_COPIED_CHARS = 2**29
#: Token ids: 512 MiB of int64.
MAX_IDS = 2**26

WHAT = (
    "a path, c4, builtin, token ids (an integer tensor [N, T] or a list of lists), or an iterable of texts or of mappings with a "
    "text, messages or input_ids field"
)


class CalibrationData(str):
    """The name ``GIVEN`` with the data attached, so that records, messages and comparisons of settings see a string.

    tokens: int64 [N, T], one row per sequence, or [1, T] for one long sequence; None where ``items`` are given.
    items: texts, lists of messages, sequences of ids, or mappings that hold one of these (see ``bigq.data.records``; ids in a field
    ``input_ids``). Can be iterated repeatedly.
    """

    tokens: Tensor | None
    items: Iterable[Any]

    def __new__(cls, *, tokens: Tensor | None = None, items: Iterable[Any] = ()) -> CalibrationData:
        self = super().__new__(cls, GIVEN)
        self.tokens, self.items = tokens, items
        return self

    def __deepcopy__(self, _: object) -> str:
        """The name alone: copies of settings are for records."""
        return GIVEN


def calibration_source(given: Any, label: str) -> Any:
    """What a ``calibration`` or ``data`` setting keeps: a string for a path or name, else ``CalibrationData``.

    label: begins messages. Raises UsageError for what cannot be calibration data.
    """
    if isinstance(given, str):
        return given
    if isinstance(given, os.PathLike):
        return os.fspath(given)
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise UsageError(f"{_option(label)}: a mapping needs a field input_ids; give {WHAT}")
        given = given["input_ids"]
    if hasattr(given, "__array__") or hasattr(given, "dtype"):
        return CalibrationData(tokens=_tokens(given, label))
    if isinstance(given, bytes | bytearray) or not _is_iterable(given):
        raise UsageError(f"{_option(label)}: {_article(type(given).__name__)} is not calibration data; give {WHAT}")
    if iter(given) is given:
        given = _copied(given, label)
    if isinstance(given, list | tuple):
        if not given:
            raise UsageError(f"{_option(label)}: is empty; give {WHAT}")
        if all(type(each) is int for each in given):
            return CalibrationData(tokens=_tokens(given, label))
        for number, each in enumerate(given):
            _check_item(each, number, UsageError, label)
    return CalibrationData(items=given)


def documents(data: CalibrationData, text_field: str | None = None) -> Iterator[Document] | None:
    """The documents of the data; None where it holds token ids. text_field: as for ``document``.

    Raises CalibrationError for an item of neither kind.
    """
    first = next(iter(data.items), None)
    if data.tokens is not None or not _is_document(first, text_field):
        return None
    return _documents(data.items, text_field)


def _documents(items: Iterable[Any], text_field: str | None) -> Iterator[Document]:
    for number, each in enumerate(items):
        where = f"calibration: item {number}"
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping) and _is_document(each, text_field):
            yield document(each, where, text_field)
        elif not isinstance(each, Mapping) and _is_document(each, text_field):
            yield conversation(each, where)
        else:
            _check_item(each, number, CalibrationError)
            raise CalibrationError(f"{where} holds token ids, but the first item holds text; give items of one kind")


def sequences(data: CalibrationData) -> Iterator[Tensor]:
    """The token ids [T] of each sequence, int64. Raises CalibrationError for an item that holds none."""
    if data.tokens is not None:
        yield from data.tokens
        return
    for number, each in enumerate(data.items):
        _check_item(each, number, CalibrationError)
        if _is_document(each):
            raise CalibrationError(f"calibration: item {number} is a text, but the first item holds token ids; give items of one kind")
        yield _tokens(each["input_ids"] if isinstance(each, Mapping) else each, f"calibration: item {number}", CalibrationError).flatten()


def _is_document(item: Any, text_field: str | None = None) -> bool:
    if isinstance(item, Mapping):
        return "input_ids" not in item or isinstance(item.get("text"), str) or text_field in item
    return isinstance(item, str) or (is_messages(item) and len(item) > 0)


def _check_item(item: Any, number: int, error: type[UsageError | CalibrationError], label: str = "calibration") -> None:
    """Raise ``error`` for an item that holds neither token ids nor, under any name, a text or messages."""
    if isinstance(item, Mapping):
        usable = "input_ids" in item and _is_ids(item["input_ids"])
        usable = usable or is_known(item) or any(isinstance(value, str) or (is_messages(value) and value) for value in item.values())
        kind = "a mapping without a text or input_ids field"
    else:
        usable, kind = _is_document(item) or _is_ids(item), _article(type(item).__name__)
    if not usable:
        raise error(f"{_option(label)}: item {number} is {kind}; give {WHAT}")


def _is_ids(value: Any) -> bool:
    return value is not None and not isinstance(value, Mapping | str | bytes | bytearray) and _is_iterable(value)


def _is_iterable(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:
        return False
    return True


def _tokens(ids: Any, label: str, error: type[UsageError | CalibrationError] = UsageError) -> Tensor:
    """Token ids as int64 [N, T]; [1, T] for one sequence."""
    import torch

    name = _option(label)
    if isinstance(ids, torch.Tensor):
        tensor = ids.detach().cpu().clone()  # the caller may change its own
    else:
        try:
            tensor = torch.tensor(ids)
        except (TypeError, ValueError, RuntimeError, OverflowError) as wrong:
            raise error(f"{name}: are no token ids ({wrong}); give integers of 64 bits at most") from None
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or tensor.ndim not in (1, 2):
        raise error(f"{name}: token ids must be integers [N, T] or [T], not {tensor.dtype} {list(tensor.shape)}")
    if tensor.numel() > MAX_IDS:
        raise error(f"{name}: holds more than {MAX_IDS} token ids, which is more than bigq reads; give fewer rows")
    if not tensor.numel():
        raise error(f"{name}: holds no token ids; give more data")
    return tensor.long().reshape(1, -1) if tensor.ndim == 1 else tensor.long().contiguous()


def _copied(items: Iterator[Any], label: str) -> tuple[Any, ...]:
    """The items of an iterator, which can be read only once."""
    kept: list[Any] = []
    characters = 0
    for each in items:
        kept.append(each)
        characters += _characters(each)
        if characters > MAX_COPIED_CHARS or len(kept) > MAX_IDS:
            raise UsageError(
                f"{_option(label)}: the iterator yields more than {MAX_COPIED_CHARS} characters or {MAX_IDS} items; give fewer, or an "
                "iterable that can be read more than once, such as a list or a Dataset"
            )
    return tuple(kept)


def _characters(item: Any) -> int:
    """Characters of all strings of an item, those of messages among them."""
    if isinstance(item, str):
        return len(item)
    parts = item.values() if isinstance(item, Mapping) else item if is_messages(item) else ()
    return sum(_characters(part) for part in parts)


def _option(label: str) -> str:
    """The beginning of a message: the option, without the value that a label may end with."""
    return label if label.startswith("calibration: ") else label.split(" ", 1)[0]


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
