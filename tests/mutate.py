"""Mutations of bytes and of JSON values, for the fuzzers: ``mutate_bytes(rng, data)`` and ``mutate_json(rng, value)``.

Every mutation is drawn from ``rng`` alone, so a seed gives the same inputs again.
"""

from __future__ import annotations

import copy
import random
from typing import Any

#: What parsers trip over, as bytes.
TOKENS = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"{",
    b"}",
    b"[",
    b"]",
    b"[]",
    b"{}",
    b'"',
    b"\\",
    b"\\u",
    b"\\ud800",
    b"\\u0000",
    b",",
    b",,",
    b":",
    b"-",
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"null",
    b"true",
    b"9" * 30,
    b"9" * 5000,
    b"[" * 2000,
    b'{"a":' * 2000,
    b"\n",
    b"../",
    b"/etc/passwd",
)
#: And as values.
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    2**31,
    2**32 + 1,
    2**53 + 1,
    2**62,
    2**63,
    2**64,
    10**100,
    -(10**100),
    0.0,
    -0.0,
    0.5,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    " ",
    "0",
    "a",
    "a\nb",
    "a\0b",
    "\ud800",
    "\udc80",
    "\x1b[31m",
    "\u202e",
    "💥",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "x" * 5000,
    "F32",
    "BOOL",
    "F4",
    [],
    [0],
    [1, 2],
    [0, 0],
    [[]],
    [2**62] * 9,
    [1] * 3000,
    {},
    {"a": 1},
    {"": None},
    {"__metadata__": {}},
)
NAMES = ("__metadata__", "weight_map", "metadata", "dtype", "shape", "data_offsets", "text", "")


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four of: bits flipped, bytes put in, replaced, cut out, doubled or moved, the end cut off."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        _mutate_once(rng, out)
    return bytes(out)


def mutate_json(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with one to three changes anywhere in it: values replaced, nudged, added, removed, moved, renamed."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = _places(root)
        owner, key = rng.choice(places)
        owner[key] = _changed(rng, owner[key], places)
    return root[0]


def _mutate_once(rng: random.Random, out: bytearray) -> None:
    at = rng.randrange(len(out) + 1)
    end = min(len(out), at + rng.choice((1, 1, 2, 4, 8, 64)))
    kind = rng.randrange(7)
    if kind == 0 and at < len(out):
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        out[at:at] = rng.choice(TOKENS)
    elif kind == 2:
        out[at:end] = rng.choice(TOKENS)
    elif kind == 3:
        out[at:end] = rng.randbytes(end - at)
    elif kind == 4:
        del out[at:end]
    elif kind == 5:
        source = rng.randrange(len(out) + 1)
        out[at:at] = out[source : source + rng.choice((1, 8, 64))]
    else:
        del out[rng.choice((at, len(out) - 1, min(at, 8))) :]


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Every (object or list, name or index) in a value that lies in ``root[0]``."""
    found: list[tuple[Any, Any]] = [(root, 0)]
    for owner, key in found:
        inner = owner[key]
        if isinstance(inner, dict):
            found += [(inner, name) for name in inner]
        elif isinstance(inner, list):
            found += [(inner, i) for i in range(len(inner))]
    return found


def _changed(rng: random.Random, value: Any, places: list[tuple[Any, Any]]) -> Any:
    kind = rng.randrange(4)
    if kind == 0:
        return copy.deepcopy(rng.choice(VALUES))
    if kind == 1:
        owner, key = rng.choice(places)
        return copy.deepcopy(owner[key])
    if isinstance(value, dict):
        _change_object(rng, value)
        return value
    if isinstance(value, list):
        at = rng.randrange(len(value) + 1)
        value[at : at + rng.randrange(2)] = [copy.deepcopy(rng.choice(VALUES))] * rng.randrange(3)
        return value
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(("", "\0", "\ud800", "/", "..", "\n", "x" * 300)) + value[at + rng.randrange(2) :]
    if isinstance(value, (int, float)):
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 10**18, float(value), str(value), [value]))
    return copy.deepcopy(rng.choice(VALUES))


def _change_object(rng: random.Random, value: dict[str, Any]) -> None:
    name = rng.choice(list(value)) if value and rng.random() < 0.8 else rng.choice(NAMES)
    kind = rng.randrange(3)
    if kind == 0:
        value.pop(name, None)
    elif kind == 1:
        value[name] = copy.deepcopy(rng.choice(VALUES))
    else:
        renamed = rng.choice((*NAMES, *(v for v in VALUES if isinstance(v, str))))
        value[renamed] = value.pop(name, None)
