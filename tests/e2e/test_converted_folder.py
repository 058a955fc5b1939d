"""What a converted folder answers: status, verify, report, model card and eval, like the folder of a job."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import rewrite, stored_tensors
from mutate import mutate_json
from test_job_report import Page, job

import bigq
from bigq.cli.main import main
from bigq.conversion.convert import convert
from bigq.errors import UsageError
from bigq.infer.evaluate import EvalConfig
from bigq.inspect.history import read_history
from bigq.inspect.status import status
from bigq.inspect.verify import verify
from bigq.io.checksum import save_record, seal, unseal
from bigq.job.finish import CARD_MARK
from bigq.reports.html import render
from bigq.reports.html_quality import Pictures
from bigq.reports.model_card import model_card
from bigq.reports.write import write_model_card, write_report
from bigq.scheme import QuantScheme

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = (
    "model-00001-of-00004.safetensors",
    "model-00003-of-00004.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "quantize_config.json",
    ".bigq/conversion.json",
    ".bigq/journal.jsonl",
    ".bigq/manifest.json",
)


@pytest.fixture(scope="module")
def quantized(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job's folder in compressed-tensors."""
    out = tmp_path_factory.mktemp("quantized") / "q"
    bigq.quantize(
        str(checkpoint("llama")), out, job(ids_file, format="compressed-tensors", scheme=QuantScheme(group_size=32, damping=0.02))
    )
    return out


