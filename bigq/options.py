"""Declaration of options: each one once, as a field of a dataclass such as ``JobConfig``.

``option`` declares a field: help, unit, group, flag, allowed values, and whether a resumed job may change it.
``table`` returns the declarations of a class. The command line, the checks of ``__post_init__``, the settings in job.json, the table
of changes in ``bigq.job.request`` and docs/options.md are made from them, so a new option is one new field.
Imports no torch, so that ``bigq --help`` is quick. Knows no particular option.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from bigq.errors import UsageError

_Read = TypeVar("_Read", covariant=True)
_Given = TypeVar("_Given", contravariant=True)


class Converted(Generic[_Read, _Given]):
    """Type of a field that is read as one type and may be given as others: ``vram: Converted[int | None, int | str | None]``.

    For type checkers it is a descriptor. At run time the field holds the value that the option's ``convert`` returned.
    """

    if TYPE_CHECKING:

        def __get__(self, instance: object, owner: Any = None) -> _Read: ...

        def __set__(self, instance: object, value: _Given) -> None: ...


class Resume(enum.Enum):
    """What happens if a resumed job is given another value of an option."""

    FREE = "allowed; the output bytes stay the same"
    WARNED = "allowed with a warning; later blocks may round differently"
    REFUSED = "refused; blocks of two different jobs would be mixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The allowed values of an option. must: the text after "must" in messages. holds: whether a value of the right type is allowed."""

    must: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """The condition under which an option has an effect.

    unless: the text after "no effect" in messages, such as "on a CPU". holds: whether a job (a config) uses the option on a type of
    device ("cpu", "cuda", or "" if not known yet). refused: giving the option without effect is an error, since the user meant another
    job; otherwise it is a note.
    """

    unless: str
    holds: Callable[[Any, str], bool]
    refused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option, as ``table`` returns it.

    name: of the field. types: allowed types, except None. none: whether the value may be None. unset: the meaning of None, for the help.
    flag, opposite: on the command line; opposite switches the option off. flag None: there is no flag.
    placeholder: stands for the value in the help. kept: whether job.json holds it. rule_key: its name in a rule, if rules may override it.
    convert: makes the value from the given one, which may be of another type; called with a label for messages.
    by_name: messages about a bad value name the field and not the flag.
    added: the option is newer than others, so that the job.json of an older job may lack it; then it has its default.
    """

    name: str
    types: tuple[type, ...]
    none: bool
    default: Any
    help: str
    group: str
    flag: str | None
    opposite: str | None
    unit: str
    unset: str
    choices: tuple[Any, ...]
    placeholder: str
    resume: Resume
    kept: bool
    rule_key: str | None
    range: Range | None
    convert: Callable[[Any, str], Any] | None
    effects: tuple[Effect, ...]
    by_name: bool
    added: bool

    @property
    def said(self) -> str:
        """The option's name in messages."""
        if self.flag is None:
            return self.name
        return self.flag if self.opposite in (None, f"--no-{self.flag[2:]}") else f"{self.flag}/{self.opposite}"

    @property
    def default_text(self) -> str:
        """The default as text; empty if there is none to show."""
        if self.default is None:
            return self.unset
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def words(self, value: Any) -> tuple[str, ...]:
        """The command-line arguments that give a value."""
        assert self.flag is not None
        if isinstance(value, bool):
            off = self.opposite or ""
            return (self.flag if value else off,)
        return (self.flag, str(value))

    def fits(self, value: Any) -> bool:
        """Whether a value has one of the types. An int is accepted as a float; True and False are not numbers."""
        if value is None:
            return self.none
        if isinstance(value, bool):
            return bool in self.types
        return isinstance(value, self.types) or (float in self.types and type(value) is int)

    def check_range(self, value: Any, *, by_flag: bool = False) -> None:
        """Raise UsageError where a value of the right type is not allowed. by_flag: as for ``label``."""
        if value is None:
            return
        if self.choices and value not in self.choices:
            close = did_you_mean(value, self.choices) if isinstance(value, str) else ""
            raise UsageError(f"{self.label(value, by_flag=by_flag)}: must be one of {', '.join(map(str, self.choices))}{close}")
        if self.range is not None and not self.range.holds(value):
            raise UsageError(f"{self.label(value, by_flag=by_flag)}: must {self.range.must}")

    def label(self, value: Any, *, by_flag: bool = False) -> str:
        """The option and its value, to begin a message. by_flag: name the flag, even if ``by_name`` is set."""
        if self.flag is None or (self.by_name and not by_flag):
            return f"{self.name}={value}"
        return f"{self.flag} {value:g}" if isinstance(value, float) else f"{self.flag} {value}"

    def parse(self, text: str) -> Any:
        """The value of an argument. Raises UsageError."""
        assert self.flag is not None
        label = f"{self.flag} {text}"
        if self.convert is not None:
            value = self.convert(text, label)
        elif str in self.types:
            value = text
        else:
            value = _number(int if int in self.types else float, text, label)
        self.check_range(value, by_flag=True)
        return value


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    group: str,
    factory: Callable[[], Any] | None = None,
    **more: Any,
) -> Any:
    """Declare a field as an option; ``more`` are fields of ``Option`` by name. Fields that are not given follow from name and type.

    Without ``resume``, a resumed job may change the option and job.json does not hold it. With ``resume``, job.json holds it unless
    ``kept`` is False.
    """
    metadata = {"option": {"help": help, "group": group, **more}}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def table(config: type) -> Mapping[str, Option]:
    """The options of a class by name, in the order of its fields."""
    if config not in _tables:
        hints = typing.get_type_hints(config)
        _tables[config] = {
            field.name: _read(field, hints[field.name]) for field in dataclasses.fields(config) if "option" in field.metadata
        }
    return _tables[config]


