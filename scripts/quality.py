#!/usr/bin/env python3
"""Quantize the shipped model with bigq, GPTQModel and llm-compressor in the same ways on the same tokens, and judge all of them alike.

    scripts/clients/venvs DIR gptqmodel llmc                           # once
    python scripts/quality.py --venvs DIR --work DIR --out docs/results [--tools bigq] [--seeds 0,1] [--keep]
    python scripts/quality.py --out docs/results --table               # docs/quality.md again, from the result files

All compute in fp32, on the same rows of the shipped calibration text (one draw for each seed), with a damping of 0.01. A peer's weights
are dequantized by its own code, put in the place of the original's in a dense fp32 checkpoint, and judged by ``bigq.evaluate`` on the
shipped held-out text, as bigq's are. A run that is done is kept as WORK/runs/NAME.json and not made again, so the script may be
stopped, and several may run at once with other --tools. --collect only gathers what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import moe_section

SAMPLES, SEQLEN, HELDOUT_ROWS = 64, 256, 128
DAMPING = 0.01
SEEDS = (0, 1)
#: How far apart differences between programs are over the draws, in parts of the KL, while no setting has two of them.
SPREAD = 0.03
#: Jobs of one process of a peer.
AT_ONCE = 4
TIMEOUT = 3600.0
SHORT = {"gptqmodel": "GPTQModel", "llmc": "llm-compressor", "bigq": "bigq"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """act_order: columns by decreasing Hessian diagonal, groups as they are in natural order ("static groups")."""

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool

    @property
    def name(self) -> str:
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.bits}bit-{group}-{'sym' if self.symmetric else 'asym'}{'-act' if self.act_order else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """settings: what the tool is told for a setting; None where the method has no such thing. twin: bigq's method that does the same."""

    name: str
    tool: str
    settings: Callable[[Setting], dict[str, Any] | None]
    twin: str | None = None


def bigq(scheme: Mapping[str, Any] | None = None, **how: Any) -> Callable[[Setting], dict[str, Any]]:
    """Fields of JobConfig, and of its scheme, beside those of the setting."""
    return lambda s: {"scheme": {**dataclasses.asdict(s), **(scheme or {})}, **how}


def rtn(scheme: Mapping[str, Any] | None = None) -> Callable[[Setting], dict[str, Any] | None]:
    return lambda s: None if s.act_order else bigq(scheme, method="rtn")(s)


def gptqmodel(**how: Any) -> Callable[[Setting], dict[str, Any] | None]:
    def settings(s: Setting) -> dict[str, Any]:
        same = {"bits": s.bits, "group_size": s.group_size, "sym": s.symmetric, "format": "gptq_v2"}
        return same | {"desc_act": s.act_order, "static_groups": s.act_order and s.group_size > 0, "act_group_aware": False} | how

    return settings


def gptqmodel_default(s: Setting) -> dict[str, Any] | None:
    """Its group-aware activation order, on unless switched off: groups change places, and columns within them."""
    return None if s.act_order or s.group_size == -1 else gptqmodel(act_group_aware=True)(s)


def gptqmodel_dynamic(s: Setting) -> dict[str, Any] | None:
    """Groups of columns in the order of the loop; readers must gather."""
    return gptqmodel(static_groups=False)(s) if s.act_order and s.group_size > 0 else None


def llmc(s: Setting) -> dict[str, Any]:
    shape = {"strategy": "channel"} if s.group_size == -1 else {"strategy": "group", "group_size": s.group_size}
    weights = {"num_bits": s.bits, "symmetric": s.symmetric, **shape}
    return {"weights": weights, "modifier": {"actorder": "static" if s.act_order else None}}


