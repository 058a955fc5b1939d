"""What a resumed job may be asked for: the table of changes, comparing requests, gathering one."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bigq
from bigq.cli.commands import build_parser
from bigq.config import FROZEN_FIELDS, JobConfig
from bigq.errors import CheckpointError, UsageError
from bigq.job import request as request_module
from bigq.job.request import CHANGES, code_hashes, compare, make_request
from bigq.options import Resume, table
from bigq.scheme import QuantScheme, Rule

OUT = Path("the/OUT")
SETTINGS = {
    "scheme": {
        "bits": 4,
        "group_size": 128,
        "symmetric": True,
        "order": "natural",
        "damping": 0.01,
        "scales": "minmax",
        "sweeps": 1,
        "min_zero": 0,
        "points": "int",
        "scale_form": "fp16",
        "scale_bits": 11,
    },
    "rules": [{"pattern": "a.*", "overrides": None}, {"pattern": "b", "overrides": {"bits": 8, "sym": False}}],
    "bits_per_weight": None,
    "chosen_rules": 0,
    "method": "gptq",
    "alpha": 0.5,
    "format": "gptq",
    "input_scales": "dynamic",
    "lm_head": False,
    "attention": "model",
    "rotate": False,
    "tune_steps": 0,
    "fold": None,
    "allow_partial": False,
    "true_sequential": True,
    "calibration": "/texts/a.txt",
    "text_field": None,
    "samples": 128,
    "seqlen": 2048,
    "seed": 0,
    "batch": 8,
    "experts_at_once": None,
    "push": None,
    "push_drop": False,
    "dtype": "auto",
    "trust_remote_code": True,
    "on_nonfinite": "stop",
}
BEFORE: dict[str, Any] = {
    "settings": SETTINGS,
    "source": "a" * 64,
    "config": "b" * 64,
    "calibration_tokens": "c" * 64,
    "remote_code": True,
    "code": {"modeling_x.py": "d" * 64, "sub/part.py": "e" * 64},
    "versions": {
        "bigq": "0.1.0",
        "torch": "2.11.0",
        "transformers": "5.20.0",
        "tokenizers": "0.22",
        "python": "3.11.7",
        "triton": None,
        "numba": None,
    },
    "machine": {"device": "cpu", "name": "A CPU x86_64 (AVX512)", "torch_threads": 2, "ranks": 2},
}

#: What is changed (the place in the request, the new value) → everything that the message must hold.
REFUSED: list[tuple[str, Any, list[str]]] = [
    ("settings.scheme.bits", 3, ["--bits 3: ", "begun with --bits 4;", "options that are not given keep their values"]),
    ("settings.scheme.group_size", -1, ["--group-size -1: ", "with --group-size 128;"]),
    ("settings.scheme.symmetric", False, ["--asym: ", "with --sym;"]),
    ("settings.scheme.order", "activation", ["--order activation: ", "with --order natural;"]),
    ("settings.scheme.damping", 0.02, ["--damping 0.02: ", "with --damping 0.01;"]),
    ("settings.scheme.scales", "search", ["--scales search: ", "with --scales minmax;"]),
    ("settings.scheme.sweeps", 3, ["--sweeps 3: ", "with --sweeps 1;"]),
    ("settings.scheme.min_zero", 1, ["min_zero 1: ", "with min_zero 0;"]),
    ("settings.scheme.points", "nf4", ["points nf4: ", "with points int;"]),
    ("settings.scheme.scale_form", "nested", ["scale_form nested: ", "with scale_form fp16;"]),
    ("settings.rules", [], ["no --rule and no --skip: ", "with --skip 'a.*' --rule 'b:bits=8,sym=false';"]),
    ("settings.rules", [{"pattern": "c", "overrides": {"damping": 0.5}}], ["--rule 'c:damping=0.5': ", "with --skip 'a.*' --rule "]),
    ("settings.method", "rtn", ["--method rtn: ", "with --method gptq;"]),
    ("settings.lm_head", True, ["--lm-head: ", "with --no-lm-head;"]),
    ("settings.input_scales", "static", ["--input-scales static: ", "with --input-scales dynamic;"]),
    ("settings.rotate", True, ["--rotate: ", "with --no-rotate;"]),
    ("settings.attention", "fused", ["--attention fused: ", "with --attention model;"]),
    ("settings.fold", "awq", ["--fold awq: ", "with no --fold;"]),
    ("settings.tune_steps", 8, ["--tune-steps 8: ", "with --tune-steps 0;"]),
    ("settings.bits_per_weight", 3.5, ["--bits-per-weight 3.5: ", "with no --bits-per-weight;"]),
    ("settings.alpha", 0.25, ["--alpha 0.25: ", "with --alpha 0.5;"]),
    ("settings.format", "gptq_v2", ["--format gptq_v2: ", "with --format gptq;"]),
    ("settings.scheme.scale_bits", 8, ["--scale-bits 8: ", "with --scale-bits 11;"]),
    ("settings.true_sequential", False, ["--no-true-sequential: ", "with --true-sequential;"]),
    ("settings.samples", 64, ["--samples 64: ", "with --samples 128;"]),
    ("settings.seqlen", 1024, ["--seqlen 1024: ", "with --seqlen 2048;"]),
    ("settings.seed", 1, ["--seed 1: ", "with --seed 0;"]),
    ("settings.dtype", "float32", ["--dtype float32: ", "with --dtype auto;"]),
    ("settings.trust_remote_code", False, ["--no-trust-remote-code: ", "with --trust-remote-code;"]),
    ("source", "f" * 64, ["MODEL: ", "shards", "was aaaaaaaaaaaa when", "is ffffffffffff now"]),
    ("config", "f" * 64, ["MODEL: ", "config.json", "was bbbbbbbbbbbb when", "is ffffffffffff now"]),
    ("remote_code", False, ["MODEL: ", "code", "was true when", "is false now"]),
    ("code", {"modeling_x.py": "d" * 64, "sub/part.py": "f" * 64}, ["MODEL: its sub/part.py was eeeeeeeeeeee when", "is ffffffffffff now"]),
    ("code", {"modeling_x.py": "d" * 64}, ["its sub/part.py was eeeeeeeeeeee when", "is not there now"]),
    ("code", {**BEFORE["code"], "new.py": "f" * 64}, ["its new.py was not there when", "is ffffffffffff now"]),
    ("calibration_tokens", "f" * 64, ["--calibration: ", "tokens", "was cccccccccccc when", "is ffffffffffff now"]),
    ("calibration_tokens", None, ["--calibration: ", "is not there now"]),
]
WARNED: list[tuple[str, Any, str]] = [
    ("settings.batch", 4, "--batch was 8 when the job was begun, is 4 now"),
    ("settings.batch", None, "--batch was 8 when the job was begun, is as many rows as fit now"),
    ("settings.experts_at_once", 4, "--experts-at-once was not there when the job was begun, is 4 now"),
    ("machine.device", "cuda", "--device was cpu when the job was begun, is cuda now"),
    ("machine.name", "B", "the processor was A CPU x86_64 (AVX512) when the job was begun, is B now"),
    ("machine.ranks", 4, "the number of processes was 2 when the job was begun, is 4 now"),
    ("machine.torch_threads", 16, "the number of CPU threads was 2 when the job was begun, is 16 now"),
    ("versions.bigq", "0.2.0", "bigq was 0.1.0 when the job was begun, is 0.2.0 now"),
    ("versions.torch", "2.13.0", "torch was 2.11.0 when the job was begun, is 2.13.0 now"),
    ("versions.transformers", "5.23.0", "transformers was 5.20.0 when the job was begun, is 5.23.0 now"),
    ("versions.triton", "3.9.0", "triton was not there when the job was begun, is 3.9.0 now"),
    ("versions.numba", "0.68.1", "numba was not there when the job was begun, is 0.68.1 now"),
    ("versions.python", "3.12.0", "Python was 3.11.7 when the job was begun, is 3.12.0 now"),
]
FREE: list[tuple[str, Any]] = [
    ("settings.calibration", "/elsewhere/b.txt"),
    ("settings.text_field", "body"),
    ("settings.on_nonfinite", "skip"),
    ("settings.allow_partial", True),
    ("settings.chosen_rules", 1),
    ("settings.push", "owner/name"),
    ("settings.push_drop", True),
    ("versions.tokenizers", "0.23"),
]


def changed(name: str, value: Any, request: dict[str, Any] = BEFORE) -> dict[str, Any]:
    """A request with one part replaced."""
    whole = copy.deepcopy(request)
    *folders, last = name.split(".")
    place = whole
    for folder in folders:
        place = place[folder]
    place[last] = value
    return whole


def without(name: str) -> dict[str, Any]:
    whole = copy.deepcopy(BEFORE)
    *folders, last = name.split(".")
    place = whole
    for folder in folders:
        place = place[folder]
    del place[last]
    return whole


def recorded(may: Resume) -> set[str]:
    return {name for name, change in CHANGES.items() if change.may is may and change.recorded}


# The table.


def test_the_cases_below_are_all_of_the_table() -> None:
    assert {name for name, _, _ in REFUSED} == recorded(Resume.REFUSED)
    assert {name for name, _, _ in WARNED} == recorded(Resume.WARNED)
    assert {name for name, _ in FREE} == recorded(Resume.FREE)


def test_every_setting_is_in_the_table_and_nothing_else() -> None:
    """Every field of JobConfig or QuantScheme has its place: it may change or it may not."""
    settings = {f"settings.{name}" for name in FROZEN_FIELDS if name != "scheme"}
    settings |= {f"settings.scheme.{f.name}" for f in dataclasses.fields(QuantScheme)}
    assert {name for name in CHANGES if name.startswith("settings.")} == settings
    others = {f.name for f in dataclasses.fields(JobConfig)} - set(FROZEN_FIELDS)
    not_recorded = {name for name, change in CHANGES.items() if not change.recorded}
    assert not_recorded == others - {"device"} | {"model"}, "of the device, what it came to be is recorded"
    assert all(CHANGES[name].may is Resume.FREE for name in not_recorded)


def test_flags_of_the_table_are_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["quantize", "--help"])
    words = set(capsys.readouterr().out.replace(",", " ").split())
    said = {part.partition(":")[0] for change in CHANGES.values() if change.said.startswith("--") for part in change.said.split("/")}
    declared = [*table(JobConfig).values(), *table(QuantScheme).values()]
    typed = {word for each in declared if each.flag and each.types == (bool,) for value in (True, False) for word in each.words(value)}
    typed.discard("")  # of a switch without an opposite
    assert said and said | typed <= words


# Comparing.


def test_the_same_request_is_taken_up_without_a_word() -> None:
    assert compare(OUT, BEFORE, BEFORE) == []


@pytest.mark.parametrize(("name", "value", "says"), REFUSED, ids=[f"{name} {value!r:.12}" for name, value, _ in REFUSED])
def test_refused(name: str, value: Any, says: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        compare(OUT, BEFORE, changed(name, value))
    message = str(caught.value)
    for part in [*says, str(OUT), "choose another folder"]:
        assert part in message, message
    assert "\n" not in message


@pytest.mark.parametrize(("name", "value", "says"), WARNED, ids=[f"{name} {value!r}" for name, value, _ in WARNED])
def test_warned(name: str, value: Any, says: str) -> None:
    assert compare(OUT, BEFORE, changed(name, value)) == [f"{says}: blocks from here on may round differently"]


@pytest.mark.parametrize(("name", "value"), FREE)
def test_free(name: str, value: Any) -> None:
    assert compare(OUT, BEFORE, changed(name, value)) == []


def test_what_is_refused_comes_before_what_is_warned_of_and_all_warnings_are_given() -> None:
    now = changed("versions.torch", "2.13.0", changed("settings.batch", 4))
    assert [line.split()[0] for line in compare(OUT, BEFORE, now)] == ["--batch", "torch"]
    with pytest.raises(UsageError, match="--seed 1"):
        compare(OUT, BEFORE, changed("settings.seed", 1, now))


def test_to_a_gpu_and_back() -> None:
    """Threads count on a CPU only."""
    gpu = changed("machine", {"device": "cuda", "name": "A GPU"})
    for one, other in ((BEFORE, gpu), (gpu, BEFORE)):
        assert [line.split(" was ")[0] for line in compare(OUT, one, other)] == ["--device", "the processor"]


#: Settings that are newer than others.
ADDED = (
    "settings.text_field",
    "settings.attention",
    "settings.input_scales",
    "settings.rotate",
    "settings.tune_steps",
    "settings.fold",
    "settings.experts_at_once",
    "settings.allow_partial",
    "settings.push",
    "settings.push_drop",
    "settings.bits_per_weight",
    "settings.chosen_rules",
    "settings.scheme.points",
    "settings.scheme.scale_form",
)


@pytest.mark.parametrize("name", ADDED)
def test_a_setting_that_older_jobs_lack_had_its_default(name: str) -> None:
    assert compare(OUT, without(name), BEFORE) == []


@pytest.mark.parametrize(
    "name",
    [name for name, change in CHANGES.items() if change.recorded and not change.optional and name not in ADDED],
)
def test_a_missing_part_is_told(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{OUT}: its job.json: {name} is missing; .*begin the job again"):
        compare(OUT, without(name), BEFORE)


@pytest.mark.parametrize(
    ("before", "says"),
    [
        (None, "it is not an object"),
        ([], "it is not an object"),
        ({}, "is missing"),
        (changed("settings", "x"), "settings is not an object"),
        (changed("settings.scheme", None), "settings.scheme is not an object"),
        (changed("versions", []), "versions is not an object"),
        (changed("code", ["a.py"]), "code is not an object"),
        (changed("settings.colour", "red"), "settings.colour is not known"),
        (changed("weather", "fine"), "weather is not known"),
        (without("versions"), "another version of bigq"),
        (changed("versions.bigq", "9.9.9", changed("settings.colour", "red")), "settings.colour is not known; bigq 9.9.9 began the job"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_is_none_is_told(before: Any, says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        compare(OUT, before, BEFORE)
    assert says in str(caught.value) and str(caught.value).startswith(f"{OUT}: its job.json: ")


def places(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, part in value.items():
            here = f"{name}.{key}".lstrip(".")
            yield here
            if ".py" not in str(part):
                yield from places(part, here)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(["bits", "pattern"]), inner, max_size=3)
    ),
    max_leaves=5,
)
PLACES = [name for name in places(BEFORE) if not name.startswith("code.")]


@given(name=st.sampled_from(PLACES), value=ANYTHING)
def test_whatever_stands_in_job_json_is_told_in_our_terms(name: str, value: Any) -> None:
    before = changed(name, value)
    with contextlib.suppress(UsageError, CheckpointError):
        assert all(isinstance(line, str) for line in compare(OUT, before, BEFORE))
    with contextlib.suppress(CheckpointError):
        assert isinstance(JobConfig.from_frozen(before["settings"]), JobConfig)


# Gathering.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What of a model's folder decides a request."""
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "x"}')
    (model / "modeling_x.py").write_text("x = 1")
    (model / "sub" / "part.py").write_text("y = 2")
    (model / "notes.txt").write_text("z")
    return model


