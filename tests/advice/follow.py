"""Follows the advice of a message: the command lines that it asks for."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

#: What an error begins with: the option that it is about, and its value.
SUBJECT = re.compile(r"(?:argument )?(--[\w-]+)(?: ('[^']*'|[^\s:]+))?(?=: | )")


def followed(words: Sequence[str], message: str) -> list[list[str]]:
    """One command line for each alternative that the message offers; empty where it offers none that can be typed."""
    said, _, advice = message.rpartition("; ")
    subject = SUBJECT.match(message)
    option, value = (subject[1], (subject[2] or "").strip("'")) if subject else (None, "")
    found = [line for part in _alternatives(advice) for line in _one(list(words), part, option, value)]
    return found or ([] if not said else list(_one(list(words), advice, option, value)))


def _alternatives(advice: str) -> list[str]:
    """Split where another thing to do begins."""
    return re.split(r",? or (?=use |leave |give |add |--|'|put )|, (?=leave out|or )|\bfor these alone", advice)


def _one(words: list[str], advice: str, option: str | None, value: str) -> Iterator[list[str]]:
    mean = re.search(r"did you mean '?([^'?]+)'?\?", advice)
    pattern = re.search(r"^(?:use )?'([^']+)'$", advice) or re.search(r" use '([^']+)'$", advice)
    if mean is not None:
        yield _renamed(words, option, value, mean[1])
    elif pattern is not None and option is not None:
        yield _renamed(words, option, value, pattern[1])
    elif re.search(r"leave (?:--[\w-]+ )?out|leave it out", advice):
        named = re.search(r"(--[\w-]+)", advice)
        yield _without(words, named[1] if named else option, value)
    elif re.search(r"give it first", advice) and option is not None:
        yield _first(words, option, value)
    elif changes := re.findall(r"(\w+)=(-?\d+) in (--rule) '([^']*)'|(--[a-z][\w-]*)(?:(?:[ =])('[^']*'|[^\s,;'-][^\s,;]*|-\d+))?", advice):
        for key, number, _, rule, flag, given in changes:
            if rule:
                words = [re.sub(rf"\b{key}=-?\d+", f"{key}={number}", word) if word == rule else word for word in words]
            else:
                words = _with(words, flag, None if given in ("", "and", "or", "to", "if", "when") else given.strip("'"))
        yield words
    elif option is not None and (number := re.search(r"use (-?\d+)", advice)):
        yield _with(words, option, number[1])
    elif option is not None and (names := re.fullmatch(r"(?:use |give )?((?:[\w:]+, )*[\w:]+(?: or [\w:]+)?)", advice)):
        for name in re.split(r", | or ", names[1]):
            yield _with(words, option, name)


def _with(words: Sequence[str], flag: str, value: str | None) -> list[str]:
    """Options that may be given several times are added at the end."""
    words, given = list(words), [flag] if value is None else [flag, value]
    if flag not in ("--rule", "--skip") and value is not None:
        for at in [i for i, word in enumerate(words) if word == flag]:
            words[at + 1] = value
        return words if flag in words else [*words, *given]
    return words if flag in words and value is None else [*words, *given]


def _without(words: Sequence[str], flag: str | None, value: str) -> list[str]:
    words = list(words)
    places = [i for i, word in enumerate(words) if word == flag]
    at = next((i for i in places if words[i + 1 : i + 2] == [value]), places[0])
    stop = at + 1 if at + 1 == len(words) or words[at + 1].startswith("--") else at + 2
    return words[:at] + words[stop:]


def _renamed(words: Sequence[str], option: str | None, value: str, new: str) -> list[str]:
    """The wrong word is the option itself, its value, or the pattern at the start of its value."""
    if new.startswith("--"):
        return [new if word == option else word for word in words]
    pattern, colon, settings = value.rpartition(":") if option == "--rule" else (value, "", "")
    assert option is not None and value in words, (words, value)
    return [f"{new}{colon}{settings}" if word == value and pattern is not None else word for word in words]


def _first(words: Sequence[str], option: str, value: str) -> list[str]:
    rest = _without(words, option, value)
    at = next(i for i, word in enumerate(rest) if word == option)
    return [*rest[:at], option, value, *rest[at:]]


def line(text: str, **places: object) -> list[str]:
    """A command line as words; places fill in ``{names}``."""
    return [word.format(**places) if re.search(r"\{[a-z]+\}", word) else word for word in shlex.split(text)]