@pytest.fixture(scope="module")
def converted(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That folder in gptq; tests that change it copy it first."""
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(quantized, out, "gptq")
    return out


@pytest.fixture
def out(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "out"))


@pytest.fixture(scope="module")
def foreign(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion of a checkpoint without any record of bigq, in one shard per block."""
    folder = tmp_path_factory.mktemp("foreign")
    shutil.copytree(quantized, folder / "other-4bit", ignore=shutil.ignore_patterns(".bigq"))
    convert(folder / "other-4bit", folder / "out", "gptq_v2")
    return folder / "out"


# Status.


def test_status_says_that_it_is_complete_and_whence(converted: Path, quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = status(converted)
    assert (found.state, found.resumable, found.blocks_done, found.blocks, found.shards) == ("finished", False, 3, 3, 4)
    assert found.bytes_written == sum(path.stat().st_size for path in converted.glob("*.safetensors")) and found.damaged == ()
    assert found.converted == f"compressed-tensors → gptq from {quantized}"
    assert main(["status", str(converted)]) == 0
    said = "".join(capsys.readouterr().out.split())  # a long path is broken between lines
    assert f"compressed-tensors→gptqfrom{quantized}" in said


def test_status_names_damage(out: Path) -> None:
    (out / FILES[0]).unlink()
    (out / FILES[1]).write_bytes(b"x")
    found = status(out)
    assert [line.partition(":")[0] for line in found.damaged] == list(FILES[:2])
    assert all("convert the model again" in line for line in found.damaged)
    (out / ".bigq" / "conversion.json").write_text("{}")
    assert any(line.startswith(".bigq/conversion.json: ") for line in status(out).damaged)
    (out / "config.json").unlink()
    assert status(out).state == "failed" and not status(out).resumable


# Verify.


@pytest.mark.parametrize("to", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_every_conversion_is_sound(
    family: str, symmetric: bool, to: str, checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path
) -> None:
    scheme = QuantScheme(group_size=32, symmetric=symmetric, scale_bits=8, min_zero=1)
    bigq.quantize(
        str(checkpoint(family)), tmp_path / "q", job(ids_file, method="rtn", format="compressed-tensors", scheme=scheme, rules=())
    )
    convert(tmp_path / "q", tmp_path / "out", to)
    assert verify(tmp_path / "out") == []
    convert(tmp_path / "out", tmp_path / "back", "compressed-tensors")
    assert verify(tmp_path / "back") == []


def test_a_conversion_of_another_tools_checkpoint_is_sound(foreign: Path) -> None:
    assert verify(foreign) == [] and status(foreign).state == "finished"


@pytest.mark.parametrize("file", FILES)
def test_any_changed_byte_is_found(file: str, out: Path) -> None:
    path = out / file
    data = path.read_bytes()
    generator = random.Random(file)
    for at in [0, len(data) - 1, *(generator.randrange(len(data)) for _ in range(4))]:
        path.write_bytes(data[:at] + bytes([data[at] ^ generator.randrange(1, 256)]) + data[at + 1 :])
        assert any(line.startswith(f"{file}: ") for line in verify(out)), f"byte {at}"
    path.write_bytes(data)
    assert verify(out) == []


@pytest.mark.parametrize("file", FILES)
def test_truncated_and_missing_files_are_found(file: str, out: Path) -> None:
    path = out / file
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert any(line.startswith(f"{file}: ") for line in verify(out))
    path.unlink()
    if file == ".bigq/conversion.json":  # then nothing says that it is no job's folder
        assert any("job.json: is missing" in line for line in verify(out))
    else:
        assert any(line.startswith(f"{file}: ") for line in verify(out))


def reseal(out: Path) -> None:
    """Give the records the sizes and hashes that the files have now, as a forger would."""
    import hashlib

    journal = out / ".bigq" / "journal.jsonl"
    lines = []
    for line in journal.read_bytes().splitlines(keepends=True):
        record = unseal(line, line=True)
        assert record is not None
        data = (out / record["file"]).read_bytes()
        lines.append(seal({**record, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}, line=True))
    journal.write_bytes(b"".join(lines))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    manifest = unseal((out / ".bigq" / "manifest.json").read_bytes())
    assert manifest is not None
    for name in manifest["files"]:
        data = (out / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    save_record(out / ".bigq" / "manifest.json", manifest)


NAME = "model.layers.1.mlp.up_proj"
VALUES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "scale": ("scales", lambda t: t.fill_(float("nan")), "holds NaN or Inf"),
    "zero point": ("qzeros", lambda t: t - 1, "holds zero points other than 8"),
    "group": ("g_idx", lambda t: t.zero_(), "is not in natural order"),
}


@pytest.mark.parametrize(("suffix", "change", "said"), VALUES.values(), ids=VALUES)
def test_values_that_no_reader_can_use_are_found(suffix: str, change: Callable[[torch.Tensor], torch.Tensor], said: str, out: Path) -> None:
    """Although the hashes of a forged record agree."""
    shard = out / "model-00003-of-00004.safetensors"
    order = next(unseal(line, line=True) or {} for line in journal_lines(out) if shard.name.encode() in line)["tensors"]
    rewrite(out, f"{NAME}.{suffix}", change(stored_tensors(out)[f"{NAME}.{suffix}"].clone()))
    from safetensors.torch import load_file, save_file

    tensors = load_file(shard)
    save_file({name: tensors[name] for name in order}, shard, metadata={"format": "pt"})
    retell(out, shard)
    reseal(out)
    assert any(f"tensor {NAME}.{suffix} {said}" in line for line in verify(out))


def journal_lines(out: Path) -> list[bytes]:
    return (out / ".bigq" / "journal.jsonl").read_bytes().splitlines(keepends=True)


def retell(out: Path, shard: Path) -> None:
    """Let the journal have the tensors in the order that a shard has them in."""
    data = shard.read_bytes()
    names = [name for name in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]) if name != "__metadata__"]
    lines = [unseal(line, line=True) or {} for line in journal_lines(out)]
    changed = [{**line, "tensors": names} if line["file"] == shard.name else line for line in lines]
    (out / ".bigq" / "journal.jsonl").write_bytes(b"".join(seal(line, line=True) for line in changed))


Record = dict[str, Any]
FORGERIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "bits in the config": (lambda out: swap(out / "config.json", '"bits": 4', '"bits": 8'), "but config.json says 8 bits"),
    "group size in the config": (lambda out: swap(out / "config.json", '"group_size": 32', '"group_size": 16'), "config.json"),
    "format in the record": (lambda out: respeak(out, format="gptq_v2"), "does not say the format gptq_v2"),
    "an unknown format": (lambda out: respeak(out, format="gguf"), "names a format"),
    "no number of blocks": (lambda out: respeak(out, blocks="3"), "is not the record of a conversion"),
    "a Linear of another name": (lambda out: rename_linear(out), "says that model.layers.9.x is packed, but it is not"),
}