def gathered(folder: Path, rows: torch.Tensor | None = None, **settings: Any) -> dict[str, Any]:
    return make_request(JobConfig(**{"seqlen": 4, "batch": 2, **settings}), folder, "f" * 64, rows, torch.device("cpu"))


def test_a_request_survives_its_file(folder: Path) -> None:
    rows = torch.arange(8).view(2, 4)
    made = gathered(folder, rows, rules=(Rule("a", None), Rule.parse("b:bits=8")))
    read = json.loads(json.dumps(made))
    assert read == made and compare(OUT, read, made) == []
    assert JobConfig.from_frozen(read["settings"]).rules == (Rule("a", None), Rule("b", {"bits": 8}))
    assert made["versions"]["bigq"] == bigq.__version__ and made["versions"]["torch"] == torch.__version__
    assert made["config"] == hashlib.sha256(b'{"model_type": "x"}').hexdigest()


def test_a_package_that_is_not_there_has_no_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_module, "PACKAGES", ("torch", "no-such-package"))
    assert gathered(folder)["versions"]["no-such-package"] is None


def test_tokens_and_config_count(folder: Path) -> None:
    rows = torch.arange(8).view(2, 4)
    before = gathered(folder, rows)
    with pytest.raises(UsageError, match=r"--calibration: .*tokens"):
        compare(OUT, before, gathered(folder, rows.flip(0)))
    (folder / "config.json").write_text('{"model_type": "y"}')
    with pytest.raises(UsageError, match=r"config\.json"):
        compare(OUT, before, gathered(folder, rows))


