"""Jobs in every format, and re-packing from one to another: the same codes, scales and zero points, bit for bit, or a refusal."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Child
from models import make_checkpoint, random_ids, rewrite, save_ids, shard_of, stored_tensors, streamed_logits
from safetensors.torch import load_file, save_file

import bigq
from bigq.cli.main import main
from bigq.config import JobConfig
from bigq.conversion import staging
from bigq.conversion.convert import convert
from bigq.conversion.staging import MARK
from bigq.errors import BigqError, CheckpointError, ResourceError, UnsupportedModelError, UsageError
from bigq.inspect.verify import verify
from bigq.io import writer
from bigq.io.formats import FORMATS as KNOWN
from bigq.job.finish import CARD_MARK
from bigq.scheme import QuantScheme, Rule

RULES = (
    Rule(r".*\.1\..*o_proj", None),
    Rule.parse(r".*\.down_proj:bits=8,group_size=-1"),
    Rule.parse(r".*\.(gate|up|gate_up)_proj:bits=3,sym=false"),
)
#: The same for families whose Linears have other names.
RULES_OF = {
    "gpt2": (Rule(r".*\.1\..*attn\.c_proj", None),),
    "opt": (Rule(r".*\.1\..*out_proj", None), Rule.parse(r".*fc2:bits=8,group_size=-1"), Rule.parse(r".*fc1:bits=3,sym=false")),
    "bloom": (
        Rule(r".*\.1\..*attention\.dense", None),
        Rule.parse(r".*dense_4h_to_h:bits=8,group_size=-1"),
        Rule.parse(r".*dense_h_to_4h:bits=3,sym=false"),
    ),
}
#: Those that hold what the rules say.
FORMATS = tuple(name for name, made in KNOWN.items() if made.points == "int" and not made.one_size and len(made.bits) > 1)


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def job(ids: Path, **changes: Any) -> JobConfig:
    values = {"scheme": QuantScheme(group_size=32, scale_bits=8), "rules": RULES, "calibration": str(ids), "samples": 8, "seqlen": 24}
    return JobConfig(**{**values, "quiet": True, **changes})


def logits(folder: Path) -> torch.Tensor:
    return streamed_logits(folder, random_ids()[:4], 2)


@pytest.fixture(scope="module")
def made(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, format, scheme's changes) → the folder of a finished job; each is run once."""
    ids = save_ids(tmp_path_factory.mktemp("ids") / "ids.safetensors", random_ids())
    known: dict[str, Path] = {}

    def get(family: str, format: str, **scheme: Any) -> Path:
        key = f"{family} {format} {scheme}"
        if key not in known:
            known[key] = tmp_path_factory.mktemp("out")
            changed = QuantScheme(**{"group_size": 32, "scale_bits": 8, **scheme})
            rules = RULES_OF.get(family, RULES)
            bigq.quantize(str(checkpoint(family)), known[key], job(ids, format=format, scheme=changed, rules=rules))
        return known[key]

    return get


@pytest.mark.parametrize("before", FORMATS)
@pytest.mark.parametrize("after", FORMATS)
def test_what_is_repacked_is_what_a_job_in_that_format_writes(before: str, after: str, made: Callable[..., Path], tmp_path: Path) -> None:
    if before == after:
        with pytest.raises(UsageError, match=f"is in the {after} format already"):
            convert(made("llama", before), tmp_path / "out", after)
        return
    done = convert(made("llama", before), tmp_path / "out", after)
    assert (done.format_before, done.format, done.linears) == (before, after, 3 * 7 - 1)
    got, expected = hashes(tmp_path / "out"), hashes(made("llama", after))
    assert got.keys() == expected.keys()
    differing = {name for name in got if got[name] != expected[name]}
    assert differing <= {"config.json", "quantize_config.json"}, "these tell of what only the job knew"
    assert torch.equal(logits(tmp_path / "out"), logits(made("llama", before)))


