"""Model cards: front matter that a hub takes, nothing of the machine that made it, and texts that stay texts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigq.config import JobConfig
from bigq.inspect.evaluations import EvaluationResult
from bigq.inspect.history import History, Run
from bigq.inspect.linear_results import LeftOut, LinearResult
from bigq.io.formats import readers
from bigq.reports.model_card import base_model, licence_lines, model_card, source_readme
from bigq.scheme import QuantScheme, Rule

REVISION = "0123456789abcdef0123456789abcdef01234567"
SNAPSHOT = f"/home/somebody/.cache/huggingface/hub/models--owner--some-model/snapshots/{REVISION}"


def run(**changes: Any) -> Run:
    values: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(Run)), None)
    values |= {"at": "2026-01-01T00:00:00+00:00", "outcome": "finished", "by_phase": {}, "waiting": {}, "command": (), "machine": "CPU_1"}
    values |= {"model": "owner/some-model", "folder": SNAPSHOT, "versions": {"bigq": "0.1"}, "notes": ()}
    return Run(**{**values, **changes})


def packed(block: int | None = 0, name: str = "a|b`c", bits: int = 4, group_size: int = 32, symmetric: bool = True) -> LinearResult:
    return LinearResult(
        block=block,
        name=name,
        shape=(64, 64),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        error=1e-3,
        damping=0.01,
        asked=0.01,
        stored_bits=20_000,
    )


HEAD = packed(None, "lm_head")


def evaluated(**changes: Any) -> EvaluationResult:
    values: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(EvaluationResult)), None)
    values |= {"at": "2026-01-01", "data": "/home/somebody/heldout.txt", "samples": 2, "seqlen": 64, "dtype": "auto", "tokens": 126}
    return EvaluationResult(**{**values, "perplexity": 5.25, "of_source": False, **changes})


def history(**changes: Any) -> History:
    linear = packed()
    config = JobConfig(
        scheme=QuantScheme(group_size=32), calibration="/home/somebody/text.txt", seqlen=64, batch=2, rules=(Rule("a|b`c", None),)
    )
    judged = evaluated(baseline="owner/some-model", of_source=True, baseline_perplexity=5.0, kl=0.01, kl_stderr=0.001, top1_agreement=0.97)
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
        "gguf_bytes": None,
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
    assert "# some-model, quantized" in card and "# my\\_model" in model_card(history(runs=()), "") and "CPU\\_1" in card


def made(*linears: LinearResult, format: str = "gptq", **changes: Any) -> History:
    """A job's history by what it packed. The first Linear is as its scheme says."""
    first = linears[0]
    scheme = QuantScheme(bits=first.bits, group_size=first.group_size, symmetric=bool(first.symmetric))
    config = JobConfig(scheme=scheme, format=format, seqlen=64, batch=2, **changes)
    return history(config=config, linears=linears, gguf_bytes=1_000_000 if format == "gguf" else None, left_out=())


def loading(card: str) -> str:
    return card.partition("## Loading\n")[2]


@pytest.mark.parametrize(
    ("linears", "format", "says"),
    [
        ([packed()], "gptq", None),
        ([packed(bits=8, group_size=-1)], "gptq_v2", None),
        ([packed(bits=3)], "gptq", "vLLM does not load gptq of 3 bits. It loads"),
        ([packed(symmetric=False)], "gptq_v2", "vLLM does not load asymmetric gptq_v2. It loads"),
        ([packed(symmetric=False)], "compressed-tensors", None),
        ([packed(group_size=16)], "gptq", "vLLM does not load gptq in groups of 16.\n"),
        ([packed(), packed(name="b", bits=8)], "gptq", None),
        ([packed(), packed(name="b", bits=2)], "gptq", "vLLM does not load gptq of 2 bits. It loads"),
        ([packed(symmetric=False)], "awq", None),
        ([packed(symmetric=False)], "gguf", "vLLM does not load asymmetric gptq_v2 shards. It loads"),
    ],
)
def test_vllm_is_offered_where_it_loads_the_model(linears: list[LinearResult], format: str, says: str | None) -> None:
    """Statements come from the table of readers; where another format would do, it is named."""
    card = model_card(made(*linears, format=format), "")
    assert ("vllm serve MODEL\n" in card) == (says is None)
    assert says is None or says in card
    assert ("bigq convert MODEL NEW --to compressed-tensors" in card) == (says is not None and says.endswith("It loads"))
    assert ("`dynamic`" in card) == (len(linears) > 1 and says is None)


@pytest.mark.parametrize(("scale_bits", "float16"), [(8, False), (11, True), (None, False)])
def test_scales_of_more_bits_than_bf16_need_float16_in_vllm(scale_bits: int | None, float16: bool) -> None:
    history = made(packed())
    assert history.config is not None
    scheme = dataclasses.replace(history.config.scheme, scale_bits=scale_bits)
    card = model_card(dataclasses.replace(history, config=dataclasses.replace(history.config, scheme=scheme)), "")
    assert ("vllm serve MODEL --dtype float16\n" in card) == float16