def test_code_counts_where_it_is_run(folder: Path) -> None:
    assert gathered(folder)["code"] == {}
    before = gathered(folder, trust_remote_code=True)
    assert list(before["code"]) == ["modeling_x.py", "sub/part.py"]
    (folder / "sub" / "part.py").write_text("y = 3")
    assert compare(OUT, gathered(folder), gathered(folder)) == []
    with pytest.raises(UsageError, match=r"its sub/part\.py was"):
        compare(OUT, before, gathered(folder, trust_remote_code=True))


def test_a_file_that_cannot_be_read_is_told(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        gathered(folder)
    assert set(code_hashes(folder)) == {"modeling_x.py", "sub/part.py"}


def test_threads_count_on_a_cpu(folder: Path, one_thread: None) -> None:
    before = gathered(folder)
    torch.set_num_threads(3)
    assert len(compare(OUT, before, gathered(folder))) == 1
    assert before["machine"]["device"] == "cpu" and os.uname().machine in before["machine"]["name"]


def test_a_processor_that_is_not_told_is_its_architecture(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    assert request_module._processor(cpuinfo) == os.uname().machine
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A CPU: fast\nprocessor\t: 1\nmodel name\t: B\n")
    assert request_module._processor(cpuinfo) == f"A CPU: fast {os.uname().machine}"


def test_the_path_of_the_text_is_kept_whole(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job may be taken up from another working directory, without naming the text again."""
    monkeypatch.chdir(tmp_path)
    assert gathered(folder, calibration="texts/a.txt")["settings"]["calibration"] == str(tmp_path / "texts" / "a.txt")
    for named in ("c4", "builtin"):
        assert gathered(folder, calibration=named)["settings"]["calibration"] == named