def swap(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def respeak(out: Path, **changes: Any) -> None:
    record = unseal((out / ".bigq" / "conversion.json").read_bytes())
    assert record is not None
    save_record(out / ".bigq" / "conversion.json", {**record, **changes})


def rename_linear(out: Path) -> None:
    lines = [unseal(line, line=True) or {} for line in journal_lines(out)]
    lines[1]["linears"][0]["name"] = "model.layers.9.x"
    (out / ".bigq" / "journal.jsonl").write_bytes(b"".join(seal(line, line=True) for line in lines))


@pytest.mark.parametrize(("forge", "said"), FORGERIES.values(), ids=FORGERIES)
def test_records_and_configs_that_disagree_are_found(forge: Callable[[Path], None], said: str, out: Path) -> None:
    forge(out)
    reseal(out)
    assert any(said in line for line in verify(out)), verify(out)


def test_foreign_files_are_found(out: Path) -> None:
    for file in ("stray.safetensors", "notes.txt", ".bigq/runs.jsonl"):
        (out / file).write_text("")
        assert [line.partition(":")[0] for line in verify(out)] == [file]
        (out / file).unlink()
    (out / ".gitattributes").write_text("")
    assert verify(out) == []


def test_the_command_line_verifies(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(out)]) == 0 and capsys.readouterr().out == f"{out}: sound\n"
    shard = out / FILES[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["verify", str(out)]) == 3
    assert capsys.readouterr().out.startswith(f"{FILES[1]}: was changed after it was written")


# Report and model card.


def test_the_errors_are_those_of_the_job(converted: Path, quantized: Path) -> None:
    before, after = read_history(quantized), read_history(converted)
    assert [(each.block, each.name, each.error, each.damping) for each in after.linears] == [
        (each.block, each.name, each.error, each.damping) for each in before.linears
    ]
    assert after.left_out == before.left_out and after.names == before.names and after.source_bytes == before.source_bytes
    assert after.config is not None and after.config.format == "gptq" and after.config.scheme.damping == 0.02
    assert after.linear_bits != before.linear_bits and after.all_bits is not None


def test_the_report_says_what_was_converted(converted: Path, quantized: Path, tmp_path: Path) -> None:
    page = Page(write_report(converted, tmp_path / "r.html").read_text(encoding="utf-8"))
    text = page.text
    assert "converted from compressed-tensors to gptq" in text and str(quantized) in text
    worst = read_history(quantized).largest_errors(1)[0]
    assert f"{worst.error:.2e}" in text and "Hatched: unquantized" in text
    assert "Peak memory" not in text and "Seconds by phase" not in text, "what the job took says nothing of this folder"