@pytest.mark.parametrize(
    ("format", "tags", "packages"),
    [
        ("gptq", ["gptq", "4-bit", "bigq"], "pip install transformers optimum gptqmodel"),
        ("gptq_v2", ["gptq", "4-bit", "bigq"], "pip install transformers optimum gptqmodel"),
        ("compressed-tensors", ["compressed-tensors", "4-bit", "bigq"], "pip install transformers compressed-tensors"),
        ("awq", ["awq", "4-bit", "bigq"], "pip install transformers gptqmodel"),
        ("w8a8-int8", ["compressed-tensors", "8-bit", "bigq"], "pip install transformers compressed-tensors"),
        ("gguf", ["gguf", "gptq", "4-bit", "bigq"], "pip install transformers optimum gptqmodel"),
    ],
)
def test_each_format_has_its_tags_and_its_packages(format: str, tags: list[str], packages: str) -> None:
    linear = packed(bits=8, group_size=-1) if format == "w8a8-int8" else packed()
    card = model_card(made(linear, format=format), "")
    assert front(card)["tags"] == tags and front(card)["library_name"] == "transformers"
    assert f"({packages})".replace("(", "(`").replace(")", "`)") in loading(card)
    assert ("optimum" in card) == (format not in ("compressed-tensors", "awq", "w8a8-int8"))
    assert ("Readers that do not know it would read it as `gptq`" in card) == (format in ("gptq_v2", "gguf"))
    assert ("llama-cli -m model.gguf" in card) == ("llama-cpp-python" in card) == (format == "gguf")


def test_a_format_that_no_program_was_run_with_is_for_bigq(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of loading follows the table of readers, not the format's name."""
    monkeypatch.setattr(readers, "ROWS", tuple(row for row in readers.ROWS if "compressed-tensors" not in row.formats))
    card = model_card(made(packed(), format="compressed-tensors"), "")
    said = loading(card)
    assert "No other program is known to read the format `compressed-tensors`. Load it with bigq:" in said and "bigq generate MODEL" in said
    assert "transformers" not in said and "vllm" not in said and "library_name" not in front(card)


def test_of_gguf_both_sizes_are_told() -> None:
    card = model_card(made(packed(), format="gguf"), "")
    assert "| size of model.gguf | 1.0 MiB |" in card and "| size of the safetensors shards, which hold the same model | 1.9 MiB |" in card
    assert "| bits per parameter of the whole checkpoint (safetensors) | 3.20 |" in card
    assert "shards beside it are the same model in the checkpoint format `gptq_v2`" in card


def test_asymmetric_compressed_tensors_name_the_transformers_that_load_them() -> None:
    card = loading(model_card(made(packed(symmetric=False), format="compressed-tensors"), ""))
    assert "pip install 'transformers<5.23' compressed-tensors" in card and "transformers 5.23 with compressed-tensors cannot load" in card
    mixed = loading(model_card(made(packed(), packed(name="b", symmetric=False), format="compressed-tensors"), ""))
    assert "transformers<5.23" in mixed and "5.23" not in loading(model_card(made(packed(), format="compressed-tensors"), ""))


def test_mixed_compressed_tensors_have_no_dynamic() -> None:
    card = model_card(made(packed(), packed(name="b", bits=8), format="compressed-tensors"), "")
    assert "dynamic" not in card and "`config_groups`" in card
    assert "AutoModelForCausalLM" in card, "transformers reads several groups, and a head"
    assert "AutoModelForCausalLM" in model_card(made(packed(), HEAD, format="compressed-tensors"), "")


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "gguf"])
@pytest.mark.parametrize(
    ("others", "why"),
    [
        ([packed(name="b", bits=8)], "gives all Linears the same bits and group size"),
        ([packed(name="b", group_size=64)], "gives all Linears the same bits and group size"),
        ([HEAD], "takes no quantized output head"),
        ([packed(name="b", symmetric=False)], None),
        ([packed(name="b")], None),
    ],
)
def test_what_optimum_cannot_read_is_for_gptqmodel(others: list[LinearResult], why: str | None, format: str) -> None:
    card = model_card(made(packed(), *others, format=format), "")
    assert ("AutoModelForCausalLM" in card) == ("library_name" in front(card)) == (why is None)
    assert ('GPTQModel.load("MODEL")' in card) == (why is not None)
    assert why is None or why in card


def test_a_packed_head_in_awq_is_for_gptqmodel_and_vllm() -> None:
    card = loading(model_card(made(packed(), HEAD, format="awq"), ""))
    assert card.index("transformers does not load awq with a packed output head") < card.index('GPTQModel.load("MODEL")')
    assert "AutoModelForCausalLM" not in card and "vllm serve MODEL" in card


def test_what_awq_leaves_out_is_found_in_its_own_entry() -> None:
    left = (LeftOut(block=0, name="mlp.up_proj", reason="not finite", wanted=False),)
    card = loading(model_card(dataclasses.replace(made(packed(), packed(name="b", symmetric=False), format="awq"), left_out=left), ""))
    assert "Some Linears are not quantized (`modules_to_not_convert` in config.json)." in card and "other bits" not in card


