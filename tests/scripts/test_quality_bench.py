"""The quality bench: its errors, its judge, its texts, its models, what programs are told, and that a run is made once."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from models import make_checkpoint, random_ids
from safetensors.torch import save_file

sys.path.append(str(ROOT / "scripts"))

import train_small
from quality_bench import collected, comparison, corpora, judge, runs, settings, smollm2, subjects
from quality_bench.page import page
from quality_bench.settings import CHOOSING, CONTESTANTS, JUDGING, SUBJECTS, Contestant, Run, Setting, Subject

import bigq
from bigq.kernels.pack import pack

RESULTS = ROOT / "docs/results"
TINY = Subject(name="tiny", model="tiny", corpus="tiny", half=CHOOSING, rows=4, seqlen=16, windows=3, window=16, groups=(32,))


# Errors.


def test_the_error_of_one_draw_is_that_over_windows() -> None:
    found = comparison.mean_of([[1.0, 2.0, 6.0]])
    assert (found.mean, found.stderr) == pytest.approx((3.0, statistics.stdev([1, 2, 6]) / math.sqrt(3))) and found.of_draws is None


def test_differences_between_draws_count_even_if_windows_agree() -> None:
    """All windows of a draw move together: only the number of draws can make the mean surer."""
    found = comparison.mean_of([[1.0 + 1e-9 * w for w in range(50)], [2.0 + 1e-9 * w for w in range(50)]])
    assert found.stderr == pytest.approx(statistics.stdev([1, 2]) / math.sqrt(2)) and found.of_draws == pytest.approx(
        statistics.stdev([1, 2])
    )


def test_the_error_is_what_the_spread_of_many_experiments_is() -> None:
    generator = torch.Generator().manual_seed(0)
    draws, windows, means, variances = 4, 20, [], []
    for _ in range(400):
        parts = [torch.randn(*shape, generator=generator) for shape in ((draws, 1), (1, windows), (draws, windows))]
        found = comparison.mean_of((0.3 * parts[0] + 0.5 * parts[1] + parts[2]).tolist())
        means.append(found.mean)
        variances.append(found.stderr**2)
    assert statistics.fmean(variances) == pytest.approx(statistics.variance(means), rel=0.2)
    assert statistics.variance(means) == pytest.approx(0.09 / 4 + 0.25 / 20 + 1 / 80, rel=0.2)


def record(contestant: str, windows: list[float], draw: int = 0, **more: Any) -> dict[str, Any]:
    shape = {"subject": "smollm2-prose", "bits": 4, "group_size": 64, "symmetric": True}
    figures = {"perplexity": 2.0, "original_perplexity": 1.9, "top1_agreement": 0.9, "cpu_s": 1.0, "peak_bytes": 2**20}
    return {**shape, "contestant": contestant, "draw": draw, "kl_of_windows": windows, **figures, **more}


def test_differences_are_paired_by_window_and_by_draw() -> None:
    """Windows and draws differ far more than contestants do; a draw that only one has does not count."""
    records = [record("bigq", [1.0, 10.0, 100.0]), record("bigq", [2.0, 20.0, 200.0], 1), record("bigq", [0.0, 0.0, 0.0], 2)]
    records += [record("x", [1.5, 10.5, 100.5]), record("x", [2.5, 20.5, 200.5], 1)]
    (rows,) = comparison.rows(records, "bigq").values()
    (row,) = [row for row in rows if row["contestant"] == "x"]
    assert (row["difference"], row["difference_stderr"], row["common_draws"]) == pytest.approx((0.5, 0.0, 2))
    assert row["stderr"] > 10 and "x" in comparison.summary(records, "bigq")


# Tables of contestants.


def test_names_are_files_of_their_own_and_both_halves_have_models() -> None:
    names = [run.name for run in settings.all_runs(range(settings.DRAWS))]
    assert len(set(names)) == len(names) and not any(set(name) & set(" /%,") for name in names)
    for half in (CHOOSING, JUDGING):
        assert len({subject.model for subject in SUBJECTS if subject.half == half}) >= 3
    texts = [{s.corpus for s in SUBJECTS if s.half == half} for half in (CHOOSING, JUDGING)]
    assert not texts[0] & texts[1] and texts[0] | texts[1] == set(corpora.CORPORA)
    both = {s.model for s in SUBJECTS if s.half == CHOOSING} & {s.model for s in SUBJECTS if s.half == JUDGING}
    assert both == {"smollm2"}, "as subjects.py says"
    assert {s.model for s in SUBJECTS} == set(subjects.MAKERS)


def run_of(contestant: str, subject: Subject = SUBJECTS[0]) -> Run:
    (found,) = [c for c in CONTESTANTS if c.name == contestant]
    return Run(subject=subject, contestant=found, setting=Setting(bits=3, group_size=64, symmetric=False), draw=1)


def test_all_programs_are_told_the_same_setting() -> None:
    told = {
        name: settings.PEERS[run_of(name).contestant.tool](run_of(name))
        for name in ("GPTQModel, gptaq", "llm-compressor, mse", "auto-round")
    }
    assert told["GPTQModel, gptaq"] == {"bits": 3, "group_size": 64, "sym": False, "gptaq": {"alpha": 0.25}}
    shape = {"num_bits": 3, "symmetric": False, "strategy": "group", "group_size": 64}
    assert told["llm-compressor, mse"] == {"weights": shape | {"observer": "memoryless_mse"}}
    assert told["auto-round"] == {"bits": 3, "group_size": 64, "sym": False}
    arguments = runs.bigq_arguments(run_of("bigq, ranges"), Path("ids"))
    assert arguments[:5] == ["--bits", "3", "--group-size", "64", "--asym"] and arguments[-2:] == ["--scales", "minmax"]
    defaults = [c for c in CONTESTANTS if c.kind == "default"]
    assert {c.tool for c in defaults} == {"bigq", *settings.PEERS} - {"autoawq"} and not any(c.flags or c.told for c in defaults)
    assert {c.tool for c in CONTESTANTS if c.kind == "awq"} == {"bigq", "llmc", "autoawq"}


# The judge.


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_codes_are_read_as_they_were_written(bits: int) -> None:
    codes = torch.randint(2**bits, (96, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    assert torch.equal(judge.unpacked(pack(codes, bits), bits), codes.float())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> runs.Bench:
    """A random model with its rows, as subjects.prepare would make them."""
    work = tmp_path_factory.mktemp("bench")
    texts = work / "models/texts/tiny"
    texts.mkdir(parents=True)
    make_checkpoint(work / "models/tiny", "llama")
    (work / "models/tiny/origin.json").write_text(json.dumps({"from": "tests", "sha256_of_tensors": "0" * 64}))
    (texts / "facts.json").write_text("{}")
    save_file({"input_ids": random_ids(4, seed=1)[:, :16].contiguous()}, texts / "ids-0.safetensors")
    save_file({"input_ids": random_ids(3, seed=2)[:, :16].contiguous()}, texts / "windows.safetensors")
    return runs.Bench(models=work / "models", work=work, tree=ROOT)


TINY_RUN = Run(
    subject=TINY,
    contestant=Contestant(name="bigq rtn", flags="--method rtn"),
    setting=Setting(bits=3, group_size=32, symmetric=False),
    draw=0,
)


def test_a_run_is_judged_as_bigq_judges_and_made_once(bench: runs.Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """The judge shares no code with bigq: packing, dequantizing and streaming are checked too."""
    bench.keep = True
    assert bench.make([TINY_RUN]) == [], capsys.readouterr().err
    made = json.loads(bench.record_of(TINY_RUN).read_text())
    (packed,) = (bench.work / "out").glob("*/packed")
    config = bigq.EvalConfig(
        data=str(bench.models / "texts/tiny/windows.safetensors"), seqlen=16, dtype="float32", device="cpu", quiet=True
    )
    own = bigq.evaluate(str(packed), config, baseline=str(bench.models / "tiny"))
    assert own.kl is not None and made["kl"] == pytest.approx(own.kl, rel=1e-3) and made["kl"] > 0
    assert made["perplexity"] == pytest.approx(own.perplexity, rel=1e-5) and made["top1_agreement"] == pytest.approx(own.top1_agreement)
    assert own.kl_stderr == pytest.approx(comparison.mean_of([made["kl_of_windows"]]).stderr, rel=1e-3)
    assert made["linears"] == 7 * made["linears"] // 7 > 0
    assert 3 < made["bits_per_weight"] < 4 and made["cpu_s"] > 0 and made["peak_bytes"] > 10**8
    bench.record_of(TINY_RUN).write_text(json.dumps(made | {"kl": 7.0}))
    assert bench.make([TINY_RUN]) == [] and json.loads(bench.record_of(TINY_RUN).read_text())["kl"] == 7.0


@pytest.mark.long
def test_a_failed_run_is_told_and_others_go_on(bench: runs.Bench, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = dataclasses.replace(TINY_RUN, setting=Setting(bits=3, group_size=24, symmetric=True))
    unknown = dataclasses.replace(TINY_RUN, contestant=Contestant(name="bigq new", flags="--no-such-option"))
    peer = dataclasses.replace(TINY_RUN, contestant=Contestant(name="GPTQModel", tool="gptqmodel"))
    (problem,) = bench.make([wrong, unknown, peer])
    assert problem.startswith("tiny.3g24-sym.bigq-rtn.0: bigq failed (bigq: error: ") and "group size" in problem.lower()
    assert not bench.record_of(wrong).exists() and not bench.record_of(unknown).exists() and not bench.record_of(peer).exists()


def test_weights_beside_the_originals_are_refused() -> None:
    """They would leave the original in place, and the KL would be 0."""
    before = {"a": torch.zeros(2, 2)}
    judge.require_replaced(before, {"a": torch.ones(2, 2)})
    for wrong, said in (
        ({"x.a": torch.ones(2, 2)}, "x.a is not"),
        ({"a": torch.ones(1, 2)}, "same shape"),
        ({"a": torch.zeros(2, 2)}, "as it was"),
    ):
        with pytest.raises(ValueError, match=said):
            judge.require_replaced(before, wrong)


# Texts and models.


def test_texts_are_split_without_a_paragraph_in_common() -> None:
    for make in (lambda: corpora.source(0), lambda: corpora.source(1), corpora.documentation):
        corpus = make()
        parts = [{p for p in text.split("\n\n") if len(p) > 200} for text in (corpus.calibration, corpus.heldout)]
        assert min(map(len, parts)) > 5 and not parts[0] & parts[1]
    assert not set(corpora.source(0).heldout.split("\n\n")[5:20]) & set(corpora.source(1).heldout.split("\n\n")[5:])
    book = (
        "".join(f"CHAPTER {'I' * n}.\nWords of\nchapter {n}.\nMore[A] words.\n" for n in range(1, 10))
        + "[A: a note]\nEnd of Project Gutenberg\n"
    )
    found = corpora.split_chapters(book.replace("IIIIIIIII", "IX"))
    assert found.calibration.startswith("Words of chapter 1.\n\nMore words.") and found.heldout.endswith("chapter 9.\n\nMore words.")


def test_draws_have_no_row_in_common() -> None:
    def words(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(map(int, text.split()))}

    text = " ".join(map(str, range(100)))
    drawn = corpora.draws(text, words, rows=3, seqlen=8, count=4)  # type: ignore[arg-type]
    assert [tuple(d.shape) for d in drawn] == [(3, 8)] * 4 and torch.cat(drawn).unique().numel() == 96
    assert not torch.equal(torch.cat(drawn)[:, 0], torch.cat(drawn)[:, 0].sort().values)
    assert corpora.windows(text, words, rows=3, seqlen=8)[:, 0].tolist() == [0, 32, 64]  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="12 rows of 8 tokens, 15 are needed"):
        corpora.draws(text, words, rows=5, seqlen=8, count=3)  # type: ignore[arg-type]


def test_rows_of_q_and_k_are_put_into_transformers_order() -> None:
    """llama.cpp rotates pairs that lie side by side, transformers pairs that lie half a head apart."""
    weight = torch.arange(8.0)[:, None]
    assert smollm2.rotary_order(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert smollm2.hf_name("blk.3.attn_output.weight") == "model.layers.3.self_attn.o_proj.weight"
    assert smollm2.hf_name("output_norm.weight") == "model.norm.weight"


def test_outliers_leave_the_function_as_it_was() -> None:
    torch.manual_seed(0)
    model = train_small.qwen2().to(torch.bfloat16).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter).bfloat16())
        ids = torch.randint(256, (2, 32))
        before = model(ids).logits
        norms = [layer.input_layernorm.weight.clone() for layer in model.base_model.layers]
        train_small.add_outliers(model)
        after = model(ids).logits
    assert torch.equal(before, after) and before.std() > 0.01
    for layer, was in zip(model.base_model.layers, norms, strict=True):
        factors = layer.input_layernorm.weight / was
        assert (factors > 1).sum() == 4 and factors[factors > 1].min() >= 32


# Results.


def test_results_without_a_commit_are_refused(tmp_path: Path) -> None:
    (run,) = [r for r in settings.all_runs([0]) if r.name == "smollm2-prose.4g64-sym.bigq.0"]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{run.name}.json").write_text(json.dumps(record("bigq", [0.1, 0.2], revision="abc with local changes")))
    with pytest.raises(SystemExit, match="abc with local changes; commit"):
        collected.result(tmp_path, tmp_path, [run], {})


def test_restored_records_make_the_same_results(tmp_path: Path) -> None:
    """A work folder made from the result file alone, without any model: collecting again changes no figure."""
    made = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))
    every = settings.all_runs(range(3))
    assert collected.restore(RESULTS / "quality.json", tmp_path, every) == len(made["runs"])
    assert collected.restore(RESULTS / "quality.json", tmp_path, every) == 0
    again = collected.result(tmp_path, tmp_path, every, made["subjects"])
    same = ("revisions", "subjects", "halves", "comparisons")
    assert {name: again[name] for name in same} == {name: made[name] for name in same}
    assert sorted(map(json.dumps, again["runs"])) == sorted(map(json.dumps, made["runs"]))
    with pytest.raises(SystemExit, match="no model and text of opt"):
        collected.result(tmp_path, tmp_path, every, {name: made["subjects"][name] for name in made["subjects"] if name != "opt"})


def test_the_page_is_the_table_of_the_results() -> None:
    made = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs/quality.md").read_text(encoding="utf-8") == page(RESULTS)
    assert made["comparisons"] == collected.compared(made["runs"])
    assert all(len(name) == 40 for name in made["revisions"])
    lines = page(RESULTS).splitlines()
    assert lines[4].startswith("| preset |") and any(line.startswith("## Against other programs at their defaults") for line in lines)
