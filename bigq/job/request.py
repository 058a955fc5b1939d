"""The request of a job, and which parts of it a resumed job may change.

A request is a plain JSON object, kept in OUT's job.json: the settings, hashes of all inputs, versions and the machine.
``CHANGES`` says for each part whether it may change. ``make_request`` makes a request; ``compare`` compares two.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigq.config import JobConfig
from bigq.data.spec import absolute
from bigq.errors import CheckpointError, UsageError
from bigq.io.json_file import show_name
from bigq.kernels.pick import instruction_set
from bigq.options import Option, Resume, table
from bigq.scheme import QuantScheme
from bigq.version import __version__

#: The packages whose versions are recorded, besides bigq and Python.
PACKAGES = ("torch", "transformers", "tokenizers", "triton", "numba")


@dataclass(frozen=True, slots=True)
class Change:
    """A part of a job, and whether it may change.

    said: the option as the user types it, or a name. recorded: whether requests hold it. optional: some requests do not hold it.
    """

    may: Resume
    said: str
    recorded: bool = True
    optional: bool = False


def _settings(prefix: str, options: Mapping[str, Option]) -> dict[str, Change]:
    """The settings that a request holds."""
    return {f"{prefix}.{name}": Change(each.resume, each.said) for name, each in options.items() if each.kept and name != "scheme"}


def _not_recorded(options: Mapping[str, Option]) -> dict[str, Change]:
    """The options that requests do not record, by the name of JobConfig's field."""
    return {
        name: Change(each.resume, each.said, recorded=False)
        for name, each in options.items()
        if not each.kept and each.resume is Resume.FREE
    }


#: Every setting of a job, and everything else that may affect its bytes, by its path in a request. JobConfig and QuantScheme declare the
#: settings. Refusals and warnings come in this order.
CHANGES: Mapping[str, Change] = {
    **_settings("settings", table(JobConfig)),
    **_settings("settings.scheme", table(QuantScheme)),  # after the method, which settles some of them
    "source": Change(Resume.REFUSED, "MODEL: the hash of its shards' headers"),
    "config": Change(Resume.REFUSED, "MODEL: the hash of its config.json"),
    "remote_code": Change(Resume.REFUSED, "MODEL: permission to run its code"),
    "code": Change(Resume.REFUSED, "MODEL: its code"),
    "calibration_tokens": Change(Resume.REFUSED, "--calibration: the hash of the text's tokens"),
    "machine.device": Change(Resume.WARNED, "--device"),
    "machine.name": Change(Resume.WARNED, "the processor"),
    "machine.torch_threads": Change(Resume.WARNED, "the number of CPU threads", optional=True),
    "machine.ranks": Change(Resume.WARNED, "the number of processes", optional=True),
    "versions.bigq": Change(Resume.WARNED, "bigq"),
    "versions.torch": Change(Resume.WARNED, "torch"),
    "versions.transformers": Change(Resume.WARNED, "transformers"),
    "versions.triton": Change(Resume.WARNED, "triton"),
    "versions.numba": Change(Resume.WARNED, "numba", optional=True),
    "versions.python": Change(Resume.WARNED, "Python"),
    # The tokenizer is not compared: its tokens are.
    "versions.tokenizers": Change(Resume.FREE, "tokenizers"),
    "model": Change(Resume.FREE, "MODEL: the path", recorded=False),
    **_not_recorded(table(JobConfig)),
}


# Comparing: pure functions of two requests.


def compare(out: Path, before: Any, now: Mapping[str, Any]) -> list[str]:
    """Compare the request ``before``, with which the job in ``out`` was begun, to the request ``now``. Returns warnings, one line each.

    Raises UsageError for the first difference that is refused, CheckpointError if ``before`` is not a request of this version.
    """
    old, new = _parts(out, before), _parts(out, now)
    changed = {name: change for name, change in CHANGES.items() if name in old and name in new and old[name] != new[name]}
    for name, change in changed.items():
        if change.may is Resume.REFUSED:
            raise UsageError(_refusal(out, name, old[name], new[name]))
    return [_warning(name, old[name], new[name]) for name, change in changed.items() if change.may is Resume.WARNED]


