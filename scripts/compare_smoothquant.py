#!/usr/bin/env python3
"""Compare int8 weights and inputs with and without SmoothQuant, by bigq and by llm-compressor, on the same model and tokens.

    python scripts/compare_smoothquant.py --venvs DIR --json docs/results/smoothquant.json \
        --name NAME --model FOLDER --ids FILE [FILE…] --heldout FILE [--window N]

Each FILE of --ids is one draw of calibration rows. Both programs solve by GPTQ behind SmoothQuant's scales. Their outputs are read by
``bigq eval``, which rounds inputs for each token as vLLM does. LLM.int8 of bitsandbytes needs no calibration and runs itself; its seconds
are those of loading and evaluating. An existing result file is resumed: remove a row to repeat it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from facts import calibration_flags, revision, versions

from bigq.infer.evaluate import EvalConfig, evaluate

#: Contestant → options of ``bigq quantize``, or fields of llm-compressor's SmoothQuantModifier (None: without it).
BIGQ: Mapping[str, str] = {
    "bigq, nearest": "--method rtn",
    "bigq": "",
    "bigq, SmoothQuant": "--fold smoothquant",
}
LLM_INT8 = "bitsandbytes, LLM.int8"
LLMC: Mapping[str, dict[str, Any] | None] = {"llm-compressor": None, "llm-compressor, SmoothQuant": {}}


def run(command: list[str], **environment: str) -> float:
    """CPU seconds of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, check=True, env={**inherited, "OMP_NUM_THREADS": "1", **environment}, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(sum(getattr(after, key) - getattr(before, key) for key in ("ru_utime", "ru_stime")), 1)


def quantize(name: str, given: argparse.Namespace, ids: Path, out: Path) -> float:
    if name in BIGQ:
        data = [] if "rtn" in BIGQ[name] else calibration_flags(ids)
        command = ["quantize", str(given.model), str(out), "--format", "w8a8-int8", *data, *BIGQ[name].split()]
        return run([sys.executable, "-m", "bigq", *command, "--device", "cpu", "--quiet"], PYTHONPATH=str(ROOT))
    python = given.venvs.absolute() / "llmc/bin/python"
    script = ROOT / "scripts/clients/quantize_llmc_w8a8.py"
    return run([str(python), str(script), str(given.model), str(ids), str(out), json.dumps({"smoothquant": LLMC[name]})])


def by_bitsandbytes(given: argparse.Namespace) -> dict[str, Any]:
    """The findings of LLM.int8."""
    script = ROOT / "scripts/clients/judge_llm_int8.py"
    command = [given.venvs.absolute() / "bitsandbytes/bin/python", script, given.model, given.heldout, given.window]
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), check=True, env={**inherited, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"revision": revision()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, required=True, help="virtual environments of other programs (scripts/clients/venvs)")
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    parser.add_argument("--name", required=True, help="what the model is called in the results")
    parser.add_argument("--model", type=Path, required=True, help="a model folder")
    parser.add_argument("--ids", type=Path, nargs="+", required=True, help="token ids of the calibration rows, a file for each draw")
    parser.add_argument("--heldout", type=Path, required=True, help="token ids that KL is measured on")
    parser.add_argument("--window", type=int, default=256, help="tokens of a held-out row (default: 256)")
    given = parser.parse_args()
    result: dict[str, Any] = {"command": "python scripts/compare_smoothquant.py", "versions": versions(), "models": {}}
    if given.json.exists():
        result = json.loads(given.json.read_text(encoding="utf-8"))
    rows = result["models"].setdefault(given.name, {})

    def keep(row: str, found: dict[str, Any]) -> None:
        rows[row] = found
        print(f"{given.name}, {row}: KL {found['kl']:.6f}, {found['cpu_seconds']} s", flush=True)
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    if LLM_INT8 not in rows:
        keep(LLM_INT8, by_bitsandbytes(given))
    for draw, ids in enumerate(given.ids):
        for name in (*BIGQ, *LLMC):
            if (row := f"{name}, draw {draw}") in rows:
                continue
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                seconds = quantize(name, given, ids, out)
                config = EvalConfig(data=str(given.heldout), seqlen=given.window, device="cpu", dtype="float32", quiet=True)
                judged = evaluate(str(out), config, baseline=str(given.model))
            found = {name: getattr(judged, name) for name in ("kl", "kl_stderr", "perplexity", "baseline_perplexity")}
            keep(row, found | {"cpu_seconds": seconds, "revision": revision()})


if __name__ == "__main__":
    main()
