"""The comparison on a model with experts: its differences, its verdicts, the tokens that its rules choose, and its page."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "scripts"))

import moe_section
import quality_moe
import train_moe
from quality_moe import BITS, WAYS, Run

RESULT = ROOT / "docs/results/quality_moe.json"


def record(way: str, windows: list[float], seed: int = 0, bits: int = 4) -> dict[str, Any]:
    return {"way": way, "bits": bits, "seed": seed, "kl": sum(windows) / len(windows), "perplexity": 2.0, "kl_of_windows": windows}


def test_a_difference_is_paired_by_window() -> None:
    """Windows differ far more from each other than programs do."""
    mean, stderr = quality_moe.difference([1.0, 10.0, 100.0], [2.0, 11.0, 101.0])
    assert (mean, stderr) == pytest.approx((1 / 37, 0.0))
    mean, stderr = quality_moe.difference([1.0, 1.0], [2.0, 4.0])
    assert (mean, stderr) == pytest.approx((2.0, math.sqrt(2) / math.sqrt(2)))


def test_a_verdict_needs_every_seed() -> None:
    assert quality_moe.verdict([(0.5, 0.1), (0.3, 0.1)]) == "higher"
    assert quality_moe.verdict([(-0.5, 0.1), (-0.3, 0.1)]) == "lower"
    assert quality_moe.verdict([(0.5, 0.1), (0.1, 0.1)]) == "within noise"
    assert quality_moe.verdict([(0.5, 0.1), (-0.5, 0.1)]) == "within noise"


def test_comparisons_are_with_the_own_way_at_the_same_bits_and_seeds() -> None:
    records = [record("bigq", [1.0, 2.0, 3.0], seed) for seed in (0, 1)]
    records += [record("GPTQModel", [2.0, 4.1, 6.0], seed) for seed in (0, 1)]
    records += [record("bigq, ReLU", [1.0, 1.0, 1.0]), record("bigq, ReLU, 0 for dead inputs", [0.5, 0.4, 0.5])]
    records += [record("llm-compressor", [9.0, 9.0, 9.0], bits=3)]
    rows = {row["way"]: row for row in quality_moe.comparisons(records)}
    assert rows.keys() == {"bigq", "GPTQModel", "bigq, ReLU", "bigq, ReLU, 0 for dead inputs"}
    assert "verdict" not in rows["bigq"] and rows["bigq"]["kl"] == [2.0, 2.0] and "verdict" not in rows["bigq, ReLU"]
    assert rows["GPTQModel"]["verdict"] == "higher" and rows["GPTQModel"]["seeds"] == [0, 1]
    assert rows["GPTQModel"]["higher_by"] == pytest.approx(6.1 / 6)
    dead = rows["bigq, ReLU, 0 for dead inputs"]
    assert (dead["compared_with"], dead["verdict"]) == ("bigq, ReLU", "lower")


def test_the_error_of_a_difference_holds_the_spread_over_draws() -> None:
    records = [record("bigq", [1.0, 1.0], seed) for seed in (0, 1)]
    records += [record("GPTQModel", [1.1, 1.1], 0), record("GPTQModel", [1.3, 1.3], 1)]
    row = quality_moe.comparisons(records)[-1]
    assert (row["higher_by"], row["stderr"]) == pytest.approx((0.2, 0.1)), "over the windows it is 0"
    records[2:] = [record("GPTQModel", [1.0, 1.4], 0), record("GPTQModel", [1.0, 1.4], 1)]
    row = quality_moe.comparisons(records)[-1]
    assert (row["higher_by"], row["stderr"]) == pytest.approx((0.2, 0.2)), "over the draws it is 0"


def test_names_of_runs_are_files_of_their_own() -> None:
    runs = quality_moe.all_runs((0, 1))
    assert len({run.name for run in runs}) == len(runs) == 2 * len(WAYS) * len(BITS)
    assert not any(set(run.name) & set(" /%,") for run in runs)


def test_peers_are_told_the_same_setting() -> None:
    told = {way.name: quality_moe.peer_settings(Run(way=way, bits=3, seed=0)) for way in WAYS if way.tool != "bigq"}
    assert set(told) == {"llm-compressor", "llm-compressor, routed", "GPTQModel"}
    assert told["GPTQModel"]["bits"] == 3 and told["GPTQModel"]["fallback"] == quality_moe.FALLBACK
    assert told["llm-compressor"]["oneshot"] == {} and told["llm-compressor"]["weights"]["num_bits"] == 3
    assert told["llm-compressor, routed"]["oneshot"] == {"moe_calibrate_all_experts": False}


def test_weights_under_other_names_are_found() -> None:
    """A peer's weights beside the original's would leave the original in place: the KL would be 0."""
    original = {"a": torch.zeros(2), "b": torch.zeros(2)}
    quality_moe.require_replaced(original, {"a": torch.ones(2), "b": torch.zeros(2)}, 1)
    with pytest.raises(SystemExit, match="1 Linears were quantized, 0 tensors of 2 changed, 3 are there"):
        quality_moe.require_replaced(original, {**original, "x.a": torch.ones(2)}, 1)
    with pytest.raises(SystemExit, match="2 Linears were quantized, 1 tensors"):
        quality_moe.require_replaced(original, {"a": torch.ones(2), "b": torch.zeros(2)}, 2)


def rows_of(tokens: int) -> Any:
    return SimpleNamespace(experts=torch.zeros(tokens, 2, dtype=torch.int64))


def test_rules_choose_tokens() -> None:
    few, none = torch.tensor([3, 5]), torch.tensor([], dtype=torch.int64)
    assert quality_moe.all_if_none(rows_of(8), few, 4).tolist() == [3, 5]
    assert quality_moe.all_if_none(rows_of(8), none, 4).tolist() == list(range(8))
    assert quality_moe.filled(1, rows_of(8), few, 2).tolist() == [3, 5]
    assert quality_moe.filled(1, rows_of(8), few, 4).tolist() == [3, 5, 0, 4]
    assert quality_moe.filled(2, rows_of(8), few, 9).tolist() == [3, 5, 0, 1, 2, 4, 6, 7]
    assert quality_moe.none_below(0.25, rows_of(8), few, 4).tolist() == [3, 5]
    assert quality_moe.none_below(0.26, rows_of(8), few, 4).tolist() == []
    assert quality_moe.none_below_inputs(rows_of(8), few, 2).tolist() == [3, 5]
    assert quality_moe.none_below_inputs(rows_of(8), few, 3).tolist() == []


def test_the_trained_model_starts_alike_and_counts_what_its_router_chooses() -> None:
    torch.manual_seed(5)
    first, second = train_moe.new_model(), train_moe.new_model()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    rows = torch.randint(0, 256, (2, 16))
    perplexity, counts = train_moe.measure(first, rows)
    assert [sum(layer) for layer in counts] == [2 * 16 * train_moe.CHOSEN] * 4 and len(counts[0]) == train_moe.EXPERTS
    with torch.no_grad():
        assert perplexity == pytest.approx(math.exp(float(first(input_ids=rows, labels=rows).loss)), rel=1e-5)


def test_training_batches_are_those_of_their_step() -> None:
    data = torch.arange(200, dtype=torch.uint8)
    first = train_moe.batch_at(3, data, 2, 8)
    assert torch.equal(first, train_moe.batch_at(3, data, 2, 8)) and not torch.equal(first, train_moe.batch_at(4, data, 2, 8))
    assert (first[:, 1:] - first[:, :-1] == 1).all() and first.dtype == torch.int64


def test_training_twice_gives_the_same_bits() -> None:
    data = torch.randint(32, 127, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    models = [train_moe.new_model(), train_moe.new_model()]
    for model in models:
        train_moe.train(model, data, steps=2, rate=lambda step: 1e-3, output_router_logits=True)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    assert not torch.equal(models[0].lm_head.weight, train_moe.new_model().lm_head.weight)


def test_spread_counts_starved_experts() -> None:
    (layer,) = train_moe.spread([[0, 1, 9, 30]])
    assert layer == {"min": 0, "median": 5, "max": 30, "without": 1, "below_a_tenth_of_the_mean": 1}
    assert quality_moe.spread([4, 0, 2]) == {"min": 0, "median": 2, "max": 4, "without": 1}


def test_cells_say_the_difference_and_whether_it_counts() -> None:
    row = {"way": "x", "bits": 4, "kl": [0.001, 0.002]}
    assert moe_section.cell(row) == "0.00150"
    row |= {"higher_by": 0.5, "stderr": 0.04, "verdict": "higher"}
    assert moe_section.cell(row) == "0.00150, **+50.0 ± 4.0 %**"
    assert moe_section.cell(row | {"verdict": "within noise"}) == "0.00150, +50.0 ± 4.0 %"


def test_the_advice_for_few_tokens_is_what_the_result_says() -> None:
    ways = {"bigq": 0.01, "bigq, few tokens": 0.03, "bigq, few tokens, damping 0.1": 0.02}
    rows = [{"way": way, "bits": 3, "kl": [kl - 0.001, kl + 0.001]} for way, kl in ways.items()]
    text = " ".join(moe_section.advice([*rows, {"way": "bigq", "bits": 4, "kl": [9.0]}]))
    assert "0.0300 → 0.0100" in text and "`--damping 0.1`: 0.0300 → 0.0200" in text
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["comparisons"]
    (damped,) = [row for row in rows if row["bits"] == 3 and row["way"] == "bigq, few tokens, damping 0.1"]
    assert damped["verdict"] == "lower", "or the page must not advise it"


def test_the_result_is_complete_and_bigq_is_not_behind() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert result["runs_missing"] == []
    assert {(row["way"], row["bits"]) for row in result["comparisons"]} == {(way.name, bits) for way in WAYS for bits in BITS}
    peers = [row for row in result["comparisons"] if row["way"].startswith(("llm-compressor", "GPTQModel"))]
    assert len(peers) == 3 * len(BITS) and all(row["verdict"] != "lower" for row in peers)
