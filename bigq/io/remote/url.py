"""Models that are given by a URL: a folder on a web server, or of a file system that fsspec opens."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from bigq.errors import CheckpointError, ResourceError
from bigq.io.atomic import remedy, write_bytes
from bigq.io.index import INDEX_NAME
from bigq.io.json_file import read_json_object
from bigq.io.remote.http import WebFolder
from bigq.io.remote.objects import ObjectFolder
from bigq.io.remote.ranged import RangeReader
from bigq.io.remote.shards import QUICK, RemoteShards
from bigq.io.remote.transport import Transport

#: Small files of a model. Web servers have no listings, so these names are asked for.
NAMES = (
    "config.json",
    INDEX_NAME,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "adapter_config.json",
    "LICENSE",
    "NOTICE",
    "README.md",
)
#: Patterns of small files at the top of a folder, and in its subfolders.
PATTERNS, INNER_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*", "README.md"), ("*.py", "*.jinja")
#: The largest of them in bytes: an index or a tokenizer.
MAX_BYTES = 256 * 2**20
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.+", re.DOTALL)
_CODE = re.compile(r"[\w/]+\.py")


class _Folder(Transport, Protocol):
    def whole(self, name: str, limit: int) -> bytes | None:
        """A small file; None if there is none."""


def is_url(model: str) -> bool:
    """Whether MODEL is a URL, such as s3://bucket/folder or https://host/folder."""
    return _URL.fullmatch(model) is not None


def open_url(model: str) -> tuple[Path, RemoteShards]:
    """A local folder with the small files of a model, and its shards on the server. Raises UsageError, CheckpointError, ResourceError."""
    web = model.lower().startswith(("http://", "https://"))
    folder: _Folder = WebFolder(model) if web else ObjectFolder(model)
    local = _local_folder(model)
    if isinstance(folder, ObjectFolder):
        reader, objects = RangeReader(folder, QUICK), folder
        listed = reader.patiently("", objects.names)
        names = [name for name in listed if any(fnmatch(name, pattern) for pattern in _patterns(name))]
        _fetch(folder, names, local)
    else:
        _fetch(folder, NAMES, local)
        _fetch(folder, _code_names(local), local)
    if not (local / "config.json").exists():
        raise CheckpointError(f"{folder.address('config.json')}: missing; MODEL must be the URL of a folder with config.json and shards")
    return local, RemoteShards(folder)


def _patterns(name: str) -> tuple[str, ...]:
    return INNER_PATTERNS if "/" in name else PATTERNS


def _fetch(folder: _Folder, names: Iterable[str], local: Path) -> None:
    """Bring small files here; those that are not there any more are removed."""
    reader = RangeReader(folder, QUICK)
    for name in names:
        if ".." in name.split("/") or name.startswith("/"):
            continue
        data = reader.patiently(name, _whole(folder, name))
        path = local / name
        try:
            if data is None:
                path.unlink(missing_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{path}: cannot be written: {error.strerror}; {remedy(error)} (HF_HOME names it)") from error
        write_bytes(path, data)


def _whole(folder: _Folder, name: str) -> Callable[[], bytes | None]:
    return lambda: folder.whole(name, MAX_BYTES)


def _code_names(local: Path) -> list[str]:
    """The files of code that config.json and tokenizer_config.json name."""
    found: list[str] = []
    for path in (local / "config.json", local / "tokenizer_config.json"):
        named = read_json_object(path).get("auto_map") if path.exists() else None
        for value in named.values() if isinstance(named, dict) else ():
            for each in value if isinstance(value, list) else [value]:
                name = f"{str(each).partition('.')[0]}.py"
                if _CODE.fullmatch(name) and "--" not in str(each):
                    found.append(name)
    return list(dict.fromkeys(found))


def _local_folder(model: str) -> Path:
    """Where the small files of a URL are kept between runs: in the folder of the hub's caches."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "bigq" / hashlib.sha256(model.encode()).hexdigest()[:24]