_tables: dict[type, Mapping[str, Option]] = {}


def _read(field: dataclasses.Field[Any], hint: Any) -> Option:
    said = dict(field.metadata["option"])
    kinds, none, literals = _kinds(hint)
    default = field.default if field.default is not dataclasses.MISSING else None
    flag = said.pop("flag", f"--{field.name.replace('_', '-')}")
    opposite = f"--no-{flag[2:]}" if flag is not None and kinds == (bool,) else None
    choices = tuple(said.pop("choices", literals))
    unit = said.pop("unit", "")
    words = "{" + ",".join(map(str, choices)) + "}" if choices else (unit or field.name).upper().replace("_", "-")
    filled = {
        "opposite": opposite,
        "unset": "",
        "placeholder": words,
        "kept": "resume" in said,
        "resume": Resume.FREE,
        "rule_key": None,
        "range": None,
        "convert": None,
        "effects": (),
        "by_name": False,
        "added": False,
    }
    values = {**filled, **said}
    return Option(name=field.name, types=kinds, none=none, default=default, flag=flag, choices=choices, unit=unit, **values)


def _kinds(hint: Any) -> tuple[tuple[type, ...], bool, tuple[Any, ...]]:
    """From a field's type: the plain types, whether None is among them, and the values if the type lists them."""
    if typing.get_origin(hint) is Converted:
        return _kinds(typing.get_args(hint)[0])
    if typing.get_origin(hint) is Literal:
        return (str,), False, typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        parts = [_kinds(part) for part in typing.get_args(hint) if part is not type(None)]
        return tuple(kind for part in parts for kind in part[0]), True, tuple(value for part in parts for value in part[2])
    return (typing.get_origin(hint) or hint,), False, ()


#: Types whose values a message repeats; other values may be large, such as token ids.
_SCALARS = (str, int, float, os.PathLike, type(None))


def settle(config: Any) -> None:
    """Convert and check all fields of a frozen dataclass of options, for its ``__post_init__``. Raises UsageError."""
    for name, each in table(type(config)).items():
        given = getattr(config, name)
        value = given if each.convert is None else each.convert(given, each.label(given) if isinstance(given, _SCALARS) else each.name)
        if not each.fits(value):
            expected = " or ".join(_ARTICLES.get(kind, f"a {kind.__name__}") for kind in each.types) + (" or None" if each.none else "")
            raise UsageError(f"{type(config).__name__}: {name} must be {expected}, not {shown(value)}")
        each.check_range(value)
        if value is not given:
            object.__setattr__(config, name, value)


_ARTICLES: Mapping[type, str] = {int: "an int", bool: "True or False", str: "a string", float: "a number", tuple: "a list"}


def require_known(config: type, names: Iterable[str], what: str) -> None:
    """Raise UsageError for the first name that is not a field of a class of options."""
    known = [field.name for field in dataclasses.fields(config)]
    for name in names:
        if name not in known:
            raise UsageError(f"{what} has no field {shown(name)}{did_you_mean(str(name), known)}")


def without_effect(given: Mapping[str, Any], options: Iterable[Option], job: Any, device: str) -> list[str]:
    """Notes about options that were given but have no effect in a job on a type of device (see ``Effect``).

    Raises UsageError for the first one for which this is an error.
    """
    notes = []
    for each in options:
        unmet = next((effect for effect in each.effects if not effect.holds(job, device)), None)
        if each.name in given and unmet is not None:
            if unmet.refused:
                said = each.label(given[each.name], by_flag=True)
                raise UsageError(f"{said}: no effect {unmet.unless}; add that, or leave out {each.flag}")
            notes.append(f"{each.words(given[each.name])[0]}: no effect {unmet.unless}")
    return notes


def at_least(low: int) -> Range:
    return Range(must=f"be at least {low}", holds=lambda value: math.isfinite(value) and value >= low)


def path(given: Any, _: str) -> Any:
    """The ``convert`` of a path that is kept as a string."""
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def shown(value: Any) -> str:
    """A value in a message: one short line."""
    text = repr(value)
    line = text if text.isprintable() else ascii(text)
    return line if len(line) <= 80 else f"{line[:77]}…"


def _number(kind: type, text: str, label: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"{label}: must be a {'whole number' if kind is int else 'number'}") from None


def did_you_mean(word: str, known: Iterable[Any]) -> str:
    """The end of a message about an unknown word; empty if no known word is similar."""
    import difflib  # here: only messages need it

    close = difflib.get_close_matches(word, [str(each) for each in known], n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def require_names(what: str, value: Any, names: Iterable[str]) -> None:
    """Raise UsageError unless ``value`` is an object with exactly these names."""
    if not isinstance(value, dict):
        raise UsageError(f"{what} must be an object, not {value!r}")
    for name in names:
        if name not in value:
            raise UsageError(f"{what}.{name} is missing")
    for name in value:
        if name not in names:
            raise UsageError(f"{what}.{name} is not known")


def checked(what: str, value: Any, declared: Option) -> Any:
    """An untrusted value of an option. Raises UsageError if it is of a wrong type."""
    if not declared.fits(value):
        raise UsageError(f"{what} cannot be {value!r}")
    return value