#: To add a method, add a line.
METHODS = (
    Method(name="bigq rtn", tool="bigq", settings=rtn()),
    Method(name="bigq rtn, mse", tool="bigq", settings=rtn({"mse": True})),
    Method(name="bigq rtn, mse 4", tool="bigq", settings=rtn({"mse": True, "mse_power": 4.0})),
    Method(name="bigq gptq", tool="bigq", settings=bigq(method="gptq")),
    Method(name="bigq gptq, per block", tool="bigq", settings=bigq(method="gptq", true_sequential=False)),
    Method(name="bigq gptaq", tool="bigq", settings=bigq(method="gptaq")),
    Method(name="bigq gptq, mse", tool="bigq", settings=bigq({"mse": True}, method="gptq")),
    *(
        Method(name=f"bigq gptq, mse {power:g}", tool="bigq", settings=bigq({"mse": True, "mse_power": power}, method="gptq"))
        for power in (2.4, 4.0, 6.0)
    ),
    *(
        Method(name=f"bigq gptq, damping {damping:g}", tool="bigq", settings=bigq({"damping": damping}, method="gptq"))
        for damping in (0.001, 0.1)
    ),
    Method(name="bigq gptaq, mse", tool="bigq", settings=bigq({"mse": True}, method="gptaq")),
    Method(name="GPTQModel", tool="gptqmodel", settings=gptqmodel(), twin="bigq gptq"),
    Method(name="llm-compressor", tool="llmc", settings=llmc, twin="bigq gptq, per block"),
    Method(name="GPTQModel, mse", tool="gptqmodel", settings=gptqmodel(mse=2.4), twin="bigq gptq, mse"),
    Method(name="GPTQModel, group-aware order", tool="gptqmodel", settings=gptqmodel_default),
    Method(name="GPTQModel, dynamic groups", tool="gptqmodel", settings=gptqmodel_dynamic),
)
#: The most telling first.
SETTINGS = tuple(
    Setting(bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order)
    for symmetric, act_order, bits, group_size in itertools.product((True, False), (False, True), (3, 2, 4), (-1, 32))
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    method: Method
    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method.name.replace(', ', '-').replace(' ', '-')}.{self.setting.name}.{self.seed}".lower()


def all_runs(tools: Iterable[str], seeds: Iterable[int]) -> list[Run]:
    """Every run, seed by seed. Methods that are compared with no other have one draw."""
    order = [(seed, method, setting) for seed in seeds for method in METHODS for setting in SETTINGS]
    runs = [Run(method=m, setting=s, seed=seed) for seed, m, s in order if m.tool in tools and m.settings(s) is not None]
    twins = {m.twin for m in METHODS}
    return [run for run in runs if run.seed == SEEDS[0] or run.method.twin is not None or run.method.name in twins]


def prepare(work: Path) -> None:
    """WORK/model, the shipped model in fp32, and WORK/ids-SEED.safetensors."""
    from safetensors.torch import load_file, save_file

    from bigq.calibration import calibration_rows
    from bigq.data.opening import ASSETS

    source, model = ASSETS / "tiny-llama", work / "model"
    (work / "runs").mkdir(parents=True, exist_ok=True)
    if not (model / "config.json").exists():
        model.mkdir(exist_ok=True)
        tensors = {name: t.float() for shard in sorted(source.glob("*.safetensors")) for name, t in load_file(shard).items()}
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        for path in source.glob("tokenizer*"):
            shutil.copy(path, model)
        config = json.loads((source / "config.json").read_text()) | {"dtype": "float32"}
        (model / "config.json").write_text(json.dumps(config))
    for seed in SEEDS:
        ids = work / f"ids-{seed}.safetensors"
        if not ids.exists():
            save_file({"input_ids": calibration_rows("builtin", source, samples=SAMPLES, seqlen=SEQLEN, seed=seed)}, ids)


