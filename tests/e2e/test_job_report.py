"""``bigq report`` and what it tells: the record of runs and evaluations, the page, the model card; and that none of it disturbs a job."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from tinyjob import at_points, hashes, passes

import bigq
from bigq import faults
from bigq.cli.main import main
from bigq.config import JobConfig
from bigq.errors import BusyError, CheckpointError, NumericsError, UsageError
from bigq.infer.evaluate import EvalConfig
from bigq.inspect.history import read_history
from bigq.inspect.linear_results import BY_RULE, UNFIT
from bigq.inspect.verify import verify
from bigq.io.checksum import unseal
from bigq.job.finish import CARD_MARK
from bigq.job.journal import Journal
from bigq.reports import write
from bigq.reports.style import STYLE
from bigq.reports.write import write_model_card, write_report
from bigq.scheme import QuantScheme, Rule

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = (Rule.parse(r".*\.down_proj:bits=8"), Rule(r".*\.1\.self_attn\.o_proj", None))
VOID = ("meta", "br", "img", "path", "use", "rect", "line")


def job(ids: Path, **changes: Any) -> JobConfig:
    values = {"scheme": QuantScheme(group_size=32), "calibration": str(ids), "samples": 4, "seqlen": 16, "batch": 4, "quiet": True}
    return JobConfig(**{**values, "rules": RULES, **changes})


def judge(out: Path, ids: Path, baseline: Path | None = None, quiet: bool = True) -> bigq.Evaluation:
    config = EvalConfig(data=str(ids), seqlen=16, samples=4, device="cpu", quiet=quiet)
    return bigq.evaluate(str(out), config, baseline=None if baseline is None else str(baseline))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from models import make_checkpoint

    folder = make_checkpoint(tmp_path_factory.mktemp("source") / "m", "llama")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- x\n---\n# The original\n")
    return folder


@pytest.fixture(scope="module")
def finished(source: Path, ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that was interrupted, went on, and was evaluated; tests that change it copy it first."""
    out = tmp_path_factory.mktemp("finished") / "out"
    interrupt(source, out, job(ids_file), KeyboardInterrupt("by hand"))
    bigq.quantize(str(source), out, job(ids_file), command=["quantize", str(source), str(out), "--rule", "<b>:bits=8"])
    judge(out, ids_file, source)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def interrupt(source: Path, out: Path, config: JobConfig, error: BaseException, commits: int = 2) -> None:
    """Let ``error`` strike right after so many commits."""
    commit, done = Journal.commit, []

    def striking(self: Journal, record: Any) -> None:
        commit(self, record)
        done.append(record.unit)
        if len(done) == commits:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "commit", striking)
        with pytest.raises(type(error)):
            bigq.quantize(str(source), out, config)


def runs(out: Path) -> list[dict[str, Any]]:
    lines = [unseal(line, line=True) for line in (out / ".bigq" / "runs.jsonl").read_bytes().splitlines(keepends=True)]
    assert None not in lines
    return [line for line in lines if line is not None]


# The record of runs.


def test_a_run_tells_how_it_went(finished: Path) -> None:
    first, second = runs(finished)
    assert (first["ended"]["outcome"], second["ended"]["outcome"]) == ("stopped", "finished")
    assert first["ended"]["said"] == "by hand" and second["ended"]["said"] is None
    assert (first["resumed_blocks"], second["resumed_blocks"]) == (0, 1)
    assert (first["ended"]["committed"], second["ended"]["committed"]) == (2, 4)
    ended = second["ended"]
    assert {"solve", "hessian", "load", "write"} <= ended["seconds_by_phase"].keys()
    assert 0 < sum(ended["seconds_by_phase"].values()) <= ended["seconds"]
    assert sum(ended["waiting"].values()) < ended["seconds"]
    assert ended["host_peak_bytes"] > 2**26 and second["planned"]["host"] > 2**26
    shards = sum(path.stat().st_size for path in finished.glob("*.safetensors"))
    assert ended["bytes_written"] > shards / 4 and ended["bytes_read"] > shards / 4
    assert second["blocks"]["of"] == [0, 0, 0] and second["blocks"]["path"] == "model.layers"
    assert second["command"][0] == "quantize" and second["folder"] == str(Path(second["model"]).resolve())


