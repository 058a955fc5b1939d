"""Jobs that write awq, awq folders that are converted and read, and what does not fit the format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_checkpoints import coded_and_decoded
from models import make_checkpoint, random_ids, rewrite, save_ids, stored_tensors, streamed_logits
from test_convert import copy_of, hashes, job, refused, say

import bigq
from bigq.config import JobConfig
from bigq.conversion.convert import convert
from bigq.errors import CheckpointError, UnsupportedModelError, UsageError
from bigq.inspect.verify import verify
from bigq.job.fit import Candidate, require_distinct
from bigq.scheme import QuantScheme, Rule

#: A Linear that stays unquantized, and some whose zero points are found although the others' are fixed.
RULES = (Rule(r".*\.1\..*o_proj", None), Rule.parse(r".*\.(gate|up|gate_up)_proj:sym=false"))
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(format, settings) → the folder of a finished job; each is run once."""
    ids = save_ids(tmp_path_factory.mktemp("ids") / "ids.safetensors", random_ids())
    known: dict[str, Path] = {}

    def get(format: str, **changes: Any) -> Path:
        if (key := f"{format} {changes}") not in known:
            known[key] = tmp_path_factory.mktemp("out")
            bigq.quantize(str(checkpoint("llama")), known[key], job(ids, format=format, **{"rules": RULES, **changes}))
        return known[key]

    return get


def logits(folder: Path) -> torch.Tensor:
    return streamed_logits(folder, random_ids()[:4], 2)