def _parts(out: Path, request: Any) -> dict[str, Any]:
    """A request's values by their names in ``CHANGES``. Raises CheckpointError if one is missing or unknown."""

    def bad(what: str) -> CheckpointError:
        version = _version(request)
        by = (
            "the file is damaged or from another version of bigq"
            if version in (None, __version__)
            else f"bigq {show_name(version)} began the job"
        )
        return CheckpointError(f"{out}: its job.json: {what}; {by}: begin the job again in another folder")

    def walk(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if name in CHANGES and CHANGES[name].recorded:
            yield name, value
        elif name and not any(known.startswith(name + ".") for known in CHANGES):
            raise bad(f"{show_name(name)} is not known")
        elif not isinstance(value, dict):
            raise bad(f"{show_name(name) or 'it'} is not an object")
        else:
            for key, part in value.items():
                yield from walk(f"{name}.{key}" if name else str(key), part)

    parts = dict(walk("", request))
    for name, change in CHANGES.items():
        if name.startswith("settings.") and change.recorded and name not in parts and (declared := _declared(name)).added:
            parts[name] = declared.default
        if change.recorded and not change.optional and name not in parts:
            raise bad(f"{name} is missing")
    if not isinstance(parts["code"], dict):
        raise bad("code is not an object")
    return parts


def _version(request: Any) -> str | None:
    """The version of bigq that made a request, or None."""
    versions = request.get("versions") if isinstance(request, dict) else None
    version = versions.get("bigq") if isinstance(versions, dict) else None
    return version if isinstance(version, str) else None


def _refusal(out: Path, name: str, old: Any, new: Any) -> str:
    if name == "code":
        file = next(file for file in sorted({**old, **new}) if (file in old, old.get(file)) != (file in new, new.get(file)))
        return f"MODEL: its {show_name(file)} {_hash_changed(out, old.get(file), new.get(file))}"
    if not name.startswith("settings."):
        return f"{CHANGES[name].said} {_hash_changed(out, old, new)}"
    return (
        f"{_typed(name, new)}: the job in {out} was begun with {_typed(name, old)}; resume it with that "
        "(options that are not given keep their values), or choose another folder"
    )


def _hash_changed(out: Path, old: Any, new: Any) -> str:
    """A change as text; the first digits are enough to distinguish two hashes."""
    then, now = (show_name(value[:12]) if isinstance(value, str) else _shown(value) for value in (old, new))
    return f"was {then} when the job in {out} was begun, is {now} now; give the source that it was begun with, or choose another folder"


def _warning(name: str, old: Any, new: Any) -> str:
    if name == "settings.batch":
        old, new = ("as many rows as fit" if batch is None else batch for batch in (old, new))
    said = CHANGES[name].said
    return f"{said} was {_shown(old)} when the job was begun, is {_shown(new)} now: blocks from here on may round differently"


def _typed(name: str, value: Any) -> str:
    """A setting as arguments on the command line."""
    declared = _declared(name)
    if declared.flag is not None and isinstance(value, bool) and bool in declared.types:
        return " ".join(declared.words(value))
    if name == "settings.rules":
        return _typed_rules(value)
    said = CHANGES[name].said
    return f"no {said}" if value is None else f"{said} {_shown(value)}"


def _declared(name: str) -> Option:
    """The option that declares a setting."""
    parent, _, field = name.rpartition(".")
    return table(QuantScheme if parent == "settings.scheme" else JobConfig)[field]


def _typed_rules(rules: Any) -> str:
    """Rules as arguments on the command line; damaged ones as JSON."""
    if rules == []:
        return "no --rule and no --skip"
    try:
        return " ".join(_typed_rule(rule["pattern"], rule["overrides"]) for rule in rules)
    except (TypeError, KeyError, AttributeError):
        return f"--rule/--skip {_shown(rules)}"


def _typed_rule(pattern: str, overrides: Mapping[str, Any] | None) -> str:
    if overrides is None:
        return f"--skip {pattern!r}"
    settings = ",".join(f"{key}={str(value).lower()}" for key, value in overrides.items())
    return f"--rule {f'{pattern}:{settings}'!r}"


def _shown(value: Any) -> str:
    return show_name(value) if isinstance(value, str) else "not there" if value is None else show_name(json.dumps(value))


# Gathering: files, versions and the machine.


def require_same_code(out: Path, before: Any, folder: Path) -> None:
    """Raise UsageError if the Python files of a model's folder differ from those that the job in ``out`` was begun with."""
    old, new = _parts(out, before)["code"], code_hashes(folder)
    if old != new:
        raise UsageError(_refusal(out, "code", old, new))


def make_request(config: JobConfig, folder: Path, fingerprint: str, rows: Tensor | None, device: torch.device) -> dict[str, Any]:
    """The request of a job whose row length and batch are settled.

    folder: of the model. fingerprint: of its shards. rows: calibration tokens, int64 [N, T], or None if none are needed.
    Raises CheckpointError if a file of the model cannot be read.
    """
    settings = config.frozen()
    settings["calibration"] = absolute(config.calibration)  # the job may be resumed in another working directory
    request = {
        "settings": settings,
        **model_hashes(folder, fingerprint),
        "calibration_tokens": None if rows is None else hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
        "remote_code": config.trust_remote_code,
        "code": code_hashes(folder) if config.trust_remote_code else {},
        "versions": versions(),
        "machine": _machine(device),
    }
    plain: dict[str, Any] = json.loads(json.dumps(request))  # as it will be read back: tuples become lists
    return plain


def model_hashes(folder: Path, fingerprint: str) -> dict[str, str]:
    """Hashes of a model's folder, without its code. fingerprint: of its shards. Raises CheckpointError."""
    return {"source": fingerprint, "config": _sha256(folder / "config.json")}


def versions() -> dict[str, str | None]:
    """The versions of all that results may depend on; None for packages that are not there."""
    return {"bigq": __version__, "python": platform.python_version(), **{name: _installed(name) for name in PACKAGES}}


def code_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every Python file in a model's folder, by its path there. Raises CheckpointError."""
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*.py")) if path.is_file()}


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _installed(package: str) -> str | None:
    """The version of an installed package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return {"device": "cuda", "name": torch.cuda.get_device_name(device)}
    # The rounding of sums depends on the number of threads; the choice of kernels depends on the instruction set.
    name = f"{_processor()} ({instruction_set()})"
    return {"device": "cpu", "name": name, "torch_threads": torch.get_num_threads()}


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model, if the system names it, and its architecture."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = (value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == "model name")
    return " ".join(filter(None, [next(models, ""), platform.machine()]))
