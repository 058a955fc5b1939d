"""The settings of a job in a YAML file, by the names of the options: ``group-size: 64`` is ``--group-size 64``.

Values are read as on the command line, from the text in the file. What YAML would silently read as something else (``no``, ``010``,
``1_000``) is refused where a number or a switch is expected, and is that text where a text is expected. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigq.common_options import RUN
from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.io.json_file import show_name
from bigq.io.yaml_file import Entries, Items, Scalar, Tree, read_yaml
from bigq.options import Option, Range, did_you_mean, option, table
from bigq.presets import Presetting
from bigq.scheme import QuantScheme, Rule

PLACES = ("model", "out")
#: Variables that hold the number of a task of an array, for ``bigq batch --index auto``.
ARRAY_VARIABLES = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")
#: Lists of texts, by their name: the name in a parsed command line.
LISTS: Mapping[str, str] = {"rule": "rules", "skip": "skip"}
_ON, _OFF = ("true", "True", "TRUE"), ("false", "False", "FALSE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How the process of a job ends. No setting of the job itself."""

    exit_code_on_stop: int | None = option(
        None,
        help="exit code of what was stopped by a signal and can be resumed, from 6 to 125; 99 makes Grid Engine requeue it",
        group=RUN,
        placeholder="N",
        unset="75",
        range=Range(must="be from 6 to 125, since other codes have a meaning", holds=lambda code: 6 <= code <= 125),
    )


def job_options() -> list[Option]:
    """All options of a job, in the order of the help. Rules have two flags and are not among them."""
    of_job = (each for name, each in table(JobConfig).items() if name not in ("scheme", "rules"))
    return [*table(Presetting).values(), *table(QuantScheme).values(), *of_job]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a file says of a job. model, out: None where it does not say.

    values: as a parsed command line has them, by the name of the field; also "rules" and "skip", lists of texts. lines: where each name
    stands in the file.
    """

    model: str | None = None
    out: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)

    def over(self, below: Settings) -> Settings:
        """These settings, and those of ``below`` where there are none here."""
        return Settings(
            model=self.model if self.model is not None else below.model,
            out=self.out if self.out is not None else below.out,
            values={**below.values, **self.values},
            lines={**below.lines, **self.lines},
        )

    def words(self) -> list[str]:
        """The options as arguments of ``bigq quantize``."""
        return [word for each in job_options() for word in self._words(each)] + [
            f"--{name}={text}" for name, dest in LISTS.items() for text in self.values.get(dest, ())
        ]

    def _words(self, each: Option) -> Iterable[str]:
        if each.name not in self.values or each.flag is None:
            return ()
        value = self.values[each.name]
        if isinstance(value, bool):
            return (word for word in each.words(value) if word)
        return (f"{each.flag}={value}",)


def read_settings(path: Path) -> Settings:
    """The settings of one job in a file. Raises UsageError, naming the file, the line and the name."""
    tree = read_yaml(path)
    if isinstance(tree, Entries) and any(name in tree.entries for name in ("jobs", "matrix")):
        raise UsageError(f"{path}: is a file of several jobs; run bigq batch {path}")
    if not isinstance(tree, Entries):
        raise UsageError(f"{path}: must hold names with values, such as bits: 4")
    return settings_of(tree, path, extra=table(Ending).values())


def settings_of(tree: Entries, path: Path, *, places: Sequence[str] = PLACES, extra: Iterable[Option] = ()) -> Settings:
    """The settings in a mapping. places: which of model and out it may name. extra: options besides those of a job.

    Raises UsageError, naming the file, the line and the name.
    """
    options = {each.flag[2:]: each for each in (*job_options(), *extra) if each.flag is not None}
    found: dict[str, str] = {}
    values: dict[str, Any] = {}
    for name, value in tree.entries.items():
        try:
            if name in places:
                found[name] = _text(name, value)
            elif name in LISTS:
                values[LISTS[name]] = list(_texts(name, value))
            elif name in options:
                values[options[name].name] = _value(options[name], name, value)
            else:
                raise UsageError(_unknown(name, (*places, *LISTS, *options), options.values()))
        except UsageError as error:
            raise UsageError(f"{path}: line {tree.lines[name]}: {str(error).removeprefix('--')}") from None
    return Settings(model=found.get("model"), out=found.get("out"), values=values, lines=tree.lines)


def _unknown(name: str, known: Sequence[str], options: Iterable[Option]) -> str:
    opposite = next((each for each in options if each.flag and name in (str(each.opposite)[2:], f"no-{each.flag[2:]}")), None)
    if opposite is not None and bool in opposite.types and opposite.opposite is not None:
        assert opposite.flag is not None
        return f"{name}: is no name here; write {opposite.flag[2:]}: false"
    return f"{show_name(name)}: unknown option{did_you_mean(name, known) or '; see bigq quantize --help'}"


def _scalar(name: str, tree: Tree) -> Scalar:
    """Raises UsageError for what is no single value."""
    if not isinstance(tree, Scalar):
        raise UsageError(f"{name}: must be one value, not a {'list' if isinstance(tree, Items) else 'mapping'}")
    if tree.is_null:
        raise UsageError(f"{name}: has no value")
    if tree.block or "\n" in tree.text:
        raise UsageError(f"{name}: must be on one line")
    return tree


def _text(name: str, tree: Tree) -> str:
    text = _scalar(name, tree).text
    if not text or "\0" in text:
        raise UsageError(f"{name}: must be a name, not {text!r}")
    return text


def _texts(name: str, tree: Tree) -> Iterator[str]:
    for item in tree.items if isinstance(tree, Items) else (tree,):
        text = _text(name, item)
        if name == "rule":
            Rule.parse(text)
        else:
            Rule(text, None)
        yield text


def _value(each: Option, name: str, tree: Tree) -> Any:
    """The value as the command line would have it. Raises UsageError."""
    scalar = _scalar(name, tree)
    text = scalar.text
    if each.types == (bool,):
        if scalar.quoted or text not in (*_ON, *_OFF):
            raise UsageError(f"{name}: must be true or false, not {_shown(scalar)}")
        return text in _ON
    if str not in each.types:
        _require_plain_number(each, name, scalar)
    value = each.parse(text)
    return value if each.convert is None else text


def _require_plain_number(each: Option, name: str, scalar: Scalar) -> None:
    """Refuse what YAML and people may read as different numbers. Words, such as never, pass."""
    if scalar.quoted and each.convert is None:
        raise UsageError(f"{name}: must be a number, not {_shown(scalar)}, which is a text")
    if re.match(r"[-+]?0[0-9]", scalar.text):
        raise UsageError(f"{name}: {show_name(scalar.text)} may mean an octal number; write it without the zeros in front")
    if "_" in scalar.text or not scalar.text.isascii():
        raise UsageError(f"{name}: {show_name(scalar.text)} must be a number of digits only")


def _shown(scalar: Scalar) -> str:
    return repr(scalar.text) if scalar.quoted else show_name(scalar.text)
