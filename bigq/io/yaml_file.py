"""YAML files as trees of texts with their lines. The only module that knows the YAML library.

A scalar stays the text that the file holds, so nothing is lost before it is known what is expected: ``3.10`` and ``no`` do not become
3.1 and False. Only the parser of the library runs, so no file can make objects.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigq.errors import UsageError
from bigq.io.json_file import show_name

#: Bytes that a file may have, and levels of lists and mappings in it.
MAX_BYTES, MAX_DEPTH = 2**20, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalar:
    """A text. quoted: whether it is in quotes. block: whether it is a block of lines (``|`` or ``>``). line: from 1."""

    text: str
    quoted: bool
    block: bool
    line: int

    @property
    def is_null(self) -> bool:
        """Whether the file gives no value."""
        return not self.quoted and not self.block and self.text in ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """A list. line: from 1."""

    items: Sequence[Tree]
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """A mapping of texts. lines: the line of each name. line: from 1."""

    entries: Mapping[str, Tree]
    lines: Mapping[str, int]
    line: int


Tree = Scalar | Items | Entries


def read_yaml(path: Path) -> Tree:
    """The only document of a file. Raises UsageError, naming the file and, where there is one, the line."""
    import yaml  # here: it is needed for files only

    data = _read(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: line {data[: error.start].count(10) + 1}: is not UTF-8") from None
    try:
        # Every plain scalar is a text to this loader, so a tag that is anything else was written in the file.
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        if node is None:
            raise UsageError(f"{path}: is empty")
        return _Reading(path).tree(node, 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        raise UsageError(f"{path}: {where}is not YAML: {show_name(error.problem or error.context or '')}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: is not YAML: {show_name(' '.join(str(error).split()))}") from None
    except (ValueError, OverflowError):  # an escape such as "\UFFFFFFFF"
        raise UsageError(f"{path}: is not YAML: it holds a character that does not exist") from None
    except RecursionError:
        raise UsageError(f"{path}: is nested too deeply") from None


def write_scalar(text: str) -> str:
    """A text as a scalar in double quotes, on one line."""
    import yaml

    written: str = yaml.dump(text, default_style='"', allow_unicode=False, width=float("inf"))
    return written.removesuffix("\n")


def _read(path: Path) -> bytes:
    try:
        # A pipe would be waited for.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UsageError(f"{path}: is not a regular file")
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise UsageError(f"{path}: cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path}: has more than {MAX_BYTES} bytes")
    return data


class _Reading:
    """From the library's nodes to trees. Each node is visited once, so aliases cost nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._trees: dict[int, Tree | None] = {}

    def tree(self, node: object, depth: int) -> Tree:
        import yaml

        assert isinstance(node, yaml.Node)
        line = node.start_mark.line + 1
        if depth > MAX_DEPTH or self._trees.get(id(node), 0) is None:  # None: a node that holds itself
            raise UsageError(f"{self._path}: line {line}: is nested too deeply")
        known = self._trees.get(id(node))
        if known is not None:
            return known
        self._trees[id(node)] = None
        kind = {yaml.ScalarNode: "str", yaml.SequenceNode: "seq", yaml.MappingNode: "map"}[type(node)]
        if node.tag != f"tag:yaml.org,2002:{kind}":
            raise UsageError(f"{self._path}: line {line}: tags such as {show_name(node.tag)} are not read")
        found: Tree
        if isinstance(node, yaml.ScalarNode):
            found = Scalar(text=node.value, quoted=node.style in ("'", '"'), block=node.style in ("|", ">"), line=line)
        elif isinstance(node, yaml.SequenceNode):
            found = Items(items=[self.tree(item, depth + 1) for item in node.value], line=line)
        else:
            assert isinstance(node, yaml.MappingNode)
            found = self._entries(node, depth, line)
        self._trees[id(node)] = found
        return found

    def _entries(self, node: object, depth: int, line: int) -> Entries:
        import yaml

        assert isinstance(node, yaml.MappingNode)
        entries: dict[str, Tree] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            here = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UsageError(f"{self._path}: line {here}: a name must be a text")
            name = key.value
            if name in entries:
                raise UsageError(f"{self._path}: line {here}: {show_name(name)} is there twice; the first one is on line {lines[name]}")
            entries[name], lines[name] = self.tree(value, depth + 1), here
        return Entries(entries=entries, lines=lines, line=line)