def test_a_run_that_failed_tells_why(source: Path, ids_file: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", job(ids_file), NumericsError("x: is not finite"))
    (run,) = runs(tmp_path / "out")
    assert run["ended"]["outcome"] == "failed" and run["ended"]["said"] == "x: is not finite"


def test_what_is_recorded_of_a_run_decides_no_byte(finished: Path, source: Path, ids_file: Path, tmp_path: Path) -> None:
    bigq.quantize(str(source), tmp_path / "out", job(ids_file))
    assert hashes(tmp_path / "out") == hashes(finished)


def test_a_finished_job_whose_end_cannot_be_recorded_is_finished(
    source: Path, ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    writes = passes(lambda: bigq.quantize(str(source), tmp_path / "counted", job(ids_file)))["file.opened"]
    faults.arm(f"file.opened:{writes}:ENOSPC")
    bigq.quantize(str(source), out, job(ids_file, quiet=False))
    faults.disarm()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "runs.jsonl: cannot be written: No space left" in warnings[0] and "the output is complete" in warnings[0]
    assert "ended" not in runs(out)[0] and verify(out) == []
    assert read_history(out).runs[0].outcome == "not recorded"


# The record of evaluations.


def test_an_evaluation_is_kept_with_the_job(finished: Path, source: Path, ids_file: Path) -> None:
    (judged,) = read_history(finished).evaluations
    again = bigq.evaluate(str(source), EvalConfig(data=str(ids_file), seqlen=16, samples=4, device="cpu", quiet=True))
    assert judged.baseline_perplexity == pytest.approx(again.perplexity) and judged.perplexity != judged.baseline_perplexity
    assert (judged.data, judged.samples, judged.seqlen, judged.tokens) == (str(ids_file), 4, 16, 60)
    assert judged.kl is not None and judged.kl > 0 and judged.top1_agreement is not None
    assert verify(finished) == []
    assert not (source / ".bigq").exists(), "a model that no job made has no record"


def test_evaluations_follow_one_another_and_damaged_ones_go(out: Path, ids_file: Path) -> None:
    path = out / ".bigq" / "evaluations.jsonl"
    path.write_bytes(path.read_bytes() + b'{"torn')
    assert any("evaluations.jsonl: line 2 is damaged" in problem for problem in verify(out))
    judge(out, ids_file)
    assert [each.baseline is None for each in read_history(out).evaluations] == [False, True]
    assert verify(out) == []


def test_an_evaluation_of_other_weights_does_not_count(out: Path) -> None:
    journal = out / ".bigq" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]))
    history = read_history(out)
    assert history.evaluations == () and history.outdated == 1


