"""What the documentation promises: tests that exist, links that resolve, figures of the result files, lines that fit."""

from __future__ import annotations

import ast
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "scripts"))

import draw_memory
from test_imports import FLOORS, room_of

RESUME = ROOT / "docs/resume.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
RESULTS = ROOT / "docs/results"
#: A test as the pages and tests/quick.txt name it.
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")
#: A source file as the pages name it: from the root, or from one of ``HOMES``. Names of files to be written are no such.
CODE_FILE = re.compile(r"`(?!(?:\w+/)*(?:mine|x)\.py)((?:\w+/)*\w+\.(?:py|txt|toml))(?=[`:])")
HOMES = ("", "bigq", "tests", "bigq/methods", "bigq/io/formats", "bigq/io/sources")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
MAX_LINE, MAX_README = 120, 120
#: Phrases of an earlier translation that say nothing to a reader.
PHRASES = re.compile(r"gone on with|is told|told is|as they were", re.IGNORECASE)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def result(name: str) -> Any:
    return json.loads(text_of(RESULTS / name))


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Lines of Markdown with their numbers, without fenced and indented code."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield number, line


def table_rows(text: str) -> list[list[str]]:
    """The cells of every row of a page's tables, without rules."""
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for _, line in prose(text) if line.startswith("|")]
    return [row for row in cells if set("".join(row)) - set("-: ")]


def heading_ids(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = [line.lstrip("#").strip().lower() for _, line in prose(text) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "")).replace(" ", "-") for title in titles}


def long_lines(text: str) -> list[int]:
    return [
        number for number, line in prose(text) if len(line) > MAX_LINE and not line.startswith("|") and not LINK.fullmatch(line.strip())
    ]


