"""Models whose weights have a form of their own: streamed, quantized, read again, and gone on with after a stop."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from form_families import KNOWN, make_form, whole_form
from models import decode, logits_of, packed_prefixes, random_ids, rewrite, save_ids, stored_tensors, streamed_logits
from safetensors.torch import save_file
from torch import Tensor

import bigq
from bigq.errors import Stopped, UsageError
from bigq.inspect.history import read_history
from bigq.job.stop import Stop
from bigq.sched.units import experts as units

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCHEME = bigq.QuantScheme(bits=4, group_size=16)
#: A tensor of each type in which one number is changed.
CHANGED = {
    "dbrx": "transformer.blocks.2.ffn.experts.mlp.w2",
    "git": "git.encoder.layer.2.output.dense.weight",
    "inkling_text": "model.layers.2.mlp.shared_experts.up_proj",
    "jetmoe": "model.layers.2.mlp.output_linear.weight",
    "longcat_flash": "model.layers.1.mlp.experts.3.up_proj.weight",
    "xmod": "roberta.encoder.layer.2.output.adapter_modules.de_DE.dense1.weight",
}
#: Those with banks of experts in such a form.
BANKS = ("dbrx", "jetmoe", "longcat_flash")

pytestmark = pytest.mark.usefixtures("one_thread")
Form = Callable[[str], Path]


@pytest.fixture(scope="module")
def form(tmp_path_factory: pytest.TempPathFactory) -> Form:
    """Model type → its tiny fp32 checkpoint. To be read only."""
    folder = tmp_path_factory.mktemp("forms")
    return lambda kind: path if (path := folder / kind).exists() else make_form(path, kind)


def job(method: str = "rtn", **settings: Any) -> bigq.JobConfig:
    given = {"scheme": SCHEME, "device": "cpu", "quiet": True, "format": "gptq_v2", "method": method, "allow_partial": True}
    return bigq.JobConfig(**{**given, **settings})  # type: ignore[arg-type]


def calibrated(folder: Path, **settings: Any) -> bigq.JobConfig:
    ids = save_ids(folder / "ids.safetensors", random_ids(6, 24))
    return job("gptq", calibration=str(ids), samples=6, seqlen=24, batch=2, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KNOWN)
def test_streamed_logits_equal_transformers(kind: str, dtype: str, form: Form) -> None:
    folder, ids = form(kind), random_ids(3)
    expected = logits_of(whole_form(folder, DTYPES[dtype]), ids, 2)
    assert expected.dtype == DTYPES[dtype] and torch.isfinite(expected).all()
    assert torch.equal(streamed_logits(folder, ids, 2, dtype), expected)


@pytest.mark.parametrize("kind", KNOWN)
def test_one_changed_weight_changes_streamed_logits(kind: str, form: Form, tmp_path: Path) -> None:
    source, folder, ids = form(kind), tmp_path / "changed", random_ids(2)
    shutil.copytree(source, folder)
    changed = stored_tensors(folder)[CHANGED[kind]].clone()
    changed.view(-1)[-5] += 3
    rewrite(folder, CHANGED[kind], changed)
    got = streamed_logits(folder, ids, 2, "float32")
    assert not torch.equal(got, streamed_logits(source, ids, 2, "float32"))
    assert torch.equal(got, logits_of(whole_form(folder), ids, 2))


def put(kind: str, tensors: dict[str, Tensor], prefix: str, weight: Tensor) -> None:
    """Put a decoded Linear or matrix of an expert where the source has it."""
    parent, _, matrix = prefix.rpartition(".")
    bank, _, number = parent.rpartition(".")  # "….experts"
    if kind == "dbrx" and number.isdigit() and matrix in ("w1", "v1", "w2"):
        stack, e = tensors[f"{bank}.mlp.{matrix}"].view(4, 96, 64), int(number)
        stack[e] = weight.T if matrix == "w2" else weight
    elif kind == "jetmoe" and matrix == "weight":
        tensors[f"{bank.removesuffix('.experts')}.weight"][int(number)] = weight
    else:
        assert tensors[f"{prefix}.weight"].shape == weight.shape
        tensors[f"{prefix}.weight"] = weight


@pytest.mark.parametrize("kind", [param for param in KNOWN if param.values[0] in BANKS])
def test_a_packed_model_has_the_logits_of_its_decoded_weights(kind: str, form: Form, tmp_path: Path) -> None:
    """All matrices of experts are packed, in the right orientation and order, also after a conversion."""
    source, ids = form(kind), random_ids(3)
    bigq.quantize(source, tmp_path / "out", job())
    packed, tensors = stored_tensors(tmp_path / "out"), {name: t.clone() for name, t in stored_tensors(source).items()}
    prefixes = list(packed_prefixes(packed))
    for prefix in prefixes:
        put(kind, tensors, prefix, decode(packed, prefix, 4, version=2).weight(torch.float32))
    assert sum(".experts." in prefix for prefix in prefixes) == {"dbrx": 36, "jetmoe": 48, "longcat_flash": 24}[kind]
    (tmp_path / "decoded").mkdir()
    shutil.copy(source / "config.json", tmp_path / "decoded")
    save_file(tensors, tmp_path / "decoded" / "model.safetensors", metadata={"format": "pt"})
    got = streamed_logits(tmp_path / "out", ids, 2, "float32")
    assert torch.equal(got, logits_of(whole_form(tmp_path / "decoded"), ids, 2))
    bigq.convert(tmp_path / "out", tmp_path / "other", to="compressed-tensors")
    assert torch.equal(streamed_logits(tmp_path / "other", ids, 2, "float32"), got)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("kind", [param for param in KNOWN if param.values[0] in BANKS])
def test_a_stopped_job_goes_on_where_it_was(kind: str, form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within a bank, one group of which is committed."""
    monkeypatch.setattr(units, "GROUP_WEIGHTS", 1)
    config = calibrated(tmp_path)
    bigq.quantize(form(kind), tmp_path / "whole", config)
    stop, solved, take = Stop(0.0), [], units.BankWork.take

    def counted(self: units.BankWork, expert: Any) -> Any:
        solved.append(expert.number)
        if len(solved) == 6:
            stop.request("the test")
        return take(self, expert)

    with monkeypatch.context() as patch:
        patch.setattr(units.BankWork, "take", counted)
        with pytest.raises(Stopped):
            bigq.quantize(form(kind), tmp_path / "out", config, stop=stop)
    bigq.quantize(form(kind), tmp_path / "out", config)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole") and len(hashes(tmp_path / "out")) > 8


