"""Records (JSON objects, rows of parquet files, mappings given in Python) as documents: plain texts or conversations.

Knows nothing of files or tokenizers. Imports no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigq.errors import CalibrationError
from bigq.io.json_file import show_name

TEXT = "text"
#: Fields that hold the messages of a conversation: of OpenAI's and of ShareGPT's records.
MESSAGES = ("messages", "conversations", "conversation")
#: Fields that hold what is asked and what is answered, in pairs; the first pair that a record has counts.
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"))
#: Fields that follow an instruction, if they are there and not empty.
INPUTS = ("input", "context")
#: All fields that a document may come from.
FIELDS = (TEXT, *MESSAGES, "tools", *dict.fromkeys(field for pair in PAIRS for field in pair), *INPUTS)
#: ShareGPT's names of who speaks, as chat templates name them.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
#: Fields that a message names.
SHOWN_FIELDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages for a chat template.

    messages: each with role and content. tools: as the template takes them. where: the place of the record, for messages.
    text_field: a field of the record that holds plain text, or None.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] = ()
    where: str = ""
    text_field: str | None = None

    def __len__(self) -> int:
        """Characters, about."""
        return sum(len(str(message.get("content") or "")) for message in self.messages)


Document = str | Conversation


def is_known(record: Mapping[str, Any], text_field: str | None = None) -> bool:
    """Whether a record has a field that a document may come from."""
    if text_field is not None and text_field in record:
        return True
    return isinstance(record.get(TEXT), str) or _has_messages(record) or _pair_of(record) is not None


def document(record: Any, where: str, text_field: str | None = None) -> Document:
    """The document of a record. where: its place, for messages. text_field: the field to take, if it is not one of those known.

    Raises CalibrationError for a record that has none.
    """
    if not isinstance(record, Mapping):
        raise CalibrationError(f"{where}: is no JSON object; give records with a field {text_field or TEXT!r}")
    if text_field is not None:
        if text_field not in record:
            raise CalibrationError(f"{where}: has no field {show_name(text_field)!r}{_advice(record)}")
        return _of_field(record, text_field, where)
    if isinstance(record.get(TEXT), str):
        return _sound(record[TEXT], where)
    if _has_messages(record):
        return _of_field(record, next(name for name in MESSAGES if isinstance(record.get(name), Sequence)), where)
    if (pair := _pair_of(record)) is not None:
        return _of_pair(record, pair, where)
    if TEXT in record:
        raise CalibrationError(f"{where}: its field 'text' is no string{_advice(record)}")
    raise CalibrationError(f"{where}: has no field 'text', and no conversation{_advice(record)}")


def _of_field(record: Mapping[str, Any], name: str, where: str) -> Document:
    value = record[name]
    if isinstance(value, str):
        return _sound(value, where)
    if not is_messages(value):
        raise CalibrationError(f"{where}: its field {show_name(name)!r} is neither a string nor a list of messages{_advice(record)}")
    tools = record.get("tools")
    return Conversation(
        messages=tuple(_messages(value, where)),
        tools=tuple(tools) if isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools) else (),
        where=where,
        text_field=_text_field(record),
    )


def _of_pair(record: Mapping[str, Any], pair: tuple[str, str], where: str) -> Conversation:
    asked, answered = (record[name] for name in pair)
    if isinstance(asked, str):
        more = [record[name] for name in INPUTS if pair[0] == "instruction" and isinstance(record.get(name), str) and record[name]]
        asked = [{"role": "user", "content": "\n\n".join([asked, *more])}]
    if isinstance(answered, str):
        answered = [{"role": "assistant", "content": answered}]
    return Conversation(messages=tuple(_messages([*asked, *answered], where)), where=where, text_field=_text_field(record))


def conversation(messages: Iterable[Any], where: str) -> Conversation:
    """A conversation from its messages. Raises CalibrationError."""
    return Conversation(messages=tuple(_messages(messages, where)), where=where)


def _messages(value: Iterable[Any], where: str) -> Iterator[dict[str, Any]]:
    count = 0
    for count, each in enumerate(value, 1):
        role, content = ("role", "content") if isinstance(each, Mapping) and "role" in each else ("from", "value")
        if not isinstance(each, Mapping) or not isinstance(each.get(role), str):
            raise CalibrationError(f"{where}: message {count} has no role; give messages with role and content")
        if not isinstance(each.get(content), str | list | None):
            raise CalibrationError(f"{where}: the content of message {count} is neither a string nor a list; correct it")
        if isinstance(each.get(content), str):
            _sound(each[content], where)
        elif each.get(content) is not None:
            _require_text_parts(each[content], f"{where}: message {count}")
        others = {} if role == "from" else {name: said for name, said in each.items() if said is not None}
        yield {**others, "role": ROLES.get(each[role].lower(), each[role]), "content": "" if each.get(content) is None else each[content]}
    if not count:
        raise CalibrationError(f"{where}: its conversation has no messages; remove the record")


def _require_text_parts(parts: Sequence[Any], where: str) -> None:
    """Raise CalibrationError where a message has a part that is no text: a text model's template would write it as it stands."""
    for part in parts:
        if isinstance(part, str):
            continue
        if not isinstance(part, Mapping) or not isinstance(part.get(TEXT), str):
            kind = show_name(str(part.get("type"))) if isinstance(part, Mapping) and part.get("type") else "unknown type"
            raise CalibrationError(f"{where}: has a part that is no text ({kind}); remove such parts, or the record")


def with_plain_contents(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with contents of several parts joined by line ends, since most templates take strings alone."""
    joined = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "\n".join(part if isinstance(part, str) else part[TEXT] for part in content)
        joined.append({**message, "content": content})
    return joined


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages, or an empty list."""
    return (
        isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray) and all(isinstance(each, Mapping) for each in value)
    )


def _has_messages(record: Mapping[str, Any]) -> bool:
    return any(is_messages(record.get(name)) for name in MESSAGES)


def _pair_of(record: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if all(isinstance(record.get(name), str) or is_messages(record.get(name)) for name in pair)), None)


def _text_field(record: Mapping[str, Any]) -> str | None:
    """The field with the longest text of words; None where there is none: ids, hashes and labels are no text."""
    found = {str(name): len(value) for name, value in record.items() if isinstance(value, str) and _has_words(value)}
    return max(found, key=lambda name: found[name], default=None)


def _has_words(value: str) -> bool:
    """Whether a string has more than one word, or is written in a script that may have no spaces. JSON is no text."""
    return (len(value.split()) > 1 or not value.isascii()) and not value.lstrip().startswith(("{", "[{"))


def _advice(record: Mapping[str, Any]) -> str:
    names = [show_name(str(name)) for name in record]
    listed = ", ".join(names[:SHOWN_FIELDS]) + (", …" if len(names) > SHOWN_FIELDS else "")
    talk = next((str(name) for name, value in record.items() if value and is_messages(value)), None)
    if talk is not None:
        remedy = f"name the field that holds the messages, such as --text-field {shlex.quote(talk)}"
    elif (found := _text_field(record)) is not None:
        remedy = f"name the field that holds the text, such as --text-field {shlex.quote(found)}"
    else:
        remedy = "give records with a field 'text', or name the field that holds it with --text-field"
    return show_name(f" (it has {listed[:100] or 'no fields'})")[:150] + f"; {show_name(remedy)}"


def _sound(text: str, where: str) -> str:
    """The text, if it can be encoded: JSON can hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CalibrationError(f"{where}: its text holds half of a surrogate pair, which is no character; correct it") from None
    return text