def test_a_folder_that_cannot_be_written_costs_an_evaluation_one_warning(
    out: Path, ids_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (out / ".bigq" / "evaluations.jsonl").read_bytes()
    faults.arm("file.opened:1:EROFS")
    result = judge(out, ids_file, quiet=False)
    faults.disarm()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert result.perplexity > 1 and len(warnings) == 1
    assert "evaluations.jsonl: cannot be written: Read-only file system" in warnings[0] and "the result is not recorded" in warnings[0]
    assert (out / ".bigq" / "evaluations.jsonl").read_bytes() == before


def test_a_damaged_record_costs_an_evaluation_nothing(out: Path, ids_file: Path) -> None:
    (out / ".bigq" / "job.json").write_text("{}")
    assert judge(out, ids_file).perplexity > 1, "a damaged record does not matter to it"
    assert len((out / ".bigq" / "evaluations.jsonl").read_bytes().splitlines()) == 1


# The page.


class Page(HTMLParser):
    """What is on a page; a tag that is closed in the wrong place fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def page(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    file = write_report(finished, tmp_path_factory.mktemp("page") / "report.html")
    return Page(file.read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else_and_runs_nothing(page: Page) -> None:
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "img", "iframe", "object", "embed", "a"} & {*tags}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("src", "action") for name in attributes), tag
        for name in ("href", "xlink:href", "clip-path"):
            assert re.fullmatch(r"(url\()?#[\w-]+\)?", attributes.get(name) or "#x"), attributes
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}) in page.tags


def test_the_page_can_be_read_by_everybody(page: Page) -> None:
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 2 and all(each["role"] == "img" and len(each["aria-label"] or "") > 20 for each in pictures)
    count = {tag: sum(each == tag for each, _ in page.tags) for tag in ("table", "caption", "thead")}
    assert count["table"] == count["caption"] == count["thead"] >= 5
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len({*ids}) == len(ids), "an id is used twice"


def test_the_title_is_the_models_name(page: Page, source: Path, finished: Path) -> None:
    """Not that of the folder, which is often "out"."""
    assert finished.name == "out" and source.name == "m"
    text = page.text
    assert text.lstrip().startswith("m: bigq report") and "bigq reportmfinished" in text


def test_wide_parts_scroll_on_a_phone(page: Page) -> None:
    """Each table and picture in a box of its own; the page itself is as wide as the screen."""
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    wide = [attributes for tag, attributes in page.tags if tag == "div" and attributes.get("class") == "wide"]
    assert len(wide) == sum(tag in ("table", "svg") for tag, _ in page.tags) and all(each["tabindex"] == "0" for each in wide)
    inside = [tag for before, (tag, _) in zip(page.tags, page.tags[1:], strict=False) if before == ("div", wide[0]) or before[1] in wide]
    assert {*inside} == {"table", "svg"}
    assert re.search(r"\.wide \{[^}]*overflow-x: auto", STYLE)
    assert re.search(r"@media \(max-width[^@]*tbody th \{[^}]*white-space: normal", STYLE)


def test_the_page_tells_what_is_known(page: Page, finished: Path) -> None:
    history = read_history(finished)
    cells = [attributes["id"] for tag, attributes in page.tags if tag == "g" and (attributes.get("id") or "").startswith("heat-cell-")]
    assert len(cells) == 21 and len(history.linears) == 20 and [left.reason for left in history.left_out] == [BY_RULE]
    assert f"block 1, self_attn.o_proj: {BY_RULE}" in page.text
    worst = history.largest_errors(1)[0]
    assert f"{worst.error:.2e}" in page.text and f"{worst.shape[0]} × {worst.shape[1]}" in page.text
    assert "--rule '.*\\.down_proj:bits=8'" in page.text and "'<b>:bits=8'" in page.text
    judged = history.evaluations[0]
    assert f"{judged.perplexity:.3f}" in page.text and f"{judged.baseline_perplexity:.3f}" in page.text
    assert "run 1: by hand" in page.text and "No Linear needed more damping" in page.text
    bits = [(8 if linear.name == "mlp.down_proj" else 4) for linear in history.linears]
    assert [linear.bits for linear in history.linears] == bits


PACKED = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def test_bits_per_weight_are_those_of_the_files(finished: Path) -> None:
    require_bits_of_the_files(finished)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("format", "dtype"), [("gptq_v2", "float32"), ("compressed-tensors", "float32"), ("compressed-tensors", "bfloat16")]
)
def test_bits_per_weight_are_those_of_each_format(format: str, dtype: str, symmetric: bool, tmp_path: Path, ids_file: Path) -> None:
    from models import make_checkpoint

    source = make_checkpoint(tmp_path / "m", "llama", dtype=getattr(torch, dtype))
    scheme = QuantScheme(group_size=32, symmetric=symmetric)
    config = job(ids_file, method="rtn", format=format, scheme=scheme, rules=(Rule.parse("lm_head:bits=8,group_size=-1"),), lm_head=True)
    bigq.quantize(str(source), tmp_path / "out", config)
    require_bits_of_the_files(tmp_path / "out")


def require_bits_of_the_files(out: Path) -> None:
    from safetensors import safe_open

    history = read_history(out)
    stored = weights = 0
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            packed = [name for name in file.keys() if name.rpartition(".")[2] in PACKED]  # noqa: SIM118
            stored += sum(file.get_tensor(name).nbytes for name in packed)
    weights = sum(linear.weights for linear in history.linears)
    assert history.linear_bits == pytest.approx(8 * stored / weights)
    assert history.all_bits is not None and history.parameters is not None
    assert history.all_bits == pytest.approx(8 * sum(p.stat().st_size for p in out.glob("*.safetensors")) / history.parameters)


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_a_quantized_head_counts_and_is_in_no_block(method: str, source: Path, ids_file: Path, tmp_path: Path) -> None:
    rules = (Rule.parse("lm_head:bits=2"),)
    bigq.quantize(str(source), tmp_path / "out", job(ids_file, lm_head=True, rules=rules, method=method, alpha=0.25))
    history = read_history(tmp_path / "out")
    head = history.head
    assert head is not None and len(history.linears) == 22 and history.largest_errors(1) == [head]
    assert (head.name, head.shape, head.bits) == ("lm_head", (128, 64), 2) and "lm_head" not in history.names and history.left_out == ()
    text = write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert len(re.findall('<g id="heat-cell-', text)) == 21
    page = Page(text).text
    assert "output head, lm_head" in page and f"lm_head–{head.error:.2e}128 × 642" in page and "lm_head, quantized" in page
    assert ("W* is the weight corrected" in page) == ("with alpha 0.25" in page) == (method == "gptaq")
    assert "| `lm_head` | – |" in write_model_card(tmp_path / "out").read_text(encoding="utf-8")


def test_a_head_that_cannot_be_quantized_is_left_out(source: Path, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigq.methods import gptq

    factorize = gptq.factorize

    def failing(h: Any, *, name: str, **options: Any) -> Any:
        if name == "lm_head":
            raise NumericsError(f"{name}: cannot be factored; use more")
        return factorize(h, name=name, **options)

    monkeypatch.setattr(gptq, "factorize", failing)
    bigq.quantize(str(source), tmp_path / "out", job(ids_file, lm_head=True, on_nonfinite="skip", rules=()))
    history = read_history(tmp_path / "out")
    assert history.head is None and [(left.block, left.name) for left in history.left_out] == [(None, "lm_head")]
    assert "unquantized, as it failed: cannot be factored" in write_model_card(tmp_path / "out").read_text(encoding="utf-8")
    assert "Unquantized: 1 Linear" in write_report(tmp_path / "out").read_text(encoding="utf-8")


def test_a_job_of_gguf_counts_both_files(source: Path, ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    bigq.quantize(str(source), out, job(ids_file, format="gguf", method="rtn", rules=()))
    shards, whole = sum(path.stat().st_size for path in out.glob("*.safetensors")), (out / "model.gguf").stat().st_size
    history = read_history(out)
    assert (history.output_bytes, history.gguf_bytes) == (shards + whole, whole)
    assert history.all_bits is not None and history.parameters is not None
    assert history.all_bits == pytest.approx(8 * shards / history.parameters)
    page = Page(write_report(out).read_text(encoding="utf-8")).text
    assert "of it model.gguf" in page and "the model twice" in page and "No Linear needed more damping" not in page
    assert front_matter_tags(write_model_card(out)) == ["gguf", "gptq", "4-bit", "bigq"] and verify(out) == []
    (out / "model.gguf").unlink()
    card = (out / "README.md").read_bytes()
    assert main(["report", str(out), "--model-card"]) == 2 and "the job is not finished (failed)" in capsys.readouterr().err
    assert (out / "README.md").read_bytes() == card
    assert "model.gguf: is missing although the job had finished" in Page(write_report(out).read_text(encoding="utf-8")).text


def front_matter_tags(card: Path) -> list[str]:
    return re.findall(r"^- (.*)$", card.read_text(encoding="utf-8").split("---")[1], re.MULTILINE)


def test_a_later_evaluation_without_a_baseline_takes_nothing_from_card_and_page(out: Path, source: Path, ids_file: Path) -> None:
    before = write_model_card(out).read_text(encoding="utf-8")
    judge(out, ids_file)
    assert write_model_card(out).read_text(encoding="utf-8") == before and "| source model |" in before
    judge(out, ids_file, out)
    history = read_history(out)
    assert [each.of_source for each in history.evaluations] == [True, False, False]
    card = write_model_card(out).read_text(encoding="utf-8")
    assert "| source model |" in card and "| `out` |" in card
    page = Page(write_report(out).read_text(encoding="utf-8")).text
    assert f"{history.evaluations[0].baseline_perplexity:.3f} before" in page and f"4 × 1660{out}" in page


def test_an_unfinished_job_is_reported_as_such(source: Path, ids_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(source, out, job(ids_file), KeyboardInterrupt())
    text = write_report(out).read_text(encoding="utf-8")
    assert "not finished (stopped)" in text and "1 of 3 done" in text
    assert len(re.findall('<g id="heat-cell-', text)) == 7
    assert hashes(out).keys() == {"model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"}


def test_raised_damping_and_skipped_linears_are_told(source: Path, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigq.methods import gptq

    factorize = gptq.factorize

    def failing(h: Any, *, damping: float, name: str, **options: Any) -> Any:
        if ".2.mlp.down_proj" in name:
            raise NumericsError(f"{name}: cannot be factored; use more")
        return factorize(h, damping=damping * (10 if ".1.mlp.gate_proj" in name else 1), name=name, **options)

    monkeypatch.setattr(gptq, "factorize", failing)
    bigq.quantize(str(source), tmp_path / "out", job(ids_file, on_nonfinite="skip"))
    history = read_history(tmp_path / "out")
    assert {(linear.block, linear.name) for linear in history.linears if linear.has_raised_damping} == {
        (1, "mlp.gate_proj"),
        (1, "mlp.up_proj"),
    }
    assert {left.name: left.reason for left in history.left_out if not left.wanted} == {"mlp.down_proj": "cannot be factored"}
    text = write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "Damping raised: 2 Linears" in text and "Unquantized: 2 Linears" in text and "cannot be factored" in text
    assert UNFIT not in text


def test_a_job_without_calibration_has_a_page(source: Path, ids_file: Path, tmp_path: Path) -> None:
    bigq.quantize(str(source), tmp_path / "out", job(ids_file, method="rtn"))
    text = Page(write_report(tmp_path / "out").read_text(encoding="utf-8")).text
    assert "rounding error" in text and "Not evaluated." in text and "tokens of" not in text


def test_by_default_the_page_lies_beside_the_folder(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}-report.html\n"
    assert (out.parent / "out-report.html").stat().st_size > 20_000 and verify(out) == []


def test_a_page_within_the_folder_is_refused(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(out), "--out", str(out / "x.html")]) == 2
    assert "lies in OUT" in capsys.readouterr().err and not (out / "x.html").exists()


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("", "is a folder; name a file, such as {}/report.html"),
        ("missing/x.html", "its folder does not exist; make it first"),
        ("pipe", "is not a regular file"),
    ],
)
def test_a_page_that_can_be_no_file_is_refused(file: str, said: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    target = tmp_path / file
    assert main(["report", str(out), "--out", str(target)]) == 2
    error = capsys.readouterr().err
    assert f"--out {target}: {said.format(target)}" in error and error.count("\n") == 1 and not list(tmp_path.rglob("*.html"))


def test_the_root_is_no_job(out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["report", "/"]) == 2
    assert "/: holds no job of bigq" in capsys.readouterr().err
    history = read_history(out)
    monkeypatch.setattr(write, "read_history", lambda _: history)
    assert main(["report", "/"]) == 2
    assert "/: is the root of the file system" in capsys.readouterr().err


def test_without_matplotlib_there_is_one_line_that_says_what_to_install(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["report", str(out)]) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install bigq[report]" in error
    assert not list(out.parent.glob("*.html"))
    assert main(["report", str(out), "--model-card"]) == 0, "a card needs no pictures"


def test_a_folder_of_no_job_is_refused(source: Path) -> None:
    with pytest.raises(UsageError, match="holds no job of bigq"):
        write_report(source)


# The model card.


def test_the_card_takes_the_place_of_the_readme_and_stays(out: Path, source: Path, ids_file: Path) -> None:
    before = hashes(out)
    card = write_model_card(out)
    text = card.read_text(encoding="utf-8")
    assert card == out / "README.md" and text.startswith('---\npipeline_tag: text-generation\nlicense: "apache-2.0"\n')
    assert {name for name, digest in hashes(out).items() if before[name] != digest} == {"README.md"}
    assert verify(out) == []
    bigq.quantize(str(source), out, job(ids_file))
    assert card.read_text(encoding="utf-8") == text
    write_model_card(out)
    assert card.read_text(encoding="utf-8") == text, "a second card is the first"
    assert json.loads((out / ".bigq" / "owner.json").read_text())["facts"]["blocks"] == 3


def test_the_card_is_its_writers_afterwards(out: Path, source: Path, ids_file: Path) -> None:
    card = write_model_card(out)
    card.write_text(card.read_text(encoding="utf-8") + "\nMy own words.\n", encoding="utf-8")
    assert verify(out) == []
    shard = next(out.glob("model-00003*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    bigq.quantize(str(source), out, job(ids_file))
    assert "My own words." in card.read_text(encoding="utf-8"), "it outlives a shard that is made again"
    assert verify(out) == []
    card.unlink()
    assert verify(out) == []


def test_killed_while_the_card_is_written_the_folder_is_sound(finished: Path, source: Path, ids_file: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        """As sudden as a signal: nothing that bigq catches."""

    def kill() -> None:
        raise Killed

    counted = Path(shutil.copytree(finished, tmp_path / "counted"))
    points = passes(lambda: write_model_card(counted))
    assert points["file.renamed"] == 2, "the manifest and the card"
    for name, times in points.items():
        for count in range(1, times + 1):
            out = Path(shutil.copytree(finished, tmp_path / f"{name}-{count}"))
            with at_points({(name, count): kill}), pytest.raises(Killed):
                write_model_card(out)
            assert verify(out) == [], (name, count)
            write_model_card(out)
            assert verify(out) == [] and CARD_MARK in (out / "README.md").read_text(encoding="utf-8")
            shutil.rmtree(out)


def test_only_a_finished_and_sound_job_gets_a_card(out: Path, source: Path, ids_file: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "other", job(ids_file), KeyboardInterrupt())
    with pytest.raises(UsageError, match="the job is not finished"):
        write_model_card(tmp_path / "other")
    before = hashlib.sha256((out / "README.md").read_bytes()).hexdigest()
    manifest = out / ".bigq" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged"):
        write_model_card(out)
    assert hashlib.sha256((out / "README.md").read_bytes()).hexdigest() == before


def test_another_readme_is_still_looked_after(out: Path) -> None:
    """Only the card that bigq wrote is free; the source's README is a file like any other."""
    (out / "README.md").write_text("changed")
    assert any(problem.startswith("README.md: ") for problem in verify(out))


def test_a_job_with_a_card_is_not_disturbed_by_the_job_that_runs(
    out: Path, source: Path, ids_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the other way round: who writes a card owns the folder meanwhile."""
    from bigq.reports import card

    def quantize(*_: Any) -> None:
        with pytest.raises(BusyError, match="another bigq job is writing to this folder"):
            bigq.quantize(str(source), out, job(ids_file))

    monkeypatch.setattr(card, "free_card", quantize)
    write_model_card(out)


def test_the_report_of_a_killed_process(child: Callable[..., Any], source: Path, ids_file: Path, tmp_path: Path) -> None:
    """By the command line: what was typed is in the page, and a run that was killed has no recorded end."""
    out = tmp_path / "out"
    words = ["quantize", source, out, "--calibration", ids_file, "--samples", "4", "--seqlen", "16", "--group-size", "32", "--quiet"]
    killed = child("-m", "bigq", *words, env={"BIGQ_FAULT": "block.solved:2:kill"})
    assert killed.returncode == -9
    done = child("-m", "bigq", "report", out)
    assert done.returncode == 0, done.stderr
    text = Page((tmp_path / "out-report.html").read_text(encoding="utf-8")).text
    assert "not finished (killed)" in text and "not recorded" in text and f"{source} {out} --calibration {ids_file}" in text
