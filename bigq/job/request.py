"""What a job was asked for, and what may be asked of it differently when it is taken up again.

A request is a plain JSON object, kept in OUT's job.json: the settings, hashes of everything that is read, and on what the job runs.
``CHANGES`` says of each part whether it may change. ``make_request`` gathers a request; ``compare`` needs nothing but two of them.
"""

from __future__ import annotations

import enum
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigq.calibration_data import GIVEN
from bigq.config import JobConfig
from bigq.errors import CheckpointError, UsageError
from bigq.io.json_file import show_name
from bigq.version import __version__

#: The packages whose versions are recorded, besides bigq and Python.
PACKAGES = ("torch", "transformers", "tokenizers", "triton")
#: Words for --calibration that are no paths.
NAMED_TEXTS = ("c4", "builtin", GIVEN)


class May(enum.Enum):
    """What becomes of a job that is taken up again with something changed."""

    FREE = "it goes on; the bytes are the same"
    WARNED = "it goes on and says so; bytes from here on may differ from those of a job that was never stopped"
    REFUSED = "it does not go on: blocks of two different jobs would be mixed"


@dataclass(frozen=True, slots=True)
class Change:
    """A part of a job that may or may not change.

    said: the flag, as the user types it, or what it is called. recorded: whether requests hold it; optional: not all of them do.
    """

    may: May
    said: str
    recorded: bool = True
    optional: bool = False


def _free(said: str) -> Change:
    return Change(May.FREE, said, recorded=False)


#: Every setting of a job and everything else that may decide its bytes, by its place in a request, or for what is not recorded by
#: the name of JobConfig's field. Refusals and warnings come in this order.
CHANGES: Mapping[str, Change] = {
    "settings.scheme.bits": Change(May.REFUSED, "--bits"),
    "settings.scheme.group_size": Change(May.REFUSED, "--group-size"),
    "settings.scheme.symmetric": Change(May.REFUSED, "--sym/--asym"),
    "settings.scheme.act_order": Change(May.REFUSED, "--act-order"),
    "settings.scheme.damping": Change(May.REFUSED, "--damping"),
    "settings.scheme.mse": Change(May.REFUSED, "--mse"),
    "settings.scheme.mse_power": Change(May.REFUSED, "--mse-power"),
    "settings.scheme.min_zero": Change(May.REFUSED, "min_zero"),
    "settings.scheme.scale_bits": Change(May.REFUSED, "--scale-bits"),
    "settings.rules": Change(May.REFUSED, "--rule/--skip"),
    "settings.method": Change(May.REFUSED, "--method"),
    "settings.alpha": Change(May.REFUSED, "--alpha"),
    "settings.format": Change(May.REFUSED, "--format"),
    "settings.lm_head": Change(May.REFUSED, "--lm-head"),
    "settings.true_sequential": Change(May.REFUSED, "--true-sequential"),
    "settings.samples": Change(May.REFUSED, "--samples"),
    "settings.seqlen": Change(May.REFUSED, "--seqlen"),
    "settings.seed": Change(May.REFUSED, "--seed"),
    "settings.dtype": Change(May.REFUSED, "--dtype"),
    "settings.trust_remote_code": Change(May.REFUSED, "--trust-remote-code"),
    "source": Change(May.REFUSED, "MODEL: the hash of its shards' headers"),
    "config": Change(May.REFUSED, "MODEL: the hash of its config.json"),
    "remote_code": Change(May.REFUSED, "MODEL: leave to run its own code"),
    "code": Change(May.REFUSED, "MODEL: its code"),
    "calibration_tokens": Change(May.REFUSED, "--calibration: the hash of the text's tokens"),
    "settings.batch": Change(May.WARNED, "--batch"),
    "machine.device": Change(May.WARNED, "--device"),
    "machine.name": Change(May.WARNED, "the processor"),
    "machine.torch_threads": Change(May.WARNED, "the number of CPU threads", optional=True),
    "versions.bigq": Change(May.WARNED, "bigq"),
    "versions.torch": Change(May.WARNED, "torch"),
    "versions.transformers": Change(May.WARNED, "transformers"),
    "versions.triton": Change(May.WARNED, "triton"),
    "versions.python": Change(May.WARNED, "Python"),
    # What a tokenizer makes is compared as tokens, and a text wherever it lies.
    "versions.tokenizers": Change(May.FREE, "tokenizers"),
    "settings.calibration": Change(May.FREE, "--calibration: the path"),
    # As far as "stop" lets a job come, "skip" does the same.
    "settings.on_nonfinite": Change(May.FREE, "--on-nonfinite"),
    "model": _free("MODEL: the path"),
    "vram": _free("--vram"),
    "ram": _free("--ram"),
    "disk": _free("--disk"),
    "activations": _free("--activations"),
    "read_ahead": _free("--read-ahead"),
    "checkpoint_every": _free("--checkpoint-every"),
    "grace": _free("--grace"),
    "steal_lock": _free("--steal-lock"),
    "trace": _free("--trace"),
    "quiet": _free("--quiet"),
}