def run_bigq(run: Run, work: Path, out: Path) -> dict[str, Any]:
    import bigq as package

    settings = run.method.settings(run.setting)
    assert settings is not None
    scheme = package.QuantScheme(**{"damping": DAMPING, **settings.pop("scheme")})
    ids = str(work / f"ids-{run.seed}.safetensors")
    config = package.JobConfig(
        scheme=scheme, calibration=ids, samples=SAMPLES, seqlen=SEQLEN, format="gptq_v2", device="cpu", quiet=True, **settings
    )
    began = time.monotonic()
    report = package.quantize(str(work / "model"), out, config)
    raised = sum(float(record["damping"]) > 1.001 * scheme.damping for record in report.linears)
    return {"seconds": round(time.monotonic() - began, 1), "computed_in": "float32", "damping_raised": raised}


def run_peers(tool: str, runs: list[Run], venvs: Path, work: Path) -> None:
    """Several runs of a peer with the same tokens in one process of its own; dense checkpoints in WORK/out/NAME."""
    jobs = [{"out": str(work / "out" / run.name), "settings": run.method.settings(run.setting)} for run in runs]
    jobs_file = work / f"jobs-{runs[0].name}.json"
    jobs_file.write_text(json.dumps(jobs))
    script = ROOT / "scripts/clients" / f"quantize_{tool}.py"
    command = [
        str(venvs.absolute() / tool / "bin/python"),
        str(script),
        str(work / "model"),
        str(work / f"ids-{runs[0].seed}.safetensors"),
        str(jobs_file),
    ]
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = kept | {"HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    with (work / f"log-{tool}.txt").open("a") as log:
        done = subprocess.run(command, env=environment, cwd=work, stdout=log, stderr=log, timeout=TIMEOUT, check=False)
    if done.returncode:
        sys.exit(f"quality: {tool} ended with status {done.returncode}; see {work / f'log-{tool}.txt'}")


def judge(out: Path, work: Path) -> dict[str, Any]:
    """What ``bigq eval OUT --data builtin --baseline MODEL --json`` says of a folder."""
    import bigq as package

    config = package.EvalConfig(data="builtin", samples=HELDOUT_ROWS, dtype="float32", device="cpu", quiet=True)
    return dataclasses.asdict(package.evaluate(str(out), config, baseline=str(work / "model")))


def finish(run: Run, work: Path, said: Mapping[str, Any], keep: bool) -> None:
    """Judge a run's output and record it."""
    out = work / "out" / run.name
    if not (out / "config.json").exists():
        for path in (work / "model").glob("*.json"):
            shutil.copy(path, out)
    record = {"method": run.method.name, **dataclasses.asdict(run.setting), "seed": run.seed, **judge(out, work), **said}
    (work / "runs" / f"{run.name}.tmp").write_text(json.dumps(record) + "\n")
    os.replace(work / "runs" / f"{run.name}.tmp", work / "runs" / f"{run.name}.json")
    if not keep:
        shutil.rmtree(out)
    print(f"{run.name}: perplexity {record['perplexity']:.4f}, KL {record['kl']:.5f}, {record['seconds']} s", file=sys.stderr, flush=True)


def make(runs: list[Run], venvs: Path | None, work: Path, keep: bool) -> None:
    todo = [run for run in runs if not (work / "runs" / f"{run.name}.json").exists()]
    for tool in ("bigq", "gptqmodel", "llmc"):
        mine = [run for run in todo if run.method.tool == tool]
        if tool == "bigq":
            for run in mine:
                shutil.rmtree(work / "out" / run.name, ignore_errors=True)
                finish(run, work, run_bigq(run, work, work / "out" / run.name), keep)
            continue
        if mine and venvs is None:
            sys.exit(f"quality: --venvs DIR is needed for {tool}; or leave it out with --tools")
        for _, same_rows in itertools.groupby(mine, key=lambda run: run.seed):
            batch = list(same_rows)
            for start in range(0, len(batch), AT_ONCE):
                assert venvs is not None
                part = batch[start : start + AT_ONCE]
                run_peers(tool, part, venvs, work)
                for run in part:
                    finish(run, work, json.loads((work / "out" / run.name / "peer.json").read_text()), keep)


def collect(work: Path) -> dict[str, Any]:
    """The content of quality.json."""
    wanted = all_runs(SHORT, SEEDS)
    files = [path for run in wanted if (path := work / "runs" / f"{run.name}.json").exists()]
    records = [json.loads(path.read_text()) for path in files]
    versions: dict[str, str] = {}
    for record in records:
        versions |= record.pop("versions", {}) | {"python": platform.python_version()}
        record.pop("linears", None)
    return {
        "command": "python scripts/quality.py --venvs DIR --work DIR --out docs/results",
        "model": "bigq/assets/tiny-llama, fp32",
        "calibration": {"rows": SAMPLES, "tokens_per_row": SEQLEN, "seeds": list(SEEDS)},
        "heldout_tokens": records[0]["tokens"] if records else 0,
        "original_perplexity": records[0]["baseline_perplexity"] if records else None,
        "versions": versions,
        "runs_missing": [run.name for run in wanted if not (work / "runs" / f"{run.name}.json").exists()],
        "comparisons": comparisons(records),
        "runs": [{k: v for k, v in record.items() if k not in ("tokens", "baseline_perplexity")} for record in records],
    }


def by_setting(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, Setting], dict[int, Mapping[str, Any]]]:
    """(method, setting) → seed → record."""
    found: dict[tuple[str, Setting], dict[int, Mapping[str, Any]]] = {}
    for record in records:
        setting = Setting(**{f.name: record[f.name] for f in dataclasses.fields(Setting)})
        found.setdefault((record["method"], setting), {})[record["seed"]] = record
    return found