@pytest.mark.parametrize("family", ["qwen2", "opt", "bloom"])
def test_other_families(family: str, made: Callable[..., Path], tmp_path: Path) -> None:
    """With biases and tied embeddings."""
    convert(made(family, "gptq_v2", symmetric=False), tmp_path / "ct", "compressed-tensors")
    convert(tmp_path / "ct", tmp_path / "back", "gptq_v2")
    before, after = stored_tensors(made(family, "gptq_v2", symmetric=False)), stored_tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(tmp_path / "ct"), logits(tmp_path / "back"))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_a_compressed_tensors_job_is_verified_and_taken_up(
    symmetric: bool, made: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    out = made("llama", "compressed-tensors", symmetric=symmetric)
    assert verify(out) == [], "sound"
    expected = hashes(out)
    shards = sorted(out.glob("*.safetensors"))
    shards[2].unlink()
    assert any(shards[2].name in line for line in verify(out))
    bigq.quantize(str(checkpoint("llama")), out)
    assert hashes(out) == expected


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"])
def test_verify_looks_at_every_tensor_of_a_compressed_tensors_job(suffix: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Values that the hashes of a forged record would pass."""
    from bigq.inspect.scan import scan_shard

    ids = save_ids(tmp_path / "ids.safetensors", random_ids())
    bigq.quantize(str(checkpoint("llama")), tmp_path / "out", job(ids, format="compressed-tensors"))
    name = f"model.layers.1.mlp.up_proj.{suffix}"
    path = shard_of(tmp_path / "out", name)
    assert scan_shard(path, KNOWN["compressed-tensors"]).problems == ()
    tensor = stored_tensors(tmp_path / "out")[name]
    wrong = {"weight_scale": tensor * 0, "weight_shape": tensor + 1}.get(suffix, tensor[:-1].clone())
    rewrite(tmp_path / "out", name, wrong)
    assert any(name.rpartition(".")[0] in problem for problem in scan_shard(path, KNOWN["compressed-tensors"]).problems)


def test_verify_names_zero_points_by_the_format(made: Callable[..., Path]) -> None:
    """Asked of a record that says symmetric, for shards that are not."""
    from bigq.inspect.scan import scan_shard
    from bigq.inspect.verify_model import model_problems

    for format, tensor in (("gptq_v2", "qzeros"), ("compressed-tensors", "weight_zero_point")):
        out = made("llama", format, symmetric=False)
        scans = {path.name: scan_shard(path, KNOWN[format]) for path in out.glob("*.safetensors")}
        said = [what for _, what in model_problems(out, job(Path("ids"), format=format), (), scans, trust_remote_code=False)]
        assert f"tensor model.layers.0.self_attn.q_proj.{tensor} holds zero points other than 8, although the job is symmetric" in said


def test_scales_follow_the_type_of_the_checkpoint(tmp_path: Path) -> None:
    ids = save_ids(tmp_path / "ids.safetensors", random_ids())
    for dtype, bits in (("bfloat16", 8), ("float16", 11), ("float32", 11)):
        source = make_checkpoint(tmp_path / dtype, "llama", dtype=getattr(torch, dtype), num_hidden_layers=1)
        out = tmp_path / f"{dtype}-out"
        bigq.quantize(str(source), out, job(ids, scheme=QuantScheme(group_size=32), rules=()))
        scales = torch.cat([t.flatten() for name, t in stored_tensors(out).items() if name.endswith(".scales")])
        pattern = scales.view(torch.int16) % (1 << (11 - 8))
        assert bool((pattern == 0).all()) == (bits == 8)
        assert json.loads((out / ".bigq" / "job.json").read_text())["settings"]["scheme"]["scale_bits"] == bits
        assert verify(out) == []


# What does not fit is refused, and leaves nothing behind.


def refused(source: Path, out: Path, to: str, match: str, error: type[BigqError] = UsageError) -> None:
    with pytest.raises(error, match=match):
        convert(source, out, to)
    assert not [*out.parent.glob("out*")], "something is left"


def test_a_zero_point_of_zero_does_not_fit_the_first_version(made: Callable[..., Path], tmp_path: Path) -> None:
    source = made("llama", "gptq_v2", symmetric=False)
    zeros = {name: t for name, t in stored_tensors(source).items() if name.endswith(".qzeros")}
    assert zeros
    name = "model.layers.0.self_attn.q_proj.qzeros"
    copy = tmp_path / "copy"
    os.makedirs(copy)
    for path in source.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    rewrite(copy, name, torch.zeros_like(zeros[name]))
    refused(copy, tmp_path / "out", "gptq", r"model\.layers\.0\.self_attn\.q_proj: has zero points of 0.*gptq_v2")


def test_scales_that_do_not_fit_the_models_type_are_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", "llama", dtype=torch.bfloat16, num_hidden_layers=1)
    ids = save_ids(tmp_path / "ids.safetensors", random_ids())
    bigq.quantize(str(source), tmp_path / "fine", job(ids, scheme=QuantScheme(group_size=32, scale_bits=11), rules=()))
    refused(tmp_path / "fine", tmp_path / "out", "compressed-tensors", r"scales are not exact in torch\.bfloat16.*--scale-bits 8")
    with pytest.raises(UsageError, match=r"--scale-bits 11: .* use --scale-bits 8"):
        bigq.quantize(
            str(source), tmp_path / "job", job(ids, scheme=QuantScheme(group_size=32, scale_bits=11), format="compressed-tensors", rules=())
        )


def test_linears_stored_transposed_do_not_fit_compressed_tensors(
    made: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    refused(made("gpt2", "gptq"), tmp_path / "out", "compressed-tensors", r"c_attn and 10 more are stored transposed \(Conv1D\)")
    ids = save_ids(tmp_path / "ids.safetensors", random_ids())
    with pytest.raises(UsageError, match="stored transposed"):
        bigq.quantize(str(checkpoint("gpt2")), tmp_path / "job", job(ids, format="compressed-tensors", rules=()))
    assert not (tmp_path / "job").exists()


def copy_of(folder: Path, copy: Path) -> Path:
    """The files of a finished job, without its record."""
    return Path(shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".bigq")))


def say(folder: Path, **changes: Any) -> Path:
    """Let a folder's quantization config say something else; None takes it out."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    said = {**config["quantization_config"], **changes}
    path.write_text(json.dumps(config | {"quantization_config": {key: value for key, value in said.items() if value is not None}}))
    return folder


def add(folder: Path, path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Add tensors to a shard of a folder."""
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("sym", [True, None], ids=["said", "left out"])
@pytest.mark.parametrize("to", ["gptq", "compressed-tensors"])
def test_zero_points_that_the_config_denies_are_refused(sym: bool | None, to: str, made: Callable[..., Path], tmp_path: Path) -> None:
    source = copy_of(made("llama", "gptq_v2", symmetric=False, min_zero=1), tmp_path / "copy")
    convert(source, tmp_path / "fine", to)
    say(source, sym=sym)
    said = r"tensor model\.layers\.0\.\S+\.qzeros holds zero points other than (8|128), although .*config\.json does not say sym: false"
    refused(source, tmp_path / "out", to, said, CheckpointError)


def test_zero_points_that_no_reader_looks_at_are_looked_at(made: Callable[..., Path], tmp_path: Path) -> None:
    """A symmetric Linear of compressed-tensors has none; where they are there, they must be those that go without saying."""
    source = copy_of(made("llama", "compressed-tensors"), tmp_path / "copy")
    prefix = "model.layers.0.self_attn.q_proj"
    path, middle = shard_of(source, f"{prefix}.weight_packed"), torch.full((64 * 4 // 32, 2), 0x88888888 - 2**32, dtype=torch.int32)
    add(source, path, {f"{prefix}.weight_zero_point": middle})
    convert(source, tmp_path / "fine", "gptq")
    assert not [name for name in stored_tensors(tmp_path / "fine") if "weight_" in name]
    add(source, path, {f"{prefix}.weight_zero_point": middle - 1})
    for to in ("gptq", "gguf"):
        refused(source, tmp_path / "out", to, rf"{prefix}\.weight_zero_point holds .* say symmetric: false", CheckpointError)


def numbered(source: Path, copy: Path, order: torch.Tensor | None) -> Path:
    """A copy of a compressed-tensors folder whose actorder is "group"; its Linears of 64 inputs have a weight_g_idx, if there is one."""
    copy_of(source, copy)
    for path in copy.glob("*.safetensors"):
        shapes = {name: t.tolist() for name, t in load_file(path).items() if name.endswith(".weight_shape")}
        orders = (
            {n.replace("shape", "g_idx"): order.clone() if k == 64 else torch.zeros(k).int() for n, (_, k) in shapes.items()}
            if order is not None
            else {}
        )
        add(copy, path, orders)
    groups = json.loads((copy / "config.json").read_text())["quantization_config"]["config_groups"]
    for group in groups.values():
        group["weights"]["actorder"] = "group"
    return say(copy, config_groups=groups)


def test_numbered_groups_are_read_in_natural_order_only(made: Callable[..., Path], tmp_path: Path) -> None:
    source = made("llama", "compressed-tensors")
    natural = torch.arange(64, dtype=torch.int32) // 32
    convert(source, tmp_path / "expected", "gptq")
    convert(numbered(source, tmp_path / "natural", natural), tmp_path / "fine", "gptq")
    got, expected = stored_tensors(tmp_path / "fine"), stored_tensors(tmp_path / "expected")
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
    for name, order, said in (
        ("other", natural.flip(0).contiguous(), ": groups are not in natural order"),
        ("short", natural[:32].clone(), ": groups are not in natural order"),
        ("none", None, "is missing, but actorder says"),
    ):
        copy = numbered(source, tmp_path / name, order)
        refused(copy, tmp_path / "out", "gptq", rf"model-.*safetensors: tensor .*weight_g_idx ?{said}", UnsupportedModelError)


def test_a_model_card_of_bigq_stays_behind(made: Callable[..., Path], tmp_path: Path) -> None:
    """It says how the source was made, and in which format it is; anybody else's is about the model."""
    source = copy_of(made("llama", "gptq"), tmp_path / "copy")
    for number, text in enumerate(("# Mine\n", f"{CARD_MARK}\n# Of bigq\n")):
        (source / "README.md").write_text(text)
        convert(source, tmp_path / str(number), "gptq_v2")
        assert ("README.md" in hashes(tmp_path / str(number))) == (CARD_MARK not in text)


def test_remedies_are_those_of_the_command(made: Callable[..., Path], tmp_path: Path) -> None:
    refused(made("gpt2", "gptq"), tmp_path / "out", "compressed-tensors", r"Conv1D.*do not support; use --to gptq_v2$")
    if find_spec("gguf"):
        refused(
            made("llama", "gptq"),
            tmp_path / "out",
            "gguf",
            r"no blocks for 3 bits.*; quantize the original model with --format gguf --bits 4",
        )
    source = copy_of(made("llama", "gptq_v2", symmetric=False), tmp_path / "copy")
    name = "model.layers.0.self_attn.q_proj.qzeros"
    rewrite(source, name, torch.zeros_like(stored_tensors(source)[name]))
    refused(source, tmp_path / "out", "gptq", r"has zero points of 0.*; use --to gptq_v2$")


def test_a_job_that_is_not_finished_is_called_so(made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "job"
    shutil.copytree(made("llama", "gptq"), folder)
    (folder / "config.json").unlink()
    said = r"job/config\.json: is missing because the bigq job in this folder is not finished; run its command again to resume it"
    refused(folder, tmp_path / "out", "gptq_v2", said, CheckpointError)
    for command in (
        ["convert", str(folder), str(tmp_path / "out"), "--to", "gguf"],
        ["generate", str(folder), "--prompt", "a"],
        ["eval", str(folder), "--data", "x"],
    ):
        assert main(command) == 3
        assert "is not finished; run its command again to resume it" in capsys.readouterr().err


def test_what_is_not_packed_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    refused(checkpoint("llama"), tmp_path / "out", "gptq", "is not quantized")


def test_a_folder_in_use_is_left_alone(made: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        convert(made("llama", "gptq"), tmp_path / "there", "gptq_v2")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("x")
    with pytest.raises(UsageError, match="not a staging folder"):
        convert(made("llama", "gptq"), tmp_path / "out", "gptq_v2")
    assert (tmp_path / "there" / "mine").read_text() == (tmp_path / "out.partial" / "mine").read_text() == "x"


def test_what_a_killed_conversion_left_is_cleared_away(made: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / MARK).touch()
    (tmp_path / "out.partial" / "half").write_text("x")
    (tmp_path / "out").mkdir()
    convert(made("llama", "gptq"), tmp_path / "out", "gptq_v2")
    assert not (tmp_path / "out.partial").exists()
    assert hashes(tmp_path / "out").keys() == hashes(made("llama", "gptq_v2")).keys()


KILLED = """
import os, sys
from pathlib import Path
from bigq.conversion import staging
from bigq.conversion.convert import convert
if sys.argv[1] == "before":
    staging.os.rename = lambda *names: os._exit(9)
else:
    Path.unlink = lambda self, missing_ok=False: os._exit(9) if self.name == staging.MARK else None
convert(*sys.argv[2:])
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_around_the_last_step_blocks_nothing(when: str, made: Callable[..., Path], child: Child, tmp_path: Path) -> None:
    """Before it has its name, the folder is made again; after that it is complete, and nobody's to clear away, whatever its name."""
    done = child("-c", KILLED, when, made("llama", "gptq"), tmp_path / "a.partial", "gptq_v2")
    assert done.returncode == 9, done.stderr
    if when == "before":
        assert [path.name for path in tmp_path.iterdir()] == ["a.partial.partial"]
        convert(made("llama", "gptq"), tmp_path / "a.partial", "gptq_v2")
        assert [path.name for path in tmp_path.iterdir()] == ["a.partial"]
        assert hashes(tmp_path / "a.partial").keys() == hashes(made("llama", "gptq_v2")).keys()
        return
    complete = hashes(tmp_path / "a.partial")
    assert complete.keys() == {*hashes(made("llama", "gptq_v2")), MARK}
    assert torch.equal(logits(tmp_path / "a.partial"), logits(made("llama", "gptq")))
    for out, said in ((tmp_path / "a.partial", "not empty"), (tmp_path / "a", "not a staging folder")):
        with pytest.raises(UsageError, match=said):
            convert(made("llama", "gptq"), out, "gptq_v2")
    assert hashes(tmp_path / "a.partial") == complete
    convert(tmp_path / "a.partial", tmp_path / "b", "gptq")
    assert MARK not in hashes(tmp_path / "b")


def test_a_place_that_cannot_be_looked_at_costs_nobody_a_folder(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made("llama", "gptq")
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("x")

    def forbidden(self: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(ResourceError, match="Permission denied"):
        convert(source, tmp_path / "out", "gptq_v2")
    assert (tmp_path / "out.partial" / "mine").read_text() == "x"


def test_an_empty_folder_behind_a_link_is_filled(made: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("there", "not there"):
        if name == "there":
            (tmp_path / name).mkdir()
        (tmp_path / f"link {name}").symlink_to(tmp_path / name)
        convert(made("llama", "gptq"), tmp_path / f"link {name}", "gptq_v2")
        assert (tmp_path / f"link {name}").is_symlink() and (tmp_path / name / "config.json").exists()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match="leads to itself"):
        convert(made("llama", "gptq"), tmp_path / "loop", "gptq_v2")


@pytest.mark.parametrize("to", ["gptq_v2", "gguf"])
def test_places_that_can_be_no_output(to: str, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    source = made("llama", "gptq")
    monkeypatch.chdir(here)
    before = hashes(source)
    places = [(".", "the current folder"), ("", "the current folder"), ("/", "the root of the file system")]
    places += [("..", "must be separate folders|not empty|exists already"), (str(source / "sub"), "must be separate folders")]
    places += [(str(source / "model.gguf"), "must be separate folders"), (str(source), "must be separate folders")]
    for out, said in places:
        with pytest.raises(UsageError, match=said):
            convert(source, out, to)
    assert hashes(source) == before and not (source / "sub").exists() and not [*here.iterdir()]
    assert [*tmp_path.iterdir()] == [here]


def test_a_disk_that_fills_up_leaves_nothing(made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def point(name: str) -> None:
        if name == "shard.piece":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.faults, "point", point)
    refused(made("llama", "gptq"), tmp_path / "out", "gptq_v2", "No space left.*free some space", ResourceError)


def test_a_disk_too_small_is_told_before(made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    refused(made("llama", "gptq"), tmp_path / "out", "gptq_v2", "needs about .* of disk space, but only 0.0 MiB are free", ResourceError)


def test_the_command_line(made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(made("llama", "gptq")), str(tmp_path / "out"), "--to", "compressed-tensors"]) == 0
    told = capsys.readouterr()
    assert "20 Linears, gptq → compressed-tensors" in told.out and "model-00001-of" in told.err
    assert main(["convert", str(made("llama", "gptq")), str(tmp_path / "out2"), "--to", "gptq_v2", "--quiet"]) == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "")
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "out2"), "--to", "gptq"]) == 2
