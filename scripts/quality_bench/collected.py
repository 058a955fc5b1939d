"""The result file, from records of runs. Imports neither torch nor bigq."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from facts import host, versions

from quality_bench import comparison, origin
from quality_bench.settings import CHOOSING, JUDGING, PROGRAMS, SUBJECTS, Contestant, Run, Setting, Subject, settings_of

COMMAND = "python scripts/quality.py --work DIR --venvs DIR; python scripts/quality.py --work DIR --collect --out docs/results"


def records(work: Path, runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Those that are there."""
    return [json.loads(path.read_text()) for run in runs if (path := work / "runs" / f"{run.name}.json").exists()]


def result(work: Path, models: Path, runs: Sequence[Run], known: Mapping[str, Any]) -> dict[str, Any]:
    """The content of quality.json. Exits if a run was made from sources that no commit has.

    known: "subjects" of an earlier result, for subjects whose model is not in MODELS: their runs were restored from it.
    """
    found = records(work, runs)
    revisions = sorted({record["revision"] for record in found})
    if wrong := [name for name in revisions if " " in name]:
        sys.exit(f"quality: runs were made from {wrong[0]}; commit, and make them again in another WORK")
    programs: dict[str, str] = {}
    for record in found:
        programs |= {name: version for name, version in record.pop("versions").items() if name in PROGRAMS}
    there = {record["subject"] for record in found}
    return {
        "command": COMMAND,
        "revisions": revisions,
        "versions": versions() | programs,
        "host": host(),
        "subjects": {s.name: subject_facts(models, s, known) for s in SUBJECTS if s.name in there},
        "halves": {half: [s.name for s in SUBJECTS if s.half == half] for half in (CHOOSING, JUDGING)},
        "runs_missing": len(runs) - len(found),
        "comparisons": compared(found),
        "runs": found,
    }


def subject_facts(models: Path, subject: Subject, known: Mapping[str, Any]) -> dict[str, Any]:
    there = (models / "texts" / subject.name / "facts.json").exists()
    if not there and subject.name not in known:
        sys.exit(f"quality: {models} has no model and text of {subject.name}")
    return about(subject) | (origin.facts(models, subject) if there else known[subject.name])


def about(subject: Subject) -> dict[str, Any]:
    """What a subject's runs have in common."""
    calibration = {"rows": subject.rows, "tokens_per_row": subject.seqlen}
    settings = [setting.name for setting in settings_of(subject)]
    return {"half": subject.half, "calibration": calibration, "windows": [subject.windows, subject.window], "settings": settings}


def compared(found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Figures of every contestant at every place, and differences from bigq's default."""
    return [
        {"subject": subject, "setting": setting, **rounded(row)}
        for (subject, setting), rows in comparison.rows(found, "bigq").items()
        for row in rows
    ]


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}


def write_result(work: Path, models: Path, runs: Sequence[Run], path: Path) -> None:
    """Write the result file, a line for each run: they hold the figures of windows, from which everything else follows."""
    known = json.loads(path.read_text())["subjects"] if path.exists() else {}
    made = result(work, models, runs, known)
    lines = ",\n".join(f"  {json.dumps(run, ensure_ascii=False)}" for run in made.pop("runs"))
    head = json.dumps(made, indent=1, ensure_ascii=False).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "runs": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def restore(path: Path, work: Path, runs: Iterable[Run]) -> int:
    """Write the records of a result file to WORK/runs, so that runs can be added to them; those that are there are kept. Returns how many.

    Each takes the versions of the whole file, which has them once.
    """
    made = json.loads(path.read_text())
    names = {(run.subject.name, run.contestant.name, run.setting, run.draw): run.name for run in runs}
    programs = {name: version for name, version in made["versions"].items() if name in PROGRAMS}
    (work / "runs").mkdir(parents=True, exist_ok=True)
    written = 0
    for record in made["runs"]:
        setting = Setting(bits=record["bits"], group_size=record["group_size"], symmetric=record["symmetric"])
        name = names.get((record["subject"], record["contestant"], setting, record["draw"]))
        if name is None:
            sys.exit(f"quality: {path} has a run of {record['contestant']!r}, which is no contestant; name it with --add")
        if not (place := work / "runs" / f"{name}.json").exists():
            place.write_text(json.dumps(record | {"versions": programs}))
            written += 1
    return written


def contestants_of(made: Mapping[str, Any], known: Iterable[Contestant]) -> list[Contestant]:
    """Those that have a run, in the order of the table."""
    there = {run["contestant"] for run in made["runs"]}
    return [contestant for contestant in known if contestant.name in there]