def comparisons(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """bigq against each peer at each equal setting: difference of KL, draw by draw, and what of it is noise.

    noise: twice the standard error of the mean difference, from the spread of all settings' differences over the draws in parts of their
    KL (a setting by itself has too few draws to tell), and not less than the standard error of a KL over the held-out tokens.
    """
    found, pairs = by_setting(records), {}
    for method, setting in itertools.product(METHODS, SETTINGS):
        theirs, ours = found.get((method.name, setting), {}), found.get((method.twin or "", setting), {})
        if both := sorted(theirs.keys() & ours.keys()):
            pairs[method, setting] = [(ours[seed], theirs[seed]) for seed in both]
    spread = relative_spread([[(a["kl"] - b["kl"]) / b["kl"] for a, b in draws] for draws in pairs.values()])
    rows = []
    for (method, setting), draws in pairs.items():
        ours_kl, theirs_kl = (statistics.fmean(pair[i]["kl"] for pair in draws) for i in (0, 1))
        difference = ours_kl - theirs_kl
        noise = max(2 * spread * theirs_kl / math.sqrt(len(draws)), statistics.fmean(a["kl_stderr"] for a, _ in draws))
        said = "within noise" if abs(difference) <= noise else "bigq is better" if difference < 0 else "bigq is worse"
        row = {"peer": method.name, "bigq": method.twin, **dataclasses.asdict(setting), "draws": len(draws)}
        rows.append(row | {"kl_bigq": ours_kl, "kl_peer": theirs_kl, "difference": difference, "noise": noise, "verdict": said})
    return rows


def relative_spread(differences: list[list[float]]) -> float:
    """The standard deviation of differences over draws, pooled over settings; SPREAD where none has two draws."""
    repeated = [values for values in differences if len(values) > 1]
    if not repeated:
        return SPREAD
    return math.sqrt(sum(statistics.variance(v) * (len(v) - 1) for v in repeated) / sum(len(v) - 1 for v in repeated))


def cell(records: Mapping[int, Mapping[str, Any]]) -> str:
    """Perplexity / KL, means over the draws, and how far the KLs are apart."""
    if not records:
        return "–"
    values = [record["kl"] for record in records.values()]
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    perplexity = statistics.fmean(record["perplexity"] for record in records.values())
    return f"{perplexity:.3f} / {statistics.fmean(values):.4f}{spread}"


def table(result: Mapping[str, Any]) -> str:
    """docs/quality.md."""
    found = by_setting(result["runs"])
    calibration, versions = result["calibration"], result["versions"]
    named = ", ".join(
        f"{name} {versions[name]}" for name in ("gptqmodel", "llmcompressor", "compressed-tensors", "torch") if name in versions
    )
    shape = f"{calibration['rows']} × {calibration['tokens_per_row']}"
    lines = [
        "# Quality, and how it compares with other GPTQ programs",
        "",
        "<!-- Written by scripts/quality.py --table from docs/results/quality.json and quality_moe.json; do not edit. -->",
        "",
        *advice(found),
        "",
        "## What was measured",
        "",
        f"The shipped model (2.5 million parameters, fp32) was quantized on {shape} tokens on a CPU: the same tokens for every",
        f"program, with up to {len(calibration['seeds'])} draws. `bigq eval` evaluated it on {result['heldout_tokens']} held-out tokens.",
        f"The original's perplexity is {result['original_perplexity']:.4f}.",
        f"Damping is {DAMPING} unless given. All programs compute in fp32:",
        f"{named}.",
        "",
        "A cell is perplexity / mean KL divergence from the original per token, in nats. Lower is better.",
        "Both are means over the draws; ± is the standard deviation of the KL.",
        "",
        "- act-order uses static groups: columns keep their places. `bigq rtn` has no order and needs no calibration.",
        "- `mse 2.4`, `mse 4` and `mse 6` are grid searches with `--mse-power`; `mse` alone uses the default power.",
        "- With act-order in groups of 32 at 2 bits, no search is best: scales are found before errors widen the weights.",
    ]
    if least := [run["damping_raised"] for run in result["runs"] if run["method"].endswith("damping 0.001")]:
        lines += [f"- With a damping of 0.001, {sum(least)} Linears of {len(least)} runs needed more damping to be factored."]
    lines.append("")
    if result["runs_missing"]:
        lines += [f"Of {len(result['runs']) + len(result['runs_missing'])} runs, {len(result['runs_missing'])} are missing.", ""]
    columns = [(True, False), (True, True), (False, False), (False, True)]
    for bits, group_size in itertools.product((4, 3, 2), (-1, 32)):
        lines += [f"## {bits} bits, {'one scale per row' if group_size == -1 else f'groups of {group_size}'}", ""]
        lines += ["| | sym | sym, act-order | asym | asym, act-order |", "|---|---|---|---|---|"]
        for method in METHODS:
            settings = [Setting(bits=bits, group_size=group_size, symmetric=s, act_order=a) for s, a in columns]
            cells = [cell(found.get((method.name, setting), {})) for setting in settings]
            if set(cells) != {"–"}:
                lines.append(f"| {method.name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, *compared(result["comparisons"])])


def page(results: Path) -> str:
    """docs/quality.md, from quality.json and quality_moe.json."""
    dense, experts = (json.loads((results / f"{name}.json").read_text(encoding="utf-8")) for name in ("quality", "quality_moe"))
    return "\n".join([table(dense), *moe_section.section(experts)])


def advice(found: Mapping[tuple[str, Setting], Mapping[int, Mapping[str, Any]]]) -> list[str]:
    """Five lines on which settings to choose, with the KLs that say so, over the draws that both methods have."""

    def runs(bits: int, group_size: int, method: str = "bigq gptq", symmetric: bool = True, act_order: bool = True) -> Mapping[int, Any]:
        return found.get((method, Setting(bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order)), {})

    def better(bits: int, group_size: int, method: str = "bigq gptq", symmetric: bool = True) -> str:
        return change(runs(bits, group_size), runs(bits, group_size, method, symmetric))

    def change(plain: Mapping[int, Any], other: Mapping[int, Any]) -> str:
        both = plain.keys() & other.keys()
        return " → ".join(f"{statistics.fmean(run[seed]['kl'] for seed in both):.4f}" for run in (plain, other)) if both else "–"

    mse, gptaq = "bigq gptq, mse", "bigq gptaq"
    return [
        "1. Keep the default order, which does not slow readers down. From `--no-act-order` to it, KL is"
        f"\n   {change(runs(4, 32, act_order=False), runs(4, 32))} (4 bits, groups of 32).",
        f"2. Use `--asym` if your [reader](formats.md) takes it: {better(4, 32, symmetric=False)}, at 2 bits"
        f" {better(2, 32, symmetric=False)}.",
        f"3. At 2 and 3 bits per row use `--mse`: {better(2, -1, mse)}, {better(3, -1, mse)}; not at 2 bits in groups with act-order.",
        f"4. `--method gptaq` takes twice the forward passes: {better(4, 32, gptaq)}, at 2 bits per row {better(2, -1, gptaq)}.",
        "5. Keep the default `--damping`. Measure your model with `bigq eval --baseline`: these figures are for one tiny model.",
    ]


def compared(rows: list[dict[str, Any]]) -> list[str]:
    """The lines on equal settings."""
    lines = [
        "## Equal settings",
        "",
        "bigq against each program with the same settings: natural order or static groups; Linears solved level by level",
        "(GPTQModel), or all Linears of a block on its unquantized activations (llm-compressor, which has no other way).",
        "A difference counts if it exceeds both twice its standard error over the draws (from the spread of all settings) and",
        "its standard error over the tokens. Programs find scales differently: at 2 bits bigq takes scales of groups from the",
        "original weights, and with `--mse` at 2 and 3 bits it sums errors to the power 4, while GPTQModel used the usual 2.4.",
        "",
        "| | compared with | settings | bigq is better | within noise | bigq is worse |",
        "|---|---|---|---|---|---|",
    ]
    for peer in dict.fromkeys(row["peer"] for row in rows):
        mine = [row for row in rows if row["peer"] == peer]
        counts = [sum(row["verdict"] == said for row in mine) for said in ("bigq is better", "within noise", "bigq is worse")]
        lines.append(f"| {mine[0]['bigq']} | {peer} | {len(mine)} | {' | '.join(map(str, counts))} |")
    worse = [row for row in rows if row["verdict"] == "bigq is worse"]
    if worse:
        lines += [
            "",
            "Where bigq is worse:",
            "",
            "| compared with | setting | draws | bigq | peer | difference | noise |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in worse:
            setting = Setting(**{f.name: row[f.name] for f in dataclasses.fields(Setting)})
            figures = " | ".join(f"{row[key]:.4f}" for key in ("kl_bigq", "kl_peer", "difference", "noise"))
            lines.append(f"| {row['peer']} | {setting.name} | {row['draws']} | {figures} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, help="folder with the peers' virtual environments")
    parser.add_argument("--work", type=Path, help="folder for models, outputs and records of runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for quality.json; quality.md goes to the folder above")
    parser.add_argument("--tools", default=",".join(SHORT), help="separated by commas (default: %(default)s)")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="draws, separated by commas (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only runs whose name has it")
    parser.add_argument("--keep", action="store_true", help="keep the quantized models")
    parser.add_argument("--collect", action="store_true", help="make no run; gather those that are there")
    parser.add_argument("--table", action="store_true", help="only write quality.md, from quality.json and quality_moe.json")
    args = parser.parse_args()
    if args.work is not None:  # peers run in there
        args.work = args.work.resolve()
    path = args.out / "quality.json"
    if not args.table:
        if args.work is None:
            parser.error("--work is needed, unless --table is given")
        prepare(args.work)
        if not args.collect:
            runs = [run for run in all_runs(args.tools.split(","), map(int, args.seeds.split(","))) if args.only in run.name]
            make(runs, args.venvs, args.work, args.keep)
        args.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(collect(args.work), indent=1, ensure_ascii=False) + "\n")
    (args.out.parent / "quality.md").write_text(page(args.out))


if __name__ == "__main__":
    main()