def test_the_report_of_another_tools_checkpoint(foreign: Path, tmp_path: Path) -> None:
    history = read_history(foreign)
    assert history.config is None and history.runs == () and history.name == "other-4bit" and len(history.linears) == 20
    assert {each.block for each in history.linears} == {0, 1, 2} and {each.error for each in history.linears} == {None}
    assert history.linear_bits is not None and {each.bits for each in history.linears} == {4, 8}
    page = Page(write_report(foreign, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "The errors are unknown" in page.text and "quantized byanother tool" in page.text
    assert not [tag for tag, _ in page.tags if tag == "svg"]


def test_the_card_names_both_commands(out: Path, checkpoint: Callable[[str], Path]) -> None:
    text = write_model_card(out).read_text(encoding="utf-8")
    assert (
        "bigq convert QUANTIZED OUT --to gptq\n" in text and "QUANTIZED --group-size 32" in text and "--format compressed-tensors" in text
    )
    assert "converted it from the format `compressed-tensors` to `gptq`" in text and "# llama, quantized" in text
    assert verify(out) == [] and CARD_MARK in text
    (out / "README.md").write_text(text + "mine\n")
    assert verify(out) == [], "people may edit a card"


def test_the_card_of_another_tools_checkpoint(foreign: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(foreign, tmp_path / "out"))
    text = write_model_card(out).read_text(encoding="utf-8")
    assert "quantized by another tool" in text and "Reproducing" not in text and verify(out) == []


def test_an_evaluation_is_recorded(out: Path, ids_file: Path) -> None:
    result = bigq.evaluate(str(out), EvalConfig(data=str(ids_file), seqlen=16, samples=2, device="cpu", quiet=True))
    (found,) = read_history(out).evaluations
    assert found.perplexity == result.perplexity and verify(out) == []
    assert f"{found.perplexity:.3f}" in write_report(out).read_text(encoding="utf-8")
    shard = next(iter(journal_lines(out)))
    (out / ".bigq" / "journal.jsonl").write_bytes(shard)
    assert read_history(out).outdated == 1


@pytest.mark.parametrize("name", ["conversion.json", "journal.jsonl"])
@pytest.mark.parametrize("kind", ["converted", "foreign"])
def test_records_may_hold_anything(kind: str, name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """With sound checksums, by somebody who means ill."""
    skipped = shutil.ignore_patterns("*.safetensors")
    out = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "out", ignore=skipped))
    path, rng, read = out / ".bigq" / name, random.Random(f"{kind} {name}"), 0
    original = (
        [unseal(line, line=True) or {} for line in journal_lines(out)] if name == "journal.jsonl" else [unseal(path.read_bytes()) or {}]
    )
    for _ in range(80):
        values = [value if isinstance(value := mutate_json(rng, line), dict) else {"x": value} for line in original]
        try:
            data = b"".join(seal(value, line=name == "journal.jsonl") for value in values)
        except (UnicodeEncodeError, ValueError, RecursionError):  # no JSON that a file could hold
            continue
        path.write_bytes(data)
        history = read_history(out)
        assert render(history, Pictures(None, None)).endswith("</html>\n") and model_card(history, "") and status(out).text()
        read += 1
    assert read > 50


# What a converted folder is not.


def test_no_job_runs_in_it(out: Path, checkpoint: Callable[[str], Path], ids_file: Path) -> None:
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="holds a converted model, in which no job can run; choose another folder"):
        bigq.quantize(str(checkpoint("llama")), out, job(ids_file))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_second_conversion_keeps_the_provenance(converted: Path, quantized: Path, tmp_path: Path) -> None:
    convert(converted, tmp_path / "again", "gptq_v2")
    history = read_history(tmp_path / "again")
    assert history.conversion is not None and history.conversion.source == str(converted)
    assert history.conversion.job_format == "compressed-tensors" and history.conversion.format_before == "gptq"
    assert [each.error for each in history.linears] == [each.error for each in read_history(quantized).linears]
    assert verify(tmp_path / "again") == []


def test_a_damaged_record_of_the_source_costs_the_provenance_only(quantized: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(quantized, tmp_path / "q"))
    (source / ".bigq" / "job.json").write_text("{}")
    said: list[str] = []
    convert(source, tmp_path / "out", "gptq", say=said.append)
    assert any(re.match(r"warning: .*job\.json: damaged", line) for line in said)
    assert read_history(tmp_path / "out").config is None and verify(tmp_path / "out") == []
