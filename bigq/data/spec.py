"""What ``--calibration`` and ``--data`` name: texts by name, files, patterns, and mixes of these with weights.

    c4                            a text by name
    rows.jsonl                    a file; an existing file of exactly this name comes first, whatever its name looks like
    'parts/*.jsonl'               the files that match, as one text
    a.jsonl,b.txt                 rows of each, in equal numbers
    c4:0.7,ultrachat:0.3          rows of each, by weight

Imports no torch and reads no contents.
"""

from __future__ import annotations

import contextlib
import glob
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigq.data.given import GIVEN
from bigq.errors import CalibrationError, UsageError
from bigq.options import did_you_mean

BUILTIN = "builtin"
#: Parts that a mix may have.
MAX_PARTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class HubText:
    """A text on the hub, as one file.

    heldout: the file for evaluation; None if there is only one. field: of a record that holds the text; None for those that bigq knows.
    joined: whether the records are the paragraphs of one text.
    """

    repository: str
    file: str
    heldout: str | None = None
    field: str | None = None
    joined: bool = False

    def file_for(self, *, evaluation: bool) -> str:
        return self.heldout if evaluation and self.heldout is not None else self.file


#: c4: the shard that the GPTQ paper used. wikitext2: the paragraphs joined by blank lines, as is usual for perplexity.
HUB_TEXTS: Mapping[str, HubText] = {
    "c4": HubText(repository="allenai/c4", file="en/c4-train.00000-of-01024.json.gz", field="text"),
    "wikitext2": HubText(
        repository="Salesforce/wikitext",
        file="wikitext-2-raw-v1/train-00000-of-00001.parquet",
        heldout="wikitext-2-raw-v1/test-00000-of-00001.parquet",
        field="text",
        joined=True,
    ),
    "ultrachat": HubText(
        repository="HuggingFaceH4/ultrachat_200k",
        file="data/train_sft-00000-of-00003-a3ecf92756993583.parquet",
        heldout="data/test_sft-00000-of-00001-f7dfac4afe5b93f4.parquet",
        field="messages",
    ),
    "code": HubText(repository="codeparrot/codeparrot-clean-valid", file="file-000000000054.json.gz", field="content"),
}
#: Values that are no paths.
NAMED_TEXTS = (*HUB_TEXTS, BUILTIN, GIVEN)
_WEIGHT = re.compile(r"(.+):([0-9.eE+-]+|nan|inf)")
#: A comma between parts of a specification whose paths are absolute.
_BETWEEN = re.compile(rf",(?=/|(?:{'|'.join(map(re.escape, NAMED_TEXTS))})(?:[:,]|$))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a mix. text: a name, path or pattern. files: of a path or pattern; none for a name, and for what is missing.

    weight: as given, or "".
    """

    text: str
    files: tuple[Path, ...] = ()
    weight: str = ""

    @property
    def name(self) -> str | None:
        """The name of a text that is no file."""
        return self.text if not self.files and self.text in NAMED_TEXTS else None

    @property
    def hub(self) -> HubText | None:
        """The text on the hub that the part names."""
        return None if self.files else HUB_TEXTS.get(self.text)

    def require_there(self, option: str) -> None:
        """Raise CalibrationError where there is neither a file nor a text of this name."""
        if self.files or self.name is not None:
            return
        said = f"{option} {self.text}: no such file"
        if os.path.isdir(os.path.expanduser(self.text)):
            raise CalibrationError(f"{said} (it is a folder); name files in it, or a pattern in quotes that matches them")
        names = [*HUB_TEXTS, BUILTIN]
        raise CalibrationError(
            f"{said}; give a text, JSONL, parquet or safetensors file, or one of {', '.join(names)}{did_you_mean(self.text, names)}"
        )


def parts_of(spec: str, option: str) -> tuple[Part, ...]:
    """The parts that a specification names; those that are missing have no files. Raises UsageError for one that means nothing."""
    if (whole := _found(spec)) is not None:
        return (whole,)
    pieces = spec.split(",")
    if len(pieces) > MAX_PARTS:
        raise UsageError(f"{option}: names more than {MAX_PARTS} texts; use a pattern such as 'folder/*.jsonl'")
    parts: list[Part] = []
    while pieces:
        # A file's name may hold commas, so the longest name that is there is taken.
        lengths = range(len(pieces), 0, -1)
        found = next(((n, part) for n in lengths if (part := _weighted(",".join(pieces[:n]).strip())) is not None), None)
        taken, part = found or (1, _missing(pieces[0].strip()))
        if not part.text:
            raise UsageError(f"{option} {spec}: has an empty name; remove the comma, or give a name")
        parts.append(part)
        pieces = pieces[taken:]
    _check(parts, spec, option)
    return tuple(parts)


def shares(parts: Sequence[Part], samples: int) -> list[int]:
    """How many of ``samples`` rows come from each part: by weight, rounded so that the sum is right."""
    weights = [float(part.weight or 1) for part in parts]
    exact = [samples * weight / sum(weights) for weight in weights]
    counts = [math.floor(share) for share in exact]
    by_rest = sorted(range(len(parts)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_rest[: samples - sum(counts)]:
        counts[i] += 1
    return counts


def absolute(spec: str) -> str:
    """A specification that means the same in every working folder."""
    if spec in NAMED_TEXTS and _found(spec) == Part(text=spec):
        return spec
    try:
        parts = parts_of(spec, "")
    except UsageError:
        return os.path.abspath(os.path.expanduser(spec))
    return ",".join(
        (part.text if part.name is not None else os.path.abspath(os.path.expanduser(part.text))) + (part.weight and f":{part.weight}")
        for part in parts
    )


def without_folders(spec: str) -> str:
    """A specification with absolute paths, with the names of files alone."""
    return ",".join(part.rpartition("/")[2] for part in _BETWEEN.split(spec))


def is_named(spec: str) -> bool:
    """Whether a specification names no file and no data that was given in Python."""
    try:
        return all(part.name not in (None, GIVEN) for part in parts_of(spec, ""))
    except UsageError:
        return False


def _found(text: str) -> Part | None:
    """The part that a text names as a whole, or None."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # too long a name, an unknown home folder
        path = Path(text).expanduser()
        if path.is_file():
            return Part(text=text, files=(path,))
        if text in NAMED_TEXTS:
            return Part(text=text)
        if glob.has_magic(text):
            files = tuple(Path(file) for file in sorted(glob.glob(os.path.expanduser(text), recursive=True)) if os.path.isfile(file))
            return Part(text=text, files=files) if files else None
    return None


def _weighted(text: str) -> Part | None:
    """The part that a text names, with a weight or without."""
    if (found := _found(text)) is not None:
        return found
    match = _WEIGHT.fullmatch(text)
    found = None if match is None else _found(match[1])
    return None if match is None or found is None else Part(text=found.text, files=found.files, weight=match[2])


def _missing(text: str) -> Part:
    match = _WEIGHT.fullmatch(text)
    return Part(text=text) if match is None else Part(text=match[1], weight=match[2])


def _check(parts: Sequence[Part], spec: str, option: str) -> None:
    for part in parts:
        if part.weight and not _is_weight(part.weight):
            raise UsageError(f"{option} {spec}: the weight {part.weight} of {part.text} must be a number above 0")
    if len({bool(part.weight) for part in parts}) > 1:
        raise UsageError(f"{option} {spec}: gives weights to some texts only; give one to each, as in c4:0.7,builtin:0.3, or to none")
    texts = [part.text for part in parts]
    for text in texts:
        if texts.count(text) > 1:
            raise UsageError(f"{option} {spec}: names {text} twice; name it once, with a larger weight")
    if GIVEN in texts and len(texts) > 1:
        raise UsageError(f"{option} {spec}: {GIVEN} is the name of data of another job; leave it out")


def _is_weight(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and float(text) > 0
    except ValueError:
        return False