#: Flags that are typed in two ways, by what they say.
_TYPED: Mapping[str, tuple[str, str]] = {
    "settings.scheme.symmetric": ("--asym", "--sym"),
    "settings.scheme.act_order": ("--no-act-order", "--act-order"),
    "settings.scheme.mse": ("--no-mse", "--mse"),
    "settings.lm_head": ("--no-lm-head", "--lm-head"),
    "settings.true_sequential": ("--no-true-sequential", "--true-sequential"),
    "settings.trust_remote_code": ("--no-trust-remote-code", "--trust-remote-code"),
}


# Comparing: pure functions of two requests.


def compare(out: Path, before: Any, now: Mapping[str, Any]) -> list[str]:
    """What is to be said of a job in ``out``, begun by the request ``before``, that is asked for ``now``: one line per warning.

    Raises UsageError for the first difference that is refused, CheckpointError where ``before`` is no request of this version.
    """
    old, new = _parts(out, before), _parts(out, now)
    changed = {name: change for name, change in CHANGES.items() if name in old and name in new and old[name] != new[name]}
    for name, change in changed.items():
        if change.may is May.REFUSED:
            raise UsageError(_refusal(out, name, old[name], new[name]))
    return [_warning(name, old[name], new[name]) for name, change in changed.items() if change.may is May.WARNED]


def _parts(out: Path, request: Any) -> dict[str, Any]:
    """A request's values by their names in ``CHANGES``. Raises CheckpointError where one is missing or not known."""

    def bad(what: str) -> CheckpointError:
        version = _version(request)
        by = (
            "the file is damaged or of another version of bigq"
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
        if change.recorded and not change.optional and name not in parts:
            raise bad(f"{name} is missing")
    if not isinstance(parts["code"], dict):
        raise bad("code is not an object")
    return parts


def _version(request: Any) -> str | None:
    """The version of bigq that made a request, where it tells."""
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
        f"{_typed(name, new)}: the job in {out} was begun with {_typed(name, old)}; run it as it was begun (flags that are not given "
        "mean as before), or choose another folder"
    )


def _hash_changed(out: Path, old: Any, new: Any) -> str:
    """In words; the first digits are enough to tell two hashes apart."""
    then, now = (show_name(value[:12]) if isinstance(value, str) else _shown(value) for value in (old, new))
    return f"was {then} when the job in {out} was begun, is {now} now; give the source that it was begun with, or choose another folder"


def _warning(name: str, old: Any, new: Any) -> str:
    if name == "settings.batch":
        old, new = ("as many rows as fit" if batch is None else batch for batch in (old, new))
    said = CHANGES[name].said
    return f"{said} was {_shown(old)} when the job was begun, is {_shown(new)} now: blocks from here on may round differently"


def _typed(name: str, value: Any) -> str:
    """A setting as on the command line."""
    if name in _TYPED and isinstance(value, bool):
        return _TYPED[name][value]
    if name == "settings.rules":
        return _typed_rules(value)
    said = CHANGES[name].said
    return f"no {said}" if value is None else f"{said} {_shown(value)}"


def _typed_rules(rules: Any) -> str:
    """Rules as on the command line; ones that were damaged, as they are."""
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
    """Raise UsageError where the Python files of a model's folder are not those that the job in ``out`` was begun with."""
    old, new = _parts(out, before)["code"], code_hashes(folder)
    if old != new:
        raise UsageError(_refusal(out, "code", old, new))


def make_request(config: JobConfig, folder: Path, fingerprint: str, rows: Tensor | None, device: torch.device) -> dict[str, Any]:
    """The request of a job whose row length and batch are settled.

    folder: the model's. fingerprint: of its shards. rows: calibration tokens, int64 [N, T], None where none are needed.
    Raises CheckpointError where a file of the model cannot be read.
    """
    settings = config.frozen()
    if config.calibration not in NAMED_TEXTS:  # the job may be taken up from another working directory
        settings["calibration"] = os.path.abspath(os.path.expanduser(config.calibration))
    request = {
        "settings": settings,
        "source": fingerprint,
        "config": _sha256(folder / "config.json"),
        "calibration_tokens": None if rows is None else hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
        "remote_code": config.trust_remote_code,
        "code": code_hashes(folder) if config.trust_remote_code else {},
        "versions": {"bigq": __version__, "python": platform.python_version(), **{name: _installed(name) for name in PACKAGES}},
        "machine": _machine(device),
    }
    plain: dict[str, Any] = json.loads(json.dumps(request))  # as it will be read again: tuples are lists
    return plain


def code_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every Python file in a model's folder, by its path there. Raises CheckpointError."""
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*.py")) if path.is_file()}


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _installed(package: str) -> str | None:
    """The version of an installed package, which is not imported for it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return {"device": "cuda", "name": torch.cuda.get_device_name(device)}
    # Sums over a whole tensor come out differently with another number of threads; the instruction set decides the kernels.
    name = f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"
    return {"device": "cpu", "name": name, "torch_threads": torch.get_num_threads()}


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model, where the system tells, and its architecture."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = (value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == "model name")
    return " ".join(filter(None, [next(models, ""), platform.machine()]))