def of_job(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def test_a_job_writes_what_the_same_job_in_gptq_v2_holds(made: Made, tmp_path: Path) -> None:
    out = made("awq")
    assert verify(out) == []
    assert torch.equal(logits(out), logits(made("gptq_v2")))
    said = of_job(out)
    assert said["modules_to_not_convert"] == ["lm_head", "model.layers.1.self_attn.o_proj"] and said["group_size"] == 32
    assert said["meta"]["symmetric"] is False and said["zero_point"] is True
    assert len([name for name in stored_tensors(out) if name.endswith(".qweight")]) == 3 * 7 - 1


@pytest.mark.parametrize("format", ["gptq_v2", "compressed-tensors"])
def test_conversions_are_exact_in_both_directions(format: str, made: Made, tmp_path: Path) -> None:
    """A checkpoint in awq says of all its Linears that they have zero points; so only all of them together are symmetric again."""
    symmetric = (RULES[0],)
    for before, after in (("awq", format), (format, "awq")):
        convert(made(before, rules=symmetric), tmp_path / after, after)
        assert torch.equal(logits(tmp_path / after), logits(made(before, rules=symmetric)))
        got, expected = hashes(tmp_path / after), hashes(made(after, rules=symmetric))
        assert {name for name in got if got[name] != expected[name]} <= {"config.json", "quantize_config.json"}
    assert verify(tmp_path / "awq") == [] and of_job(tmp_path / "awq")["meta"]["symmetric"] is True


def test_zero_points_of_every_kind_are_converted(made: Made, tmp_path: Path) -> None:
    convert(made("awq"), tmp_path / "v2", "gptq_v2")
    convert(tmp_path / "v2", tmp_path / "awq", "awq")
    before, after = stored_tensors(made("awq")), stored_tensors(tmp_path / "awq")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_shard_that_is_lost_is_made_again(made: Made, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(made("awq"), tmp_path / "out"))
    expected = hashes(out)
    sorted(out.glob("*.safetensors"))[2].unlink()
    bigq.quantize(str(checkpoint("llama")), out)
    assert hashes(out) == expected and verify(out) == []


def test_zero_points_that_the_note_denies_are_refused(made: Made, tmp_path: Path) -> None:
    folder = copy_of(made("awq"), tmp_path / "copy")
    note = of_job(folder)["meta"]
    say(folder, meta=note | {"symmetric": True})
    said = r"qzeros holds zero points other than 8, although .*config\.json does not say meta\.symmetric: false"
    refused(folder, tmp_path / "out", "gptq_v2", said, CheckpointError)
    convert(say(folder, meta=note | {"symmetric": False}), tmp_path / "fine", "gptq_v2")


def test_negative_scales_are_kept(made: Made, tmp_path: Path) -> None:
    """A search finds some; readers multiply with them as with others."""
    out = copy_of(made("awq"), tmp_path / "copy")
    name = "model.layers.0.self_attn.q_proj"
    tensors = stored_tensors(out)
    rewrite(out, f"{name}.scales", -tensors[f"{name}.scales"])
    convert(out, tmp_path / "v2", "gptq_v2")
    assert torch.equal(stored_tensors(tmp_path / "v2")[f"{name}.scales"], -stored_tensors(made("gptq_v2"))[f"{name}.scales"])
    assert torch.equal(logits(tmp_path / "v2"), logits(out))


@pytest.fixture(scope="module")
def of_others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint that AWQ packed in groups of 16, and the same weights in bf16."""
    folder = tmp_path_factory.mktemp("awq")
    return coded_and_decoded(make_checkpoint(folder / "plain", "llama", dtype=torch.bfloat16), folder, "awq")


def test_a_checkpoint_of_another_program_is_read_and_converted(of_others: tuple[Path, Path], tmp_path: Path) -> None:
    coded, decoded = of_others
    convert(coded, tmp_path / "v2", "gptq_v2")
    for folder in (coded, tmp_path / "v2"):
        assert torch.equal(streamed_logits(folder, random_ids()[:4], 2), streamed_logits(decoded, random_ids()[:4], 2))


def test_another_version_is_refused(of_others: tuple[Path, Path], tmp_path: Path) -> None:
    folder = say(Path(shutil.copytree(of_others[0], tmp_path / "m")), version="gemv")
    said = r"m: is already quantized \(awq, version 'gemv', 4 bits\); of awq, bigq reads version gemm at 4 bits"
    refused(folder, tmp_path / "out", "gptq_v2", said, UnsupportedModelError)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scheme": QuantScheme(group_size=32, bits=8)}, r"are quantized at 8 bits, but awq holds 4 bits only; use --bits 4$"),
        ({"scheme": QuantScheme(group_size=16)}, r"are quantized in groups of 16, which readers of awq do not take; use --group-size 32$"),
        ({"scheme": QuantScheme(group_size=256)}, r"in groups of 256, which readers of awq do not take; use --group-size 32$"),
        (
            {"scheme": QuantScheme(group_size=32), "rules": (Rule.parse(".*down_proj:bits=8"),)},
            r"are quantized at 8 bits, but awq holds 4 bits only; use bits=4 in --rule '\.\*down_proj:bits=8'$",
        ),
        (
            {"scheme": QuantScheme(group_size=32), "rules": (Rule.parse(".*o_proj:group_size=64"),)},
            r"are quantized in groups of 64, but awq has one group size for all Linears, which are in groups of 32; "
            r"use group_size=32 in --rule '\.\*o_proj:group_size=64'$",
        ),
        ({"scheme": QuantScheme(group_size=32), "bits_per_weight": 4.5}, "no effect, since the bits of no Linear are left to choose"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], said: str, checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path
) -> None:
    config = JobConfig(calibration=str(ids_file), samples=4, seqlen=16, quiet=True, device="cpu", format="awq", **changes)
    with pytest.raises(UsageError, match=said):
        bigq.plan(str(checkpoint("llama")), config=config)


def test_conv1d_is_refused(checkpoint: Callable[[str], Path], ids_file: Path) -> None:
    scheme = QuantScheme(group_size=32)
    config = JobConfig(calibration=str(ids_file), samples=4, seqlen=16, quiet=True, device="cpu", format="awq", scheme=scheme)
    with pytest.raises(UsageError, match=r"are stored transposed \(Conv1D\), which readers of awq do not support; use --format gptq$"):
        bigq.plan(str(checkpoint("gpt2")), config=config)


def test_odd_widths_get_smaller_groups_for_all_linears(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    """64 does not divide the 96 inputs of down_proj."""
    bigq.quantize(str(checkpoint("llama")), tmp_path / "out", job(ids_file, format="awq", rules=(), scheme=QuantScheme(group_size=64)))
    assert of_job(tmp_path / "out")["group_size"] == 32 and verify(tmp_path / "out") == []


def test_mixed_bits_are_not_converted(made: Made, tmp_path: Path) -> None:
    rules = (Rule.parse(r".*down_proj:bits=8"),)
    said = r"down_proj and 2 more are quantized at 8 bits, but awq holds 4 bits only; use --to gptq(_v2)? or --to compressed-tensors$"
    refused(made("gptq", rules=rules), tmp_path / "out", "awq", said)
    rules = (Rule.parse(r".*self_attn.*:group_size=64"),)
    said = r"are quantized in groups of 32, but awq has one group size for all Linears, which are in groups of 64"
    refused(made("gptq", rules=rules), tmp_path / "out", "awq", said)


def test_names_that_readers_confuse_are_refused() -> None:
    config = JobConfig(format="awq", scheme=QuantScheme(group_size=32), rules=(Rule(r".*\.gate$", None),))
    linears = [Candidate(name=f"h.0.mlp.{name}", m=64, n=64) for name in ("gate", "gate_proj")]
    said = (
        "--format awq: h.0.mlp.gate stays unquantized, and readers find its name in h.0.mlp.gate_proj, which is packed; use --format gptq"
    )
    with pytest.raises(UsageError, match=f"^{said}$"):
        require_distinct(linears, [each.name for each in linears], config)
    require_distinct(linears, [each.name for each in linears], JobConfig(format="gptq", scheme=config.scheme, rules=config.rules))