def test_who_refuses_asymmetric_gptq_is_told() -> None:
    card = loading(model_card(made(packed(symmetric=False)), ""))
    assert "refuses asymmetric checkpoints" in card and "--to gptq_v2" in card and "AutoModelForCausalLM" in card
    card = loading(model_card(made(packed(symmetric=False), HEAD), ""))
    assert card.index("refuses asymmetric") < card.index("--to gptq_v2") < card.index('GPTQModel.load("NEW")')
    for history in (made(packed(symmetric=False), format="gptq_v2"), made(packed())):
        assert "refuses" not in model_card(history, "")


def test_a_quantized_head_is_told_everywhere() -> None:
    card = model_card(made(packed(), dataclasses.replace(HEAD, error=0.5, stored_bits=40_960), lm_head=True), "")
    assert "| output head | quantized (`lm_head`) |" in card and "| Linears quantized | 2, the output head among them |" in card
    assert "| `lm_head` | – | 5.00e-01 |" in card
    assert f"| {(20_000 + 40_960) / (2 * 64 * 64):.2f} |" in card
    assert "| output head | unquantized |" in model_card(made(packed()), "")
    assert "| output head | unquantized, by a rule |" in model_card(made(packed(), lm_head=True), "")
    failed = dataclasses.replace(
        made(packed(), lm_head=True), left_out=(LeftOut(block=None, name="lm_head", reason="not finite", wanted=False),)
    )
    assert "unquantized, as it failed: not finite" in model_card(failed, "")
    assert "unquantized Linears in the blocks" not in model_card(failed, "")


@pytest.mark.parametrize(
    ("method", "named", "errors"),
    [
        ("gptq", "GPTQ", "errors of outputs on the calibration text (squared norms)"),
        ("gptaq", "GPTQ with asymmetric calibration, GPTAQ", "against the weights corrected"),
        ("rtn", "round-to-nearest", "errors of weights"),
    ],
)
def test_each_method_has_its_name_and_its_errors(method: str, named: str, errors: str) -> None:
    card = model_card(made(packed(), method=method, alpha=1 / 3, calibration="/home/somebody/mine.txt"), "")
    assert f"quantized with bigq ({named})." in card and f"| method | {named} |" in card and errors in card
    assert (f"| {1 / 3!r} |" in card) == (f"--alpha {1 / 3!r}" in card) == (method == "gptaq")
    assert ("mine.txt" in card) == ("calibration text" in card) == ("| damping |" in card) == (method != "rtn")


def test_the_command_speaks_of_what_the_sentence_below_it_explains() -> None:
    card = model_card(history(runs=(run(folder="/data/x"),)), "")
    assert "bigq quantize SOURCE OUT " in card and "`SOURCE` is the source model" in card and "`text.txt` is the calibration text" in card
    assert "SOURCE" not in model_card(history(), "")


def test_a_later_evaluation_without_a_baseline_takes_nothing_away() -> None:
    (one,) = history().evaluations
    card = model_card(history(evaluations=(one, evaluated(at="2026-02-01"))), "")
    assert "| `heldout.txt`, 2 × 64 | 126 | 5.25 | source model | 5 | 0.01 | 97.0 % |" in card and card.count("| `heldout.txt`") == 1
    card = model_card(history(evaluations=(one, evaluated(samples=4), evaluated(dtype="float32"))), "")
    assert card.count("| `heldout.txt`") == 3, "of other settings"
    assert "infinite" not in card and "over 1e12" in model_card(history(evaluations=(evaluated(perplexity=float("inf")),)), "")


def test_a_baseline_that_is_not_the_source_has_its_name() -> None:
    other = evaluated(baseline="../other-4bit", baseline_folder="/home/somebody/other-4bit", baseline_perplexity=6.0, kl=0.5)
    card = model_card(history(evaluations=(*history().evaluations, other)), "")
    assert "| 5.25 | source model | 5 |" in card and "| 5.25 | `other-4bit` | 6 |" in card and "somebody" not in card
    assert "source model |" not in model_card(history(evaluations=(other,)), "")
    assert "`owner/x@main`" in model_card(history(evaluations=(evaluated(baseline="owner/x@main", kl=0.5),)), "")


def test_results_are_there_once_per_text_or_not_at_all() -> None:
    one = history().evaluations[0]
    later = dataclasses.replace(one, perplexity=6.5)
    card = model_card(history(evaluations=(one, later)), "")
    assert "6.5" in card and "5.25" not in card and "97.0 %" in card
    assert "## Results" not in model_card(history(evaluations=()), "")


def test_a_card_of_a_job_of_another_version_says_less() -> None:
    card = model_card(history(config=None, runs=()), "")
    assert "Reproducing" not in card and "vllm" not in card and "optimum" not in card and front(card)["tags"] == ["bigq"]


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
