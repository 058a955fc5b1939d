"""Model cards: front matter that a hub takes, nothing of the machine that made it, and texts that stay texts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigq.config import JobConfig
from bigq.model_card import base_model, licence_lines, model_card, source_readme
from bigq.sched.history import History, Judged, LeftOut, LinearResult, Run
from bigq.scheme import QuantScheme, Rule

REVISION = "0123456789abcdef0123456789abcdef01234567"
SNAPSHOT = f"/home/somebody/.cache/huggingface/hub/models--owner--some-model/snapshots/{REVISION}"


def run(**changes: Any) -> Run:
    values: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(Run)), None)
    values |= {"at": "2026-01-01T00:00:00+00:00", "outcome": "finished", "by_phase": {}, "waiting": {}, "command": (), "machine": "CPU_1"}
    values |= {"model": "owner/some-model", "folder": SNAPSHOT, "versions": {"bigq": "0.1"}, "notes": ()}
    return Run(**{**values, **changes})


def history(**changes: Any) -> History:
    linear = LinearResult(block=0, name="a|b`c", shape=(64, 64), bits=4, group_size=32, error=1e-3, damping=0.01, asked=0.01)
    config = JobConfig(
        scheme=QuantScheme(group_size=32), calibration="/home/somebody/text.txt", seqlen=64, batch=2, rules=(Rule("a|b`c", None),)
    )
    judged = Judged(
        at="2026-01-01",
        data="/home/somebody/heldout.txt",
        samples=2,
        seqlen=64,
        tokens=126,
        perplexity=5.25,
        baseline="x",
        baseline_perplexity=5.0,
        kl=0.01,
        kl_stderr=0.001,
        top1_agreement=0.97,
    )
    values: dict[str, Any] = {
        "out": "/home/somebody/my_model-4bit",
        "state": "finished",
        "config": config,
        "blocks": 1,
        "blocks_done": 1,
        "names": ("a|b`c",),
        "linears": (linear,),
        "left_out": (LeftOut(block=0, name="o", reason="by rule", wanted=True),),
        "runs": (run(),),
        "evaluations": (judged,),
        "outdated": 0,
        "source_bytes": 10_000_000,
        "parameters": 5_000_000,
        "output_bytes": 3_000_000,
        "damaged": (),
    }
    return History(**{**values, **changes})


def front(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match is not None
    found = yaml.safe_load(match[1])
    assert isinstance(found, dict)
    return found


def test_front_matter_of_a_model_from_the_hub() -> None:
    card = model_card(history(), "---\nlicense: llama3.1\n---\n")
    assert front(card) == {
        "base_model": "owner/some-model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "llama3.1",
        "tags": ["gptq", "4-bit", "bigq"],
    }
    assert f"owner/some-model@{REVISION}" in card


def test_nothing_of_the_machines_paths_is_published() -> None:
    assert "somebody" not in model_card(history(), "")
    assert "somebody" not in model_card(history(runs=(run(model="/home/somebody/x", folder="/home/somebody/x"),)), "")


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        (SNAPSHOT, ("owner/some-model", REVISION)),
        ("/cache/models--gpt2/snapshots/" + REVISION, ("gpt2", REVISION)),
        ("/data/owner/some-model", (None, None)),
        ("/cache/models--a\n--b/snapshots/" + REVISION, (None, None)),
        ("/cache/models--owner--x: y/snapshots/" + REVISION, (None, None)),
        (None, (None, None)),
    ],
)
def test_the_base_model_is_one_of_the_hub_or_nobody_says(folder: str | None, expected: tuple[str | None, str | None]) -> None:
    assert base_model(history(runs=(run(folder=folder),))) == expected
    card = front(model_card(history(runs=(run(folder=folder),)), ""))
    assert card.get("base_model") == expected[0] and ("base_model_relation" in card) == (expected[0] is not None)


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("\ufeff---\r\nlicense: 'mit'\r\ntags: [x]\r\n---\r\nlicense: gpl\r\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: my-licence\nlicense_link: https://example.org/L?a=b#c\n---\n",
            {"license": "other", "license_name": "my-licence", "license_link": "https://example.org/L?a=b#c"},
        ),
        ("license: mit\n", {}),
        ("---\ntags:\n  license: mit\n---\n", {}),
        ("---\nlicense: no: yes\n---\n", {}),
        ("---\nlicense: !!python/object x\n---\n", {}),
        ("---\nlicense:\n- mit\n- gpl\n---\n", {}),
        ("# Model\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("", {}),
    ],
)
def test_the_licence_is_the_sources_or_not_stated(readme: str, expected: dict[str, str]) -> None:
    assert (yaml.safe_load("\n".join(licence_lines(readme))) or {}) == expected


def test_names_cannot_break_out_of_tables_or_code() -> None:
    card = model_card(history(), "")
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert r"| ``a\|b`c`` | 0 | 1.00e-03 |" in rows
    assert "# my\\_model-4bit" in card and "CPU\\_1" in card


@pytest.mark.parametrize(
    ("scheme", "rules", "plain"),
    [
        (QuantScheme(), (), True),
        (QuantScheme(bits=8, group_size=-1), (), True),
        (QuantScheme(bits=3), (), False),
        (QuantScheme(symmetric=False), (), False),
        (QuantScheme(group_size=16), (), False),
        (QuantScheme(), (Rule.parse("x:bits=8"),), True),
        (QuantScheme(), (Rule.parse("x:bits=2"),), False),
    ],
)
def test_vllm_is_told_a_precision_where_its_kernels_need_one(scheme: QuantScheme, rules: tuple[Rule, ...], plain: bool) -> None:
    card = model_card(history(config=JobConfig(scheme=scheme, rules=rules)), "")
    assert ("vllm serve MODEL\n" in card) == plain and ("--dtype float16" in card) != plain
    assert ("`dynamic`" in card) == bool(rules)


def test_results_are_there_once_per_text_or_not_at_all() -> None:
    one = history().evaluations[0]
    later = dataclasses.replace(one, perplexity=6.5)
    card = model_card(history(evaluations=(one, later)), "")
    assert "6.5" in card and "5.25" not in card and "97.0 %" in card
    assert "## Results" not in model_card(history(evaluations=()), "")


def test_a_card_of_a_job_of_another_version_says_less() -> None:
    card = model_card(history(config=None, runs=()), "")
    assert "Reproducing" not in card and "vllm" not in card and front(card)["tags"] == ["gptq", "bigq"]


def test_the_sources_readme_is_found_where_the_source_is_or_in_the_copy(tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / "source"
    out.mkdir()
    source.mkdir()
    known = history(runs=(run(folder=str(source)),))
    assert source_readme(out, known) == ""
    (out / "README.md").write_text("copy")
    assert source_readme(out, known) == "copy"
    (source / "README.md").write_bytes(b"original \xff")
    assert source_readme(out, known) == "original �"
    (source / "README.md").unlink()
    (source / "README.md").mkdir()
    assert source_readme(out, known) == "copy"
