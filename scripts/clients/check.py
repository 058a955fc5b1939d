#!/usr/bin/env python3
"""Let other programs read bigq's output, and compare their weights and logits with bigq's own.

    scripts/clients/venvs DIR                                        # once: their virtual environments
    python scripts/clients/check.py --venvs DIR --work DIR --out docs/results [--only gptqmodel] [--case REGEX]

Every ``client_*.py`` in this folder has a CLIENT: one such program. For each of its cases, the script makes and quantizes a tiny
model, and stores what a reader must find (``cases.py``). The client's reader runs in its own virtual environment, without bigq.
WORK keeps finished cases; they are not read again. --out gets clients_NAME.json: versions, and a row for each case and way of reading, with
``fails`` set if the row is wrong. Exit status 1 if a row fails that is not among the client's ``limits``, or if one of these
does not fail.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from cases import Case, Client, prepare

#: Cases per process of a reader: a crash loses no more than these.
AT_ONCE = 12
TIMEOUT = 1200.0


def find_clients() -> dict[str, Client]:
    modules = (importlib.import_module(path.stem) for path in sorted(HERE.glob("client_*.py")))
    return {module.CLIENT.name: module.CLIENT for module in modules}


def limit_of(client: Client, row: dict[str, Any]) -> str | None:
    """The known reason why the client cannot read this row's case in this way, or None."""
    return next((reason for pattern, reason in client.limits.items() if re.search(pattern, f"{row['route']}/{row['case']}")), None)


def read_rows(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The reader's rows by case and route; the last row of a case and route counts."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else []):
        rows.setdefault(row["case"], {})[row["route"]] = row
    return rows


def run_reader(client: Client, venvs: Path, work: Path, folders: list[Path]) -> dict[str, str]:
    """Run the reader on some folders; its rows go to rows.jsonl. Returns the versions that it prints."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(venvs.absolute() / client.home / "bin/python"), str(HERE / client.reader), str(work / "rows.jsonl"), *map(str, folders)]
    environment = kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | dict(client.environment)
    with (work / "log.txt").open("a") as log:
        done = subprocess.run(
            command, env=environment, cwd=work, stdout=subprocess.PIPE, stderr=log, text=True, timeout=TIMEOUT, check=False
        )
        log.write(done.stdout)
    if done.returncode:
        sys.exit(f"{client.name}: the reader ended with status {done.returncode}; see {work / 'log.txt'}")
    versions: dict[str, str] = json.loads(done.stdout.splitlines()[-1])["versions"]
    return versions


def check(client: Client, cases: Iterable[Case], venvs: Path, work: Path) -> dict[str, Any]:
    """Prepare and read the cases. Returns the content of the results file."""
    cases = list(cases)
    folders = [prepare(case, work) for case in cases]
    stamps = work / "versions.json"
    versions = json.loads(stamps.read_text()) if stamps.exists() else {}
    known = read_rows(work / "rows.jsonl")
    missing = [folder for folder in folders if folder.name not in known]
    for start in range(0, len(missing), AT_ONCE):
        versions = run_reader(client, venvs, work, missing[start : start + AT_ONCE])
        stamps.write_text(json.dumps(versions))
        print(f"{client.name}: {start + len(missing[start : start + AT_ONCE])} of {len(missing)} cases read", file=sys.stderr, flush=True)
    known = read_rows(work / "rows.jsonl")
    rows = [describe(client, case, row) for case in cases for row in known[case.name].values()]
    return {
        "command": "python scripts/clients/check.py --venvs DIR --work DIR --out docs/results",
        "client": client.name,
        "versions": versions,
        "python": platform.python_version(),
        "rows_in_all": len(rows),
        "read_as_they_should_be": sum(row["fails"] is None for row in rows),
        "limits_of_the_reader": sum(row["fails"] is not None and row["limit"] is not None for row in rows),
        "unexpected": [f"{row['route']}/{row['case']}" for row in rows if (row["fails"] is None) != (row["limit"] is None)],
        "rows": rows,
    }


def describe(client: Client, case: Case, row: dict[str, Any]) -> dict[str, Any]:
    first = {"case": case.name, "route": row["route"], "family": case.family, "model": dict(case.model), "flags": " ".join(case.flags)}
    return first | {"fails": client.fails(row), "limit": limit_of(client, row)} | row


def main() -> int:
    clients = find_clients()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, required=True, help="folder with a virtual environment for each client")
    parser.add_argument("--work", type=Path, required=True, help="folder for models, outputs and rows")
    parser.add_argument("--out", type=Path, help="folder for clients_NAME.json")
    parser.add_argument("--only", default=",".join(clients), help="clients, separated by commas (default: %(default)s)")
    parser.add_argument("--case", default="", metavar="REGEX", help="only cases whose name matches; then nothing is written to --out")
    args = parser.parse_args()
    unexpected = False
    for name in args.only.split(","):
        if name not in clients:
            parser.error(f"--only {name}: choose from {', '.join(clients)}")
        work = args.work.resolve() / name  # absolute: readers run in this folder
        work.mkdir(parents=True, exist_ok=True)
        chosen = [case for case in clients[name].cases if re.search(args.case, case.name)]
        result = check(clients[name], chosen, args.venvs, work)
        counts = {key: result[key] for key in ("rows_in_all", "read_as_they_should_be", "limits_of_the_reader", "unexpected")}
        print(json.dumps({"client": name, **counts}))
        unexpected |= bool(result["unexpected"])
        if args.out and not args.case:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"clients_{name}.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return int(unexpected)


if __name__ == "__main__":
    sys.exit(main())
