"""A file of jobs: ``jobs``, a list; or ``matrix``, every model with every one of some settings; with ``defaults`` for all of them.

    defaults: {calibration: c4, device: cuda:0}
    jobs:
      - {model: meta-llama/Llama-3.1-8B, out: out/llama-4bit}
      - {model: meta-llama/Llama-3.1-8B, out: out/llama-3bit, bits: 3}
    matrix:
      models: [Qwen/Qwen3-8B, Qwen/Qwen3-14B]
      settings: {w4: {bits: 4}, w3: {bits: 3, quality: best}}
      out: out/{model}-{settings}

The file is checked as a whole before anything runs. Imports no torch.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigq.batch.settings import Settings, settings_of
from bigq.errors import BigqError, UsageError
from bigq.io.json_file import show_name
from bigq.io.yaml_file import Entries, Items, Scalar, Tree, read_yaml
from bigq.job.journal import require_job_folder
from bigq.options import did_you_mean

SECTIONS = ("defaults", "jobs", "matrix")
_MATRIX = ("models", "settings", "out")
MAX_JOBS = 10_000
_PLACEHOLDER = re.compile(r"\{(\w*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """One job of a file. index: from 0. line: where it is in the file."""

    index: int
    line: int
    model: str
    out: str
    settings: Settings

    @property
    def folder(self) -> Path:
        """OUT, without links and relative parts."""
        return Path(os.path.realpath(os.path.expanduser(self.out)))

    @property
    def model_folder(self) -> Path | None:
        """MODEL, if it is a folder here."""
        try:
            folder = Path(os.path.realpath(os.path.expanduser(self.model)))
            return folder if folder.is_dir() else None
        except (OSError, ValueError):
            return None

    def words(self) -> list[str]:
        """The arguments of ``bigq`` that run it."""
        return ["quantize", *self.settings.words(), "--", self.model, self.out]


def read_batch(path: Path) -> list[BatchJob]:
    """The jobs of a file; at least one. Raises UsageError, naming the file, the line and the name."""
    tree = read_yaml(path)
    if not isinstance(tree, Entries) or not ("jobs" in tree.entries or "matrix" in tree.entries):
        raise UsageError(f"{path}: holds no jobs; write them under jobs: or matrix:, or run bigq quantize --config {path}")
    for name, line in tree.lines.items():
        if name not in SECTIONS:
            raise UsageError(f"{path}: line {line}: {show_name(name)}: must be one of {', '.join(SECTIONS)}{did_you_mean(name, SECTIONS)}")
    defaults = Settings()
    if "defaults" in tree.entries:
        defaults = settings_of(_entries(path, "defaults", tree.entries["defaults"]), path, places=("model",))
    found: list[BatchJob] = []
    both = itertools.chain(_listed(path, tree.entries.get("jobs")), _crossed(path, tree.entries.get("matrix")))
    for line, settings in both:
        if len(found) == MAX_JOBS:
            raise UsageError(f"{path}: has more than {MAX_JOBS} jobs")
        settings = settings.over(defaults)
        if settings.model is None or settings.out is None:
            raise UsageError(f"{path}: line {line}: {'model' if settings.model is None else 'out'} is missing")
        found.append(BatchJob(index=len(found), line=line, model=settings.model, out=settings.out, settings=settings))
    if not found:
        raise UsageError(f"{path}: holds no jobs; write them under jobs: or matrix:, or run bigq quantize --config {path}")
    return found


def _entries(path: Path, what: str, tree: Tree) -> Entries:
    if isinstance(tree, Scalar) and tree.is_null:
        return Entries(entries={}, lines={}, line=tree.line)
    if not isinstance(tree, Entries):
        raise UsageError(f"{path}: line {tree.line}: {what} must hold names with values, such as bits: 4")
    return tree


def _items(path: Path, what: str, tree: Tree) -> Sequence[Tree]:
    if not isinstance(tree, Items):
        raise UsageError(f"{path}: line {tree.line}: {what} must be a list")
    return tree.items


def _listed(path: Path, tree: Tree | None) -> Iterator[tuple[int, Settings]]:
    """The jobs under ``jobs``, each with its line."""
    for each in () if tree is None else _items(path, "jobs", tree):
        yield each.line, settings_of(_entries(path, "a job", each), path)


def _crossed(path: Path, tree: Tree | None) -> Iterator[tuple[int, Settings]]:
    """The jobs of a matrix: all settings of the first model, then those of the next."""
    if tree is None:
        return
    matrix = _entries(path, "matrix", tree)
    for name in (*matrix.entries, *_MATRIX):
        if name not in _MATRIX:
            raise UsageError(f"{path}: line {matrix.lines[name]}: {show_name(name)}: must be one of {', '.join(_MATRIX)}")
        if name not in matrix.entries:
            raise UsageError(f"{path}: line {matrix.line}: matrix: {name} is missing")
    models = [_scalar(path, "a model", each) for each in _items(path, "models", matrix.entries["models"])]
    named = _entries(path, "settings", matrix.entries["settings"])
    settings = {
        name: settings_of(_entries(path, f"settings {show_name(name)}", each), path, places=()) for name, each in named.entries.items()
    }
    pattern = _scalar(path, "out", matrix.entries["out"])
    for used in _PLACEHOLDER.findall(pattern.text):
        if used not in ("model", "settings"):
            raise UsageError(f"{path}: line {pattern.line}: out: {{{used}}} stands for nothing; use {{model}} and {{settings}}")
    for model, (name, each) in itertools.product(models, settings.items()):
        words = {"model": os.path.basename(model.text.rstrip("/")), "settings": name}
        out = _PLACEHOLDER.sub(lambda match, words=words: words[match[1]], pattern.text)  # type: ignore[misc]
        yield named.lines[name], each.over(Settings(model=model.text, out=out))


def _scalar(path: Path, what: str, tree: Tree) -> Scalar:
    if not isinstance(tree, Scalar) or tree.is_null or tree.block or not tree.text or "\0" in tree.text or "\n" in tree.text:
        raise UsageError(f"{path}: line {tree.line}: {what} must be one name")
    return tree


def require_sound(
    path: Path, jobs: Sequence[BatchJob], asked: Sequence[BatchJob], check: Callable[[BatchJob], None], done: Mapping[int, bool]
) -> None:
    """Refuse what could only be found out when its turn comes, hours later.

    asked: the jobs that are about to run; of others, MODEL is looked for only where it is a folder. check: raises a BigqError for options
    that do not go together. done: the jobs that are finished already, whose MODEL is not needed any more.
    Raises a BigqError that names the file, and the line of the job.
    """
    from bigq.io.hub import require_model  # here: it imports torch, which reading a file does without

    _require_places(path, jobs)
    known: set[str] = set()
    for job in jobs:
        with _located(path, job.line):
            check(job)
            if done.get(job.index):
                continue
            require_job_folder(Path(os.path.expanduser(job.out)))
            if job.model not in known and (job in asked or job.model.startswith((".", "/", "~"))):
                require_model(job.model)
                known.add(job.model)


def _require_places(path: Path, jobs: Sequence[BatchJob]) -> None:
    """Raise UsageError where folders of two jobs overlap."""
    outs: dict[Path, BatchJob] = {}
    for job in jobs:
        if (other := outs.setdefault(job.folder, job)) is not job:
            raise UsageError(f"{path}: line {job.line}: out: {job.out} is the folder of the job on line {other.line} too")
    for job in jobs:
        for parent in job.folder.parents:
            if parent in outs:
                raise UsageError(f"{path}: line {job.line}: out: {job.out} lies in that of the job on line {outs[parent].line}")
        model = job.model_folder
        for place in () if model is None else (model, *model.parents):
            if place in outs:
                raise UsageError(
                    f"{path}: line {job.line}: model: {job.model} is or lies in the out of the job on line {outs[place].line}; a job reads "
                    "nothing that another one writes"
                )
    models = {model: job for job in jobs if (model := job.model_folder) is not None}
    for job in jobs:
        for parent in job.folder.parents:
            if parent in models:
                raise UsageError(f"{path}: line {job.line}: out: {job.out} lies in the model of the job on line {models[parent].line}")


@contextlib.contextmanager
def _located(path: Path, line: int) -> Iterator[None]:
    """Errors in this context begin with the place of a job."""
    try:
        yield
    except BigqError as error:
        raise type(error)(f"{path}: line {line}: {error}") from None
