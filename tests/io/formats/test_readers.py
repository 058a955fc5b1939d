"""The table of readers: what is said of each, and that advice works when it is followed."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
from test_vllm_rules import FUSED as LOOKED_UP
from test_vllm_rules import GROUP_SIZES

from bigq.io.formats import FORMATS
from bigq.io.formats.fused import FUSED, FusedLinear, fused_linears
from bigq.io.formats.readers import Written, not_run_with, read_by, refused_by, verdicts
from bigq.io.formats.readers_table import BY_FUSED_NAME, ROWS, RUN_FAMILIES, VLLM_GROUPS, Kind, markdown_table

FOUR = Kind(4, 128, True)


def written(format: str, *kinds: Kind, **changes: object) -> Written:
    kinds = kinds or (FOUR,)
    return dataclasses.replace(Written(format=format, base=kinds[0], kinds=frozenset(kinds), family="llama"), **changes)  # type: ignore[arg-type]


def said(format: str, *kinds: Kind, **changes: object) -> tuple[list[str], list[str]]:
    found = verdicts(written(format, *kinds, **changes))
    return read_by(found), refused_by(found)


@pytest.mark.parametrize(
    ("format", "kind", "loads", "refuses"),
    [
        ("gptq", FOUR, ["transformers (with optimum, gptqmodel)", "GPTQModel", "vLLM"], []),
        ("gptq_v2", Kind(8, -1, True), ["transformers (with optimum, gptqmodel)", "GPTQModel", "vLLM"], []),
        (
            "gptq",
            Kind(4, 128, False),
            ["transformers (with optimum, gptqmodel)"],
            [
                "GPTQModel does not load asymmetric gptq; use --format gptq_v2",
                "vLLM does not load asymmetric gptq; use --format compressed-tensors",
            ],
        ),
        (
            "gptq_v2",
            Kind(4, 128, False),
            ["transformers (with optimum, gptqmodel)", "GPTQModel"],
            ["vLLM does not load asymmetric gptq_v2; use --format compressed-tensors"],
        ),
        (
            "gptq",
            Kind(3, 64, True),
            ["transformers (with optimum, gptqmodel)", "GPTQModel"],
            ["vLLM does not load gptq of 3 bits; use --format compressed-tensors"],
        ),
        (
            "gptq",
            Kind(4, 16, True),
            ["transformers (with optimum, gptqmodel)", "GPTQModel"],
            ["vLLM does not load gptq in groups of 16; use --group-size 32, 64, 128 or -1"],
        ),
        (
            "compressed-tensors",
            FOUR,
            ["transformers (with compressed-tensors)", "compressed-tensors", "vLLM (CUDA: Marlin)"],
            [],
        ),
        (
            "compressed-tensors",
            Kind(8, 32, False),
            ["transformers (with transformers<5.23)", "compressed-tensors", "vLLM (CUDA: Machete or Conch)"],
            [],
        ),
        (
            "compressed-tensors",
            Kind(3, 32, True),
            ["transformers (with compressed-tensors>=0.18)", "compressed-tensors (with compressed-tensors>=0.18)", "vLLM (with humming)"],
            [],
        ),
        ("w8a8-int8", Kind(8, -1, True), ["transformers (with compressed-tensors)", "vLLM (CUDA: Cutlass)"], []),
        (
            "fp8-block",
            Kind(8, 128, True),
            ["transformers (with compressed-tensors)", "vLLM (CUDA: DeepGEMM, Cutlass, Marlin or Triton)"],
            [],
        ),
        ("awq", FOUR, ["transformers (with gptqmodel)", "GPTQModel", "vLLM (CUDA: Marlin)"], []),
        ("awq", Kind(4, -1, False), ["transformers (with gptqmodel)", "GPTQModel", "vLLM (CUDA: Marlin)"], []),
        ("gguf", FOUR, ["llama.cpp", "transformers (with optimum, gptqmodel)", "GPTQModel", "vLLM"], []),
        (
            "gguf",
            Kind(4, 32, False),
            ["llama.cpp", "transformers (with optimum, gptqmodel)", "GPTQModel"],
            ["vLLM does not load asymmetric gptq_v2 shards"],
        ),
    ],
)
def test_who_loads_what(format: str, kind: Kind, loads: list[str], refuses: list[str]) -> None:
    assert said(format, kind) == (loads, refuses)


def test_what_depends_on_more_than_the_kind() -> None:
    assert (
        "transformers does not load gptq with several bits or group sizes; use --format compressed-tensors"
        in said("gptq", FOUR, Kind(8, 128, True))[1]
    )
    assert said("gptq", FOUR, Kind(4, 128, False))[0] == ["transformers (with optimum, gptqmodel)", "GPTQModel"]
    assert "transformers does not load gptq with a packed output head; use --format compressed-tensors" in said("gptq", head=True)[1]
    assert "transformers does not load awq with a packed output head; use --format compressed-tensors" in said("awq", head=True)[1]
    assert "transformers does not load awq of falcon models; use --format compressed-tensors" in said("awq", family="falcon")[1]
    loads, refuses = said("fp8-block", Kind(8, 128, True), head=True)
    assert loads == ["transformers (with compressed-tensors)"]
    assert refuses == ["vLLM does not load fp8-block with a packed output head; use --format compressed-tensors"]
    assert said("gptq", Kind(3, 64, True), transposed=True)[1] == ["vLLM does not load gptq of 3 bits"]
    for format in ("gptq", "compressed-tensors"):
        assert f"vLLM does not load {format} of bloom models" in said(format, family="bloom")[1]
    for family in ("llama4_text", "llama4"):
        assert f"vLLM does not load gptq of {family} models; use --format compressed-tensors" in said("gptq", family=family)[1]
        assert "vLLM (CUDA: Marlin)" in said("compressed-tensors", family=family)[0]
    for family, bits in itertools.product(("llama4_text", "gpt_oss"), (2, 3, 4, 8)):
        refused = said("compressed-tensors", Kind(bits, 128, False), family=family)[1]
        assert f"vLLM does not load asymmetric compressed-tensors of {family} models; use --sym" in refused
    assert said("gguf", split=True)[1] == ["vLLM does not load gptq_v2 shards whose fused Linears have parts that differ"]


EIGHT = Kind(8, 128, True)


@pytest.mark.parametrize(
    ("format", "kinds", "changes", "loads", "refuses"),
    [
        ("compressed-tensors", (FOUR,), {}, ["transformers", "compressed-tensors", "vLLM"], []),
        (
            "gptq",
            (FOUR,),
            {},
            ["GPTQModel", "vLLM"],
            ["transformers does not load experts in gptq: it leaves them random; use --format compressed-tensors"],
        ),
        (
            "gptq",
            (FOUR,),
            {"family": "mixtral"},
            ["vLLM"],
            [
                "transformers does not load experts in gptq: it leaves them random; use --format compressed-tensors",
                "GPTQModel does not load gptq of mixtral models",
            ],
        ),
        (
            "compressed-tensors",
            (Kind(4, 128, False),),
            {},
            ["compressed-tensors", "vLLM"],
            ["transformers does not load asymmetric experts of 4 bits in compressed-tensors; use --sym"],
        ),
        (
            "compressed-tensors",
            (Kind(8, 128, False),),
            {},
            ["compressed-tensors"],
            [
                "transformers does not load asymmetric experts of 8 bits in compressed-tensors; use --sym",
                "vLLM does not load asymmetric experts of 8 bits in compressed-tensors; use --sym",
            ],
        ),
        ("compressed-tensors", (Kind(3, 128, True),), {}, ["transformers", "compressed-tensors", "vLLM"], []),
        (
            "compressed-tensors",
            (FOUR, EIGHT),
            {},
            ["compressed-tensors", "vLLM"],
            ["transformers does not load experts of several schemes in compressed-tensors: it unpacks all of them by one"],
        ),
        ("compressed-tensors", (FOUR, EIGHT), {"experts": frozenset([EIGHT])}, ["transformers", "compressed-tensors", "vLLM"], []),
        (
            "compressed-tensors",
            (FOUR,),
            {"experts": frozenset([None])},
            ["compressed-tensors", "vLLM"],
            ["transformers does not load unquantized experts beside packed Linears in compressed-tensors"],
        ),
        (
            "awq",
            (FOUR,),
            {},
            ["GPTQModel", "vLLM"],
            ["transformers does not load experts in awq: it leaves them random; use --format compressed-tensors"],
        ),
        ("gptq", (FOUR,), {"experts": frozenset([None])}, ["transformers", "GPTQModel", "vLLM"], []),
    ],
)
def test_who_loads_experts(format: str, kinds: tuple[Kind, ...], changes: dict[str, object], loads: list[str], refuses: list[str]) -> None:
    found = verdicts(written(format, *kinds, **{"family": "qwen3_moe", "experts": frozenset(kinds), **changes}))
    assert [verdict.reader for verdict in found if verdict.loads] == loads and refused_by(found) == refuses


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_experts_become_symmetric_ones(bits: int) -> None:
    """The advice of a refusal, followed; for model types that a reader takes symmetric only, too."""
    kinds = [Kind(bits, 128, symmetric) for symmetric in (False, True)]
    for family in ("gpt_oss", "llama4_text"):
        before, after = (verdicts(written("compressed-tensors", kind, family=family)) for kind in kinds)
        (refused,) = [verdict.reader for verdict in before if f"of {family} models; use --sym" in verdict.note]
        assert all(verdict.loads for verdict in after if verdict.reader == refused)
    before, after = (verdicts(written("compressed-tensors", kind, family="qwen3_moe", experts=frozenset([kind]))) for kind in kinds)
    refused = [verdict.reader for verdict in before if verdict.note.endswith("; use --sym")]
    assert "transformers" in refused and all(verdict.loads for verdict in after if verdict.reader in refused)


def test_experts_are_one_for_readers() -> None:
    names = [f"h.{i}.mlp.experts.{e}.{part}" for i in range(2) for e in range(2) for part in ("w1", "w2", "w3")]
    found = fused_linears(["h.0.mlp.shared_experts.gate_proj", "h.0.mlp.shared_experts.up_proj", *names])
    assert [each.name for each in found] == ["h.0.mlp.shared_experts.gate_up_proj", "h.0.mlp.experts", "h.1.mlp.experts"]
    assert found[1] == FusedLinear(name="h.0.mlp.experts", parts=tuple(names[:6]), experts=True)
    assert found[1].said == "w1, w2 and w3 of all experts of a layer"


def test_advice_works() -> None:
    """For every kind in every format: with the format or group size that a refusal names, the same reader loads it."""
    followed = 0
    for format, bits, size, symmetric in itertools.product(FORMATS, (2, 3, 4, 8), (-1, 16, 32, 64, 128, 256), (True, False)):
        kind = Kind(bits, size, symmetric)
        for verdict in verdicts(written(format, kind)):
            advised = re.search(r"; use --(format|group-size) ([^ ,]+)", verdict.note)
            if advised is None or verdict.loads:
                continue
            if advised[1] == "format":
                # A group size that fits nothing has a refusal of its own.
                changed = written(advised[2], dataclasses.replace(kind, group_size=32 if size not in VLLM_GROUPS else size))
            else:
                changed = written(format, dataclasses.replace(kind, group_size=int(advised[2])))
            again = {each.reader: each for each in verdicts(changed)}
            assert again[verdict.reader].loads, (format, kind, verdict.note)
            followed += 1
    assert followed > 50


def test_families_that_readers_were_not_run_with_are_told() -> None:
    found = verdicts(written("gptq", family="gemma2"))
    assert not_run_with(found, "gemma2") == (
        "readers were run with llama, qwen2, opt, bloom, qwen3_moe, mixtral, glm4_moe, deepseek_v3, gpt_oss, granitemoe, llama4_text, "
        "not with gemma2"
    )
    assert not_run_with(found, "llama") is None and not_run_with(found, None) is None
    assert {row.reader for row in ROWS} == set(RUN_FAMILIES)


def test_fused_linears_are_those_that_vllm_looks_up() -> None:
    assert all(FUSED[whole] == parts for whole, parts in LOOKED_UP.items()) and VLLM_GROUPS == GROUP_SIZES
    names = [f"h.{i}.attn.{part}_proj" for i in range(2) for part in "qkvo"] + ["h.0.mlp.gate_proj", "h.1.mlp.up_proj", "q_proj", "k_proj"]
    assert fused_linears(names) == (
        FusedLinear(name="h.0.attn.qkv_proj", parts=tuple(f"h.0.attn.{p}_proj" for p in "qkv")),
        FusedLinear(name="h.1.attn.qkv_proj", parts=tuple(f"h.1.attn.{p}_proj" for p in "qkv")),
        FusedLinear(name="qkv_proj", parts=("q_proj", "k_proj")),
    )
    assert set(BY_FUSED_NAME) == {format for row in ROWS if row.reader == "vLLM" for format in row.formats}


def test_the_table_for_the_docs_has_every_row() -> None:
    lines = markdown_table().splitlines()
    assert len(lines) == len(ROWS) + 2 and all(line.count("|") == 7 for line in lines)
    assert any("vLLM" in line and "Machete or Conch" in line and "asymmetric" in line for line in lines)


@pytest.mark.parametrize("whole", [True, False])
def test_experts_that_the_source_holds_in_one_tensor(whole: bool) -> None:
    """transformers has no rule that stacks their matrices, so it leaves them random."""
    loads, refuses = said("compressed-tensors", FOUR, experts=frozenset({FOUR}), whole=whole, family="gpt_oss")
    reason = "transformers does not load experts in compressed-tensors that the source holds in one tensor for all: it leaves them random"
    assert (reason in refuses) == whole
    assert any(each.startswith("transformers") for each in loads) != whole
