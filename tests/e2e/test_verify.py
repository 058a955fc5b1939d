"""``bigq verify``: a sound folder is found sound whatever the job, and whatever is done to one afterwards is found and named."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_checkpoint, packed_prefixes, rewrite, shard_of, stored_tensors
from safetensors.torch import load_file, save_file

import bigq
from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.inspect.verify import verify
from bigq.io.checksum import save_record, seal, unseal
from bigq.job.journal import Journal
from bigq.scheme import QuantScheme, Rule

pytestmark = pytest.mark.usefixtures("one_thread")

INDEX = "model.safetensors.index.json"
SHARDS = tuple(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5))
RECORDS = tuple(f".bigq/{name}" for name in ("job.json", "journal.jsonl", "runs.jsonl", "linears.jsonl", "manifest.json"))
FILES = (*SHARDS, INDEX, "config.json", "quantize_config.json", "generation_config.json", "tokenizer.txt", *RECORDS)


def job(ids: Path, **changes: Any) -> JobConfig:
    values = {"scheme": QuantScheme(group_size=32), "calibration": str(ids), "samples": 4, "seqlen": 16, "batch": 4, "quiet": True}
    return JobConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("source") / "m", "llama")
    (folder / "tokenizer.txt").write_text("a side file\n")
    return folder


@pytest.fixture(scope="module")
def finished(source: Path, ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job's folder; tests that change it copy it first."""
    out = tmp_path_factory.mktemp("finished") / "out"
    bigq.quantize(str(source), out, job(ids_file, rules=(Rule.parse(r".*\.down_proj:bits=8,sym=false"),)))
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished job's folder, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def reseal(out: Path) -> None:
    """Give the journal, the index's total and the manifest the sizes and hashes that the files have now, as a forger would."""
    journal = out / ".bigq" / "journal.jsonl"
    lines = []
    for line in journal.read_bytes().splitlines(keepends=True):
        record = unseal(line, line=True)
        assert record is not None
        data = (out / record["file"]).read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        names = [name for name in header if name != "__metadata__"]
        names = record["tensors"] if sorted(names) == sorted(record["tensors"]) else names
        lines.append(seal({**record, "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "tensors": names}, line=True))
    journal.write_bytes(b"".join(lines))
    index = json.loads((out / INDEX).read_text())
    index["metadata"]["total_size"] = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    (out / INDEX).write_text(json.dumps(index))
    manifest = unseal((out / ".bigq" / "manifest.json").read_bytes())
    assert manifest is not None
    for name in manifest["files"]:
        data = (out / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    save_record(out / ".bigq" / "manifest.json", manifest)


def change_tensor(out: Path, name: str, change: Callable[[torch.Tensor], Any]) -> str:
    """Change a tensor's values in place, in the file as it was laid out; returns the shard's name."""
    path = shard_of(out, name)
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    lo, hi = json.loads(data[8:start])[name]["data_offsets"]
    tensor = load_file(path)[name]
    change(tensor)
    data[start + lo : start + hi] = tensor.view(torch.uint8).numpy().tobytes()
    path.write_bytes(data)
    return path.name


# Sound folders.


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_every_format_and_width_is_sound(version: str, bits: int, source: Path, ids_file: Path, tmp_path: Path) -> None:
    scheme = QuantScheme(
        bits=bits,
        group_size=32,
        symmetric=bits == 4,
        order="activation" if bits == 3 else "group",
        scales="search" if bits == 2 else "minmax",
    )
    bigq.quantize(str(source), tmp_path / "out", job(ids_file, scheme=scheme, format=version))
    assert verify(tmp_path / "out") == []


MIXED = (
    Rule(r".*\.o_proj", None),
    Rule.parse(r".*\.down_proj:bits=8,sym=false,group_size=-1"),
    Rule.parse(r".*\.0\..*:bits=3"),
    Rule.parse(r".*\.(q|k|v|qkv)_proj:bits=2,group_size=16"),
)


@pytest.mark.parametrize(
    "changes",
    [{"rules": MIXED}, {"method": "rtn"}, {"method": "rtn", "rules": MIXED, "format": "gptq_v2"}, {"scheme": QuantScheme(group_size=-1)}],
    ids=["rules", "rtn", "rtn with rules", "whole rows"],
)
def test_every_kind_of_job_is_sound(changes: dict[str, Any], source: Path, ids_file: Path, tmp_path: Path) -> None:
    bigq.quantize(str(source), tmp_path / "out", job(ids_file, **changes))
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("family", ["bloom", "gpt2", "opt", "gpt_neox", "falcon", "gemma3", "phi3"])
def test_every_kind_of_model_is_sound(family: str, checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    """Transposed Linears, tied embeddings, names with and without the base model's prefix."""
    bigq.quantize(str(checkpoint(family)), tmp_path / "out", job(ids_file))
    assert verify(tmp_path / "out") == []


def test_linears_that_were_left_out_and_weights_of_zero_are_sound(ids_file: Path, tmp_path: Path) -> None:
    """A Linear that is too small to be packed; one whose groups are all zero."""
    source = make_checkpoint(tmp_path / "m", "opt", hidden_size=64, ffn_dim=96)
    name = next(n for n in stored_tensors(source) if n.endswith("fc1.weight"))
    rewrite(source, name, torch.zeros_like(stored_tensors(source)[name]))
    bigq.quantize(str(source), tmp_path / "out", job(ids_file))
    assert verify(tmp_path / "out") == []


def test_a_job_that_was_taken_up_twice_is_sound(source: Path, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(source, tmp_path / "out", job(ids_file), 2, monkeypatch)
    interrupted(source, tmp_path / "out", job(ids_file), 1, monkeypatch)
    bigq.quantize(str(source), tmp_path / "out", job(ids_file))
    assert verify(tmp_path / "out") == []
    bigq.quantize(str(source), tmp_path / "out", job(ids_file))
    assert verify(tmp_path / "out") == []


def test_a_copy_of_a_sound_folder_is_sound(out: Path) -> None:
    """Of times and owners nothing is held against it, nor what others keep under names with a dot."""
    (out / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (out / ".cache").mkdir()
    (out / ".cache" / "x").write_text("")
    for name in ("lock", "owner.json"):
        (out / ".bigq" / name).unlink()
    assert verify(out) == []


# Changes that hashes tell.


@pytest.mark.parametrize("file", FILES)
def test_any_changed_byte_is_found(file: str, out: Path) -> None:
    path = out / file
    data = path.read_bytes()
    generator = random.Random(file)
    for at in [0, len(data) - 1, *(generator.randrange(len(data)) for _ in range(6))]:
        path.write_bytes(data[:at] + bytes([data[at] ^ generator.randrange(1, 256)]) + data[at + 1 :])
        assert any(line.startswith(f"{file}: ") for line in verify(out)), f"byte {at}"
    path.write_bytes(data)
    assert verify(out) == []


@pytest.mark.parametrize("file", [f for f in FILES if f.endswith((".json", ".jsonl"))])
def test_white_space_is_found(file: str, out: Path) -> None:
    path = out / file
    data = path.read_bytes()
    for changed in (data.replace(b":", b": ", 1), data.replace(b"\n", b" \n", 1), data.replace(b"\n", b"\r\n"), data + b"\n", b" " + data):
        path.write_bytes(changed)
        assert changed != data and any(line.startswith(f"{file}: ") for line in verify(out))


@pytest.mark.parametrize("file", FILES)
def test_deleted_truncated_and_extended_files_are_found(file: str, out: Path) -> None:
    path = out / file
    data = path.read_bytes()
    for changed in (data[:-1], data[: len(data) // 2], b"", data + b"\0", data + data[:-1]):
        path.write_bytes(changed)
        assert any(line.startswith(f"{file}: ") for line in verify(out)), f"{len(changed)} bytes of {len(data)}"
    path.unlink()
    assert any(line.startswith(f"{file}: ") for line in verify(out))
    path.mkdir()
    assert any(line.startswith(f"{file}: ") for line in verify(out))


@pytest.mark.parametrize("number", range(4))
def test_every_damaged_line_is_found(number: int, out: Path) -> None:
    runs, journal = out / ".bigq" / "runs.jsonl", out / ".bigq" / "journal.jsonl"
    runs.write_bytes(runs.read_bytes() * 4)
    for path in (runs, journal):
        lines = path.read_bytes().splitlines(keepends=True)
        lines[number] = lines[number].replace(b":", b";", 1)
        path.write_bytes(b"".join(lines))
    problems = verify(out)
    assert f".bigq/runs.jsonl: line {number + 1} is damaged or was changed by hand" in problems
    assert f".bigq/journal.jsonl: line {number + 1} is damaged or was changed by hand" in problems
    assert not any(line.startswith((INDEX, "model-")) for line in problems), "what is sound is not spoken ill of"


def test_swapped_shards_are_found(out: Path) -> None:
    a, b = out / SHARDS[1], out / SHARDS[2]
    a_data, b_data = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_data)
    b.write_bytes(a_data)
    problems = verify(out)
    for file in SHARDS[1:3]:
        assert any(line.startswith(f"{file}: was changed") for line in problems)


# Changes that hashes do not tell.


def test_resealing_alone_changes_nothing(out: Path) -> None:
    """So what the tests below find is not the forger's doing."""
    reseal(out)
    assert verify(out) == []


def test_a_shard_replaced_by_another_valid_one_is_found(out: Path) -> None:
    shutil.copy(out / SHARDS[3], out / SHARDS[2])
    reseal(out)
    problems = verify(out)
    assert any(SHARDS[2] in line and "model.layers.2." in line for line in problems)
    index = json.loads((out / INDEX).read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if ".layers.1." not in name}
    (out / INDEX).write_text(json.dumps(index))
    reseal(out)
    assert any("model.layers.2." in line and "2 shards" in line for line in verify(out))


def test_a_shard_from_a_job_with_other_bits_is_found(source: Path, ids_file: Path, out: Path, tmp_path: Path) -> None:
    rules = (Rule.parse(r".*\.down_proj:bits=8,sym=false"),)
    bigq.quantize(str(source), tmp_path / "other", job(ids_file, scheme=QuantScheme(bits=3, group_size=32), rules=rules))
    shutil.copy(tmp_path / "other" / SHARDS[2], out / SHARDS[2])
    reseal(out)
    assert any(line.startswith(f"{SHARDS[2]}: tensor model.layers.1.") and "qweight" in line for line in verify(out))


def test_a_shard_from_a_job_with_other_groups_is_found(source: Path, ids_file: Path, out: Path, tmp_path: Path) -> None:
    rules = (Rule.parse(r".*\.down_proj:bits=8,sym=false"),)
    bigq.quantize(str(source), tmp_path / "other", job(ids_file, scheme=QuantScheme(group_size=16), rules=rules))
    shutil.copy(tmp_path / "other" / SHARDS[2], out / SHARDS[2])
    reseal(out)
    assert any(line.startswith(f"{SHARDS[2]}: ") and "4 groups" in line for line in verify(out))


def test_a_linear_that_is_not_packed_is_found(source: Path, ids_file: Path, out: Path, tmp_path: Path) -> None:
    """And one that is, although it should not be."""
    prefix = "model.layers.1.self_attn.o_proj"
    path = out / SHARDS[2]
    tensors = {name: t for name, t in load_file(path).items() if not name.startswith(prefix)}
    tensors[f"{prefix}.weight"] = stored_tensors(source)[f"{prefix}.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    index = json.loads((out / INDEX).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if not n.startswith(prefix)} | {f"{prefix}.weight": SHARDS[2]}
    (out / INDEX).write_text(json.dumps(index))
    reseal(out)
    assert f"{SHARDS[2]}: {prefix} is not packed, although the job says that it is" in verify(out)


def test_a_parameter_that_is_missing_everywhere_is_found(out: Path) -> None:
    name = "model.norm.weight"
    rewrite(out, name, None)
    index = json.loads((out / INDEX).read_text())
    del index["weight_map"][name]
    (out / INDEX).write_text(json.dumps(index))
    reseal(out)
    assert any(name in line for line in verify(out))


def test_a_config_of_another_shape_is_found(out: Path) -> None:
    path = out / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 96', '"intermediate_size": 128'))
    reseal(out)
    problems = verify(out)
    assert any(line.startswith("model-") and "qweight" in line and "96" in line and "128" in line for line in problems)


@pytest.mark.parametrize("file", ["config.json", "quantize_config.json"])
def test_a_quantization_config_that_is_not_the_jobs_is_found(file: str, out: Path) -> None:
    path = out / file
    path.write_text(path.read_text().replace('"bits": 4', '"bits": 2'))
    reseal(out)
    assert verify(out) == [f"{file}: differs from the settings in the job's record"]


def test_a_model_with_code_of_its_own_is_not_run_unasked(out: Path) -> None:
    path = out / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}))
    reseal(out)
    (problem,) = verify(out)
    assert "--trust-remote-code" in problem


PREFIX = "model.layers.1.mlp"
VALUES: dict[str, tuple[str, Callable[[torch.Tensor], Any]]] = {
    "NaN scale": (f"{PREFIX}.up_proj.scales", lambda t: t.view(-1)[-1:].fill_(float("nan"))),
    "scale of 0": (f"{PREFIX}.up_proj.scales", lambda t: t[0].zero_()),
    "zero point out of range": (f"{PREFIX}.down_proj.qzeros", lambda t: t[-1, -1:].fill_(-1)),
    "zero point not in the middle": (f"{PREFIX}.up_proj.qzeros", lambda t: t[0, :1].fill_(0x77777776)),
    "group": (f"{PREFIX}.up_proj.g_idx", lambda t: t[-1:].zero_()),
    "norm": ("model.layers.1.input_layernorm.weight", lambda t: t[3:4].fill_(float("inf"))),
    "embedding": ("model.embed_tokens.weight", lambda t: t[-1, -1:].fill_(float("nan"))),
}


@pytest.mark.parametrize(("name", "change"), VALUES.values(), ids=VALUES)
def test_values_that_no_reader_can_use_are_found(name: str, change: Callable[[torch.Tensor], Any], out: Path) -> None:
    file = change_tensor(out, name, change)
    reseal(out)
    (problem,) = verify(out)
    assert problem.startswith((f"{file}: tensor {name} holds", f"{file}: tensor {name} is not in"))


def test_an_index_that_disagrees_is_found(out: Path) -> None:
    index = json.loads((out / INDEX).read_text())
    name = "model.norm.weight"
    for weight_map in (
        {**index["weight_map"], name: SHARDS[1]},
        {**index["weight_map"], "model.layers.3.x": SHARDS[1]},
        {n: f for n, f in index["weight_map"].items() if n != name},
        {},
        [],
    ):
        (out / INDEX).write_text(json.dumps({**index, "weight_map": weight_map}))
        reseal(out)
        assert any(line.startswith(f"{INDEX}: ") for line in verify(out))


def reseal_manifest(out: Path, file: str) -> None:
    """Let the manifest promise one file as it is now."""
    manifest = unseal((out / ".bigq" / "manifest.json").read_bytes())
    assert manifest is not None
    data = (out / file).read_bytes()
    manifest["files"][file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    save_record(out / ".bigq" / "manifest.json", manifest)


def test_an_index_with_another_total_is_found(out: Path) -> None:
    index = json.loads((out / INDEX).read_text())
    for metadata in ({"total_size": index["metadata"]["total_size"] - 1}, {}, None):
        (out / INDEX).write_text(json.dumps({**index, "metadata": metadata}))
        reseal_manifest(out, INDEX)
        (problem,) = verify(out)
        assert problem.startswith(f"{INDEX}: its total_size is not ")


Record = dict[str, Any]
JOURNALS: dict[str, tuple[Callable[[list[Record]], list[Record]], str]] = {
    "twice": (lambda r: [*r, r[3]], "line 5 commits block-2 once more"),
    "last missing": (lambda r: r[:3], "commits 3 shards, not all of 4"),
    "first missing": (lambda r: r[1:], "commits 3 shards, not all of 4"),
    "middle missing": (lambda r: [r[0], r[1], r[3]], "commits 3 shards, not all of 4"),
    "another block": (lambda r: [*r[:3], {**r[3], "unit": "block-3"}], "in each other's files"),
    "later blocks": (lambda r: [r[0], *({**x, "unit": f"block-{i}"} for i, x in enumerate(r[1:], 1))], "no block-0"),
    "no unit": (lambda r: [*r[:3], {**r[3], "unit": "tail"}], "commits tail in"),
    "no shard": (lambda r: [*r[:3], {**r[3], "file": "x.safetensors"}], "commits block-2 in x.safetensors"),
    "another outside": (lambda r: [{**r[0], "unit": "rest-1"}, *r[1:]], "the place of another"),
    "another total": (lambda r: [*r[:3], {**r[3], "file": "model-00004-of-00005.safetensors"}], "several jobs"),
    "a Linear missing": (lambda r: [*r[:3], {**r[3], "linears": r[3]["linears"][1:]}], "packed Linears"),
    "a Linear of other bits": (lambda r: [*r[:3], {**r[3], "linears": [{**x, "bits": 2} for x in r[3]["linears"]]}], "packed Linears"),
    "Linears without a shape": (lambda r: [*r[:3], {**r[3], "linears": [{}]}], "packed Linears"),
    "other order": (lambda r: [*r[:3], {**r[3], "tensors": r[3]["tensors"][::-1]}], "their order differs"),
    "a tensor missing": (lambda r: [*r[:3], {**r[3], "tensors": r[3]["tensors"][1:]}], "is there"),
}


@pytest.mark.parametrize(("change", "said"), JOURNALS.values(), ids=JOURNALS)
def test_a_journal_that_disagrees_is_found(change: Callable[[list[Record]], list[Record]], said: str, out: Path) -> None:
    path = out / ".bigq" / "journal.jsonl"
    records = [unseal(line, line=True) or {} for line in path.read_bytes().splitlines(keepends=True)]
    path.write_bytes(b"".join(seal(record, line=True) for record in change(records)))
    reseal_manifest(out, ".bigq/journal.jsonl")
    assert any(said in line for line in verify(out))


def test_sizes_are_told(out: Path) -> None:
    for file in ("tokenizer.txt", SHARDS[1]):
        size = (out / file).stat().st_size
        with open(out / file, "ab") as grown:
            grown.write(b"x")
        assert any(line.startswith(f"{file}: has {size + 1} bytes, but {size} by .bigq/") for line in verify(out))


@pytest.mark.parametrize("file", [SHARDS[0], INDEX, "config.json", ".bigq/journal.jsonl"])
def test_a_manifest_that_leaves_a_file_out_is_found(file: str, out: Path) -> None:
    manifest = unseal((out / ".bigq" / "manifest.json").read_bytes())
    assert manifest is not None
    del manifest["files"][file]
    save_record(out / ".bigq" / "manifest.json", manifest)
    assert f".bigq/manifest.json: does not list {file}" in verify(out)


@pytest.mark.parametrize("value", [{}, {"files": []}, {"files": {"config.json": 3}}, {"files": {"../x": {"size": 1, "sha256": ""}}}])
def test_a_manifest_that_is_none_is_no_crash(value: dict[str, Any], out: Path) -> None:
    save_record(out / ".bigq" / "manifest.json", value)
    assert any(line.startswith((".bigq/manifest.json: ", "../x: is missing")) for line in verify(out))


# What is there without reason.


@pytest.mark.parametrize(
    "file",
    [
        "stray.safetensors",
        "model-00005-of-00005.safetensors",
        "config.json.bigq-tmp",
        "notes.txt",
        ".bigq/owner.json.bigq-tmp",
        ".bigq/activations-00002.safetensors",
        ".bigq/checkpoints.json",
        ".bigq/batches.json",
        "folder/x",
    ],
)
def test_what_nothing_accounts_for_is_found(file: str, out: Path) -> None:
    (out / file).parent.mkdir(exist_ok=True)
    save_record(out / file, {"kept": [], "halvings": []})
    named = file.partition("/")[0] if file.startswith("folder") else file
    assert [line.partition(":")[0] for line in verify(out)] == [named]


# Unfinished jobs.


def interrupted(source: Path, out: Path, config: JobConfig, commits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a job up to a number of commits."""
    commit = Journal.commit
    left = itertools.count(commits - 1, -1)

    def striking(self: Journal, record: Any) -> None:
        commit(self, record)
        if next(left) == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "commit", striking)
        with pytest.raises(KeyboardInterrupt):
            bigq.quantize(str(source), out, config)


def test_an_unfinished_job_says_so_and_what_is_wrong_besides(
    source: Path, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(source, out, job(ids_file, checkpoint_every=0.0), 3, monkeypatch)
    unfinished = f"{out}: the job is not finished, 3 shards are committed; run the same command again to resume it"
    assert verify(out) == [unfinished]
    (saved,) = (out / ".bigq").glob("activations-*.safetensors")
    data = saved.read_bytes()
    saved.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    prefix = next(packed_prefixes(load_file(out / SHARDS[1])))
    shutil.copy(out / SHARDS[1], out / SHARDS[3])
    (out / "x.bigq-tmp").write_text("")
    (out / "model.safetensors").write_text("")
    tensors = load_file(out / SHARDS[2])
    name = prefix.replace(".0.", ".1.") + ".scales"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, out / SHARDS[2], metadata={"format": "pt"})
    problems = verify(out)
    assert problems[0] == unfinished
    assert any(line.startswith((f"{SHARDS[2]}: was changed", f"{SHARDS[2]}: has")) for line in problems)
    assert f"{SHARDS[2]}: tensor {name} holds NaN or Inf" in problems
    for file in (f".bigq/{saved.name}", SHARDS[3], "x.bigq-tmp", "model.safetensors"):
        assert any(line.startswith(f"{file}: ") for line in problems), file
    (out / "x.bigq-tmp").unlink()
    (out / "model.safetensors").unlink()
    bigq.quantize(str(source), out, job(ids_file))
    assert verify(out) == []


def test_what_a_running_job_is_about_is_left_alone(source: Path, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that come and go are no leftovers then; whether a holder on another machine runs, nobody can tell at a glance."""
    out = tmp_path / "out"
    interrupted(source, out, job(ids_file), 2, monkeypatch)
    passing = [out / "x.bigq-tmp", out / ".bigq" / "owner.json.bigq-tmp", out / ".bigq" / "activations-00001.safetensors"]
    for path in passing:
        path.write_text("")
    assert len(verify(out)) == 1 + len(passing)
    owner = json.loads((out / ".bigq" / "owner.json").read_text())
    (out / ".bigq" / "owner.json").write_text(json.dumps({**owner, "machine": "elsewhere", "outcome": None}))
    assert verify(out) == [f"{out}: the job is not finished, 2 shards are committed; a job is running"]


def test_a_job_that_was_only_begun(tmp_path: Path) -> None:
    (tmp_path / "out" / ".bigq").mkdir(parents=True)
    problems = verify(tmp_path / "out")
    assert any("not finished, 0 shards" in line for line in problems)
    assert any(line.startswith(".bigq/job.json: is missing") for line in problems)


@pytest.mark.parametrize("kind", ["absent", "a file", "empty", "a model"])
def test_a_folder_of_no_job_is_refused(kind: str, source: Path, tmp_path: Path) -> None:
    path = source if kind == "a model" else tmp_path / "x"
    if kind == "a file":
        path.write_text("")
    elif kind == "empty":
        path.mkdir()
    with pytest.raises(UsageError, match="holds no job"):
        verify(path)