@pytest.mark.parametrize("kind", [param for param in KNOWN if param.values[0] == "longcat_flash"])
def test_what_is_stored_for_spare_experts_is_copied(kind: str, form: Form, tmp_path: Path) -> None:
    bigq.quantize(form(kind), tmp_path / "out", job())
    before, after = stored_tensors(form(kind)), stored_tensors(tmp_path / "out")
    spare = [name for name in before if ".experts.4." in name or ".experts.5." in name]
    assert len(spare) == 8
    assert all(torch.equal(before[name], after[name]) for name in spare)


@pytest.mark.parametrize("kind", [param for param in KNOWN if param.values[0] == "xmod"])
def test_adapters_that_no_token_reaches_are_rounded(kind: str, form: Form, tmp_path: Path) -> None:
    bigq.quantize(form(kind), tmp_path / "out", calibrated(tmp_path))
    dead = {record.name: record.dead_inputs for record in read_history(tmp_path / "out").linears if "adapter" in record.name}
    assert {name: count > 0 for name, count in dead.items()} == {name: ".en_XX." in name for name in dead} and len(dead) == 4


@pytest.mark.parametrize("kind", [param for param in KNOWN if param.values[0] == "inkling_text"])
def test_shared_experts_are_left_out_with_their_share(kind: str, form: Form, tmp_path: Path) -> None:
    """Where they are most of the weights, the job is refused unless it is allowed."""
    made = bigq.plan(form(kind), config=job()).kept
    assert {each.name for each in made.left} > {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
    assert 0.05 < made.share < 0.5
    many = make_form(tmp_path / "many", kind, n_shared_experts=32)
    with pytest.raises(
        UsageError, match=r"this job would leave .*mlp\.shared_experts\.gate_proj.*is not the weight of a Linear.*--allow-partial"
    ):
        bigq.quantize(many, tmp_path / "out", job(allow_partial=False))


@pytest.mark.parametrize("kind", [param for param in KNOWN if param.values[0] in BANKS])
def test_banks_that_are_skipped_are_copied_as_they_are(kind: str, form: Form, tmp_path: Path) -> None:
    bigq.quantize(form(kind), tmp_path / "out", job(rules=(bigq.Rule(pattern=r".*\.experts", overrides=None),)))
    before, after = stored_tensors(form(kind)), stored_tensors(tmp_path / "out")
    names = [name for name in before if ".experts." in name or "_linear." in name]
    assert len(names) > 8 and all(torch.equal(before[name], after[name]) for name in names)
    assert list(packed_prefixes(after))
    ids = random_ids(2)
    assert streamed_logits(tmp_path / "out", ids, 2, "float32").isfinite().all()