def broken_links(path: Path, text: str) -> list[str]:
    broken = []
    for target in (target for _, line in prose(text) for target in LINK.findall(line)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or (anchor and anchor not in heading_ids(text if there == path else text_of(there))):
            broken.append(target)
    return broken


def defined(path: Path) -> set[str]:
    return {node.name for node in ast.parse(text_of(path)).body if isinstance(node, ast.FunctionDef)}


RESUME_ROWS = [row for row in table_rows(text_of(RESUME)) if row[0] != "when"]


@pytest.mark.parametrize("row", RESUME_ROWS, ids=lambda row: row[0][:60])
def test_each_line_names_tests_that_exist(row: list[str]) -> None:
    assert len(row) == 3
    named = TEST.findall(row[2])
    assert named, row[0]
    for file, function in named:
        assert function in defined(ROOT / "tests" / file), f"{file}::{function}"


def test_statements_about_clusters_name_tests_that_exist() -> None:
    rows = [row for row in table_rows(text_of(ROOT / "docs/cluster.md").partition("## What shows it")[2]) if row[0] != "statement"]
    assert len(rows) > 20
    for what, by in rows:
        named = TEST.findall(by)
        assert named or "Slurm" in by or "read" in by or by == "not run", what
        for file, function in named:
            assert function in defined(ROOT / "tests" / file), f"{file}::{function}"


def test_the_page_has_lines_and_is_linked() -> None:
    assert len(RESUME_ROWS) > 30
    assert "docs/resume.md" in text_of(ROOT / "README.md")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
class TestEveryPage:
    def test_lines_fit(self, path: Path) -> None:
        assert long_lines(text_of(path)) == []

    def test_relative_links_resolve(self, path: Path) -> None:
        assert broken_links(path, text_of(path)) == []

    def test_files_that_it_names_exist(self, path: Path) -> None:
        named = {file for _, line in prose(text_of(path)) for file in CODE_FILE.findall(line)}
        assert [file for file in sorted(named) if not any((ROOT / home / file).exists() for home in HOMES)] == []

    def test_it_can_be_reached(self, path: Path) -> None:
        """From the README, directly."""
        if path.name != "README.md":
            assert path.relative_to(ROOT).as_posix() in LINK.findall(text_of(ROOT / "README.md"))


def test_the_checks_of_pages_find_what_they_look_for() -> None:
    links = "[a](nowhere.md) [b](#a-b) [c](#c) [d](https://x/y)"
    bad = f"# A b\n\n{'x ' * 70}\n\n{links}\n\n```\n{'y ' * 70}[e](gone.md)\n```\n| {'z ' * 70} |\n"
    assert long_lines(bad) == [3]
    assert broken_links(ROOT / "README.md", bad) == ["nowhere.md", "#c"]


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= MAX_README


@pytest.mark.parametrize("folder", ["bigq", "docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_phrases_are_plain(folder: str) -> None:
    place = ROOT / folder
    files = [place] if place.is_file() else [p for kind in ("*.py", "*.md") for p in place.rglob(kind)]
    assert files
    found = [f"{p.relative_to(ROOT)}:{n}" for p in files for n, line in enumerate(text_of(p).splitlines(), 1) if PHRASES.search(line)]
    assert found == []


# Figures: as the result files have them.


def test_the_demo_s_table_is_its_result_file() -> None:
    rows = [
        [
            row["method"],
            str(row["bits"]),
            f"{row['perplexity']:.3f}",
            f"{row['kl']:.4f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['bytes'] / 2**20:.2f}",
            "" if row["seconds"] is None else f"{row['seconds']:.1f}",
        ]
        for row in result("demo.json")["rows"]
    ]
    shown = table_rows(text_of(ROOT / "README.md"))
    assert len(rows) == 7 and all(row in shown for row in rows)


def test_other_figures_of_the_readme_are_those_of_the_result_files() -> None:
    readme = " ".join(text_of(ROOT / "README.md").split())
    peers, memory, stress, fuzz = (result(f"{name}.json") for name in ("bench_peers", "bench_memory", "stress", "fuzz"))
    ours, llmc, gptqmodel = (peers["medians"][name] for name in ("bigq, defaults", "llmcompressor", "gptqmodel"))
    walls = (f"{name} {median['wall_s']:.1f} s" for name, median in (("bigq", ours), ("llm-compressor", llmc), ("GPTQModel", gptqmodel)))
    assert f"{', '.join(walls)}; peaks {', '.join(str(median['peak_rss_mib']) for median in (ours, llmc, gptqmodel))} MiB" in readme
    assert f"{memory['wall_s'] / 60:.0f} min on shared cores, peak {memory['vmhwm_bytes'] / 2**30:.2f} GiB" in readme
    assert f"A model of {memory['source_bytes'] / 1e9:.1f} GB" in readme and f"limit of {memory['limit_bytes'] / 1e9:.0f} GB" in readme
    total = stress["total"]
    said = f"{total['kills']} kills and {total['stopped_by_sigterm']} stops, {total['outputs_compared']} outputs compared, none different"
    assert said in readme and total["wrong"] == []
    assert f"{len(stress['jobs'])} kinds of jobs" in readme and f"{fuzz['inputs']:,} read or refused" in readme and fuzz["broken"] == 0
    compared = result("quality.json")["comparisons"]
    kl = {row["contestant"]: row["kl"] for row in compared if (row["subject"], row["setting"]) == ("smollm2-prose", "4g64-sym")}
    assert " ".join(f"{name} {kl[name]:.3f}," for name in ("bigq", "GPTQModel", "llm-compressor")).rstrip(",") in readme


def test_the_plan_of_a_70b_is_its_result_file() -> None:
    readme = " ".join(text_of(ROOT / "README.md").split())
    plan = result("plan_shapes.json")["plans"]["llama-2-70b"]
    gpu, host, disk = (f"{plan[field] / 1e9:.1f} GB" for field in ("device_bytes", "host_bytes", "disk_bytes"))
    assert f"predicts {gpu} of GPU memory, {host} of host memory, {disk} of disk" in readme
    assert f"no less than {plan['seconds_at_least']:.0f} seconds" in readme


def test_the_table_of_plans_with_experts_is_its_result_file() -> None:
    shown = [row[1:] for row in table_rows(text_of(ROOT / "docs/experts.md"))]
    plans = result("plan_experts.json")["plans"].values()
    for plan in plans:
        memory = [f"{plan[field] / 1e9:.1f} GB" for field in ("device_bytes", "host_bytes")]
        moved = [f"{plan[field] / 1e9:.0f} GB" for field in ("read_bytes", "written_bytes")]
        assert [*memory, *moved, f"{plan['seconds_at_least'] / 60:.1f} min"] in shown
        moving = (plan["read_bytes"] + plan["written_bytes"]) / 3e9
        assert plan["seconds_at_least"] == pytest.approx(moving) and moving > sum(phase["seconds"] for phase in plan["phases"])
    assert len(plans) == 6


def test_the_table_of_strengths_is_its_result_file() -> None:
    """docs/methods.md: KL as a fraction of GPTQ's, over the schemes that have every column, for the first draw."""
    columns = ("gptaq 0.25", "gptaq 0.5", "gptaq 0.75", "gptaq 1.0", "by columns 0.25", "by columns 1.0")
    schemes: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in result("gptaq.json")["results"]:
        if run["seed"] == 0:
            scheme = run["bits"], run["group_size"], run["sym"], run["act_order"]
            schemes.setdefault(scheme, {})[run["method"]] = run
    shown = table_rows(text_of(ROOT / "docs/methods.md"))
    for bits in (4, 3, 2):
        found = [runs for scheme, runs in schemes.items() if scheme[0] == bits and {"gptq", *columns} <= runs.keys()]
        row = [str(bits), str(len(found))]
        for column in columns:
            choose, report = ([runs[column][half] / runs["gptq"][half] for runs in found] for half in ("kl_choose", "kl_report"))
            mean = statistics.geometric_mean
            row.append(f"{mean(choose):.3f} / {mean(report):.3f} (≤ {max(report):.3f})")
        assert row in shown


def test_the_costs_of_layers_with_experts_are_their_result_files() -> None:
    """docs/experts.md: columns of measured layers and of predicted ones."""
    shown = table_rows(text_of(ROOT / "docs/experts.md"))
    for row in (*measured_layers(), *predicted_layers()):
        assert row in shown, row


def measured_layers() -> Iterator[list[str]]:
    results = [result(f"bench_{name}.json")["result"] for name in ("tiny-experts", "qwen3-235b", "deepseek-v3")]
    phases = [one["seconds_by_phase"] for one in results]
    for name in ("forward", "gather", "hessian", "factor", "solve", "scatter", "pack"):
        yield [
            f"experts: {name}, s",
            *(f"{each[f'experts: {name}'] / one['blocks_done']:.1f}" for each, one in zip(phases, results, strict=True)),
        ]
    yield [
        "up to the router, s",
        *(f"{each['up to the router'] / one['blocks_done']:.1f}" for each, one in zip(phases, results, strict=True)),
    ]
    yield ["seconds a layer", *(f"{one['seconds_per_block']:.1f}" for one in results)]
    yield ["share of time spent waiting", *(f"{100 * one['waiting_share']:.1f} %" for one in results)]
    tokens = [one["tokens_of_experts"] for one in results]
    spread = [
        (min(t["fewest"] for t in each), statistics.median(t["median"] for t in each), max(t["most"] for t in each)) for each in tokens
    ]
    yield ["tokens of an expert", *(", ".join(f"{number:.0f}" for number in each) for each in spread)]
    yield ["peak of host memory", *(f"{one['peaks']['host_resident_bytes'] / 1e9:.2f} GB" for one in results)]
    yield ["the plan's", *(f"{one['planned']['host'] / 1e9:.2f} GB" for one in results)]


def predicted_layers() -> Iterator[list[str]]:
    plans = [result("plan_expert_layers.json")["plans"][name] for name in ("deepseek-v3", "qwen3-235b")]
    yield ["floor, s a layer", *(f"{plan['seconds_at_least'] / plan['blocks']:.1f}" for plan in plans)]
    computing = [sum(phase["seconds"] for phase in plan["phases"]) / plan["blocks"] for plan in plans]
    yield ["of that, computing alone", *(f"{seconds:.1f}" for seconds in computing)]
    yield ["GPU memory", *(f"{plan['device_bytes'] / 1e9:.1f} GB" for plan in plans)]
    yield ["host memory", *(f"{plan['host_bytes'] / 1e9:.1f} GB" for plan in plans)]


def test_the_picture_of_memory_is_drawn_from_its_result_file() -> None:
    assert text_of(draw_memory.PICTURE) == draw_memory.draw(result("plan_shapes.json"))


def test_every_result_file_is_in_the_index() -> None:
    links = LINK.findall(text_of(ROOT / "docs/results.md"))
    assert {f"results/{path.name}" for path in RESULTS.iterdir()} <= set(links)


# The rooms table.


def test_every_room_is_in_the_table_and_in_order() -> None:
    rows = [row[0].strip("`") for row in table_rows(text_of(ROOT / "docs/architecture.md")) if row[0].startswith("`bigq/")]
    packages = {f"{path.parent.relative_to(ROOT).as_posix()}/" for path in (ROOT / "bigq").rglob("__init__.py")}
    assert len(rows) == len(set(rows))
    assert {*rows, "bigq/", "bigq/kernels/gpu/"} == packages | set(rows), "a package is missing from the table"
    missing = [row for row in rows if not (ROOT / row).is_dir()]
    assert missing == []
    floors = [room_of(row.strip("/").replace("/", ".")) for row in rows]
    heights = [room[1] for room in floors if room is not None]
    assert len(heights) == len(rows) and heights == sorted(heights, reverse=True), "rooms lower in the table are lower in FLOORS"
    assert len(FLOORS) > 10


# What --quick runs.


def test_the_quick_tests_exist() -> None:
    lines = [line for line in text_of(ROOT / "tests/quick.txt").splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(set(lines)) > 10
    for line in lines:
        file, _, name = line.removeprefix("--deselect=").partition("::")
        assert (ROOT / file).exists(), line
        if name:
            assert any(each.startswith(name) if line.startswith("--") else each == name for each in defined(ROOT / file)), line


def test_the_table_of_readers_is_the_codes() -> None:
    """The plan, the summary and model cards name readers from the same table."""
    from bigq.io.formats.readers_table import markdown_table

    assert markdown_table() in (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


def test_the_table_of_processes_is_its_result_file() -> None:
    from plan_scaling import PLACES, table

    found = result("plan_scaling.json")
    assert [[(plan["ranks"], plan["hosts"]) for plan in plans] for plans in found["models"].values()] == [list(PLACES)] * 3
    page = " ".join(text_of(ROOT / "docs/cluster.md").split())
    assert " ".join(table(found).split()) in page
    eight = [next(plan for plan in plans if plan["ranks"] == 8) for plans in found["models"].values()]
    now = [f"{100 * plan['scaling_computing']:.0f}" for plan in eight]
    hidden = [f"{100 * plan['scaling_if_hidden']:.0f}" for plan in eight]
    assert f"With eight it reaches {now[0]}, {now[1]} and {now[2]} %" in page
    assert f"it would be {hidden[0]}, {hidden[1]} and {hidden[2]} %" in page


def test_the_table_of_methods_is_that_of_its_results() -> None:
    sys.path.append(str(ROOT / "scripts"))
    from compare_methods import ROWS, table

    result = json.loads((ROOT / "docs/results/methods.json").read_text(encoding="utf-8"))
    assert set(result["models"]["shipped"]["rows"]) == set(ROWS)
    assert table(result) in text_of(ROOT / "docs/methods.md")
