"""Model folders that mean harm: links out of them, absurd configs, tokenizers that are none, code without permission.

What might take memory or never end runs in a process of its own, with limits that the kernel keeps.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import ROOT, Child
from models import word_tokenizer

from bigq.cli.main import main
from bigq.data.tokenizer import load_tokenizer
from bigq.errors import BigqError, CalibrationError, CheckpointError, UnsupportedModelError
from bigq.io.containment import require_contained
from bigq.io.formats import read_schemes
from bigq.io.hub import resolve_headers, resolve_model
from bigq.model.config import check_config
from bigq.model.skeleton import build, load_config

#: Address space of a child, in GiB: what importing torch and transformers takes is 3 of them.
CHILD_GIB = 8
#: Runs command lines, which "--" separates, with a limit on address space; tells the seconds of each, and the most memory so far.
LIMITED = f"""
import resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, ({CHILD_GIB} * 2**30,) * 2)
import torch, transformers, bigq.sched.plan.inputs, bigq.sched.run
from bigq.cli.main import main
words = sys.argv[1:]
while words:
    end = words.index("--")
    line, words = words[:end], words[end + 1 :]
    started = time.monotonic()
    status = main(line)
    seconds = time.monotonic() - started
    print("STATUS", status, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)
"""


@pytest.fixture
def model(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "secret.json"
    path.parent.mkdir()
    path.write_text('{"model_type": "llama", "password": "123"}')
    return path


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# Links.


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "LICENSE", ".hidden", "sub/vocab.txt", "model.safetensors.index.json"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_out_of_the_folder_is_neither_read_nor_copied(
    model: Path, secret: Path, name: str, relative: bool, ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = model / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(secret, link.parent) if relative else secret)
    for resolve in (resolve_model, resolve_headers):
        with pytest.raises(CheckpointError, match=r"a link out of the model folder, to .*replace it by a copy of the file"):
            resolve(str(model))
    out = tmp_path / "out"
    assert main(["quantize", str(model), str(out), "--calibration", str(ids_file), "--samples", "2", "--seqlen", "16"]) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("bigq: error: ") and str(link) in line
    assert not out.exists()


def test_a_link_to_a_link_that_leads_out(model: Path, secret: Path) -> None:
    (model / "a").symlink_to(".git/b")
    (model / ".git").mkdir()
    (model / ".git" / "b").symlink_to(secret)
    with pytest.raises(CheckpointError, match="a: a link out of"):
        require_contained(model)


def test_a_link_to_a_neighbour_of_like_name(model: Path, secret: Path) -> None:
    neighbour = model.with_name(model.name + "-2")
    neighbour.mkdir()
    (model / "vocab.txt").symlink_to(shutil.copy(secret, neighbour / "vocab.txt"))
    with pytest.raises(CheckpointError, match=r"vocab\.txt: a link out of"):
        require_contained(model)


def test_a_link_to_a_folder_outside(model: Path, secret: Path) -> None:
    (model / "folder").symlink_to(secret.parent)
    with pytest.raises(CheckpointError, match="folder: a link out of"):
        require_contained(model)


def test_links_that_stay_are_followed(model: Path, tmp_path: Path) -> None:
    (model / "vocab.json").symlink_to("tokenizer.json")
    (model / "real").mkdir()
    (model / "alias").symlink_to("real")
    (model / "loop").symlink_to(".")
    (model / "gone").symlink_to("not-there")
    (model / ".git").mkdir()
    (model / ".git" / "out").symlink_to("/etc/passwd")
    assert resolve_model(str(model)) == model
    (tmp_path / "to-model").symlink_to(model)
    assert resolve_model(str(tmp_path / "to-model")) == tmp_path / "to-model"


def test_a_link_to_itself_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*link"):
        require_contained(model)


def cached(tmp_path: Path) -> tuple[Path, Path]:
    """A snapshot and the blobs of a hub cache."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    return snapshot, blobs


def test_snapshots_of_a_hub_cache_may_link_to_their_blobs(model: Path, tmp_path: Path) -> None:
    snapshot, blobs = cached(tmp_path)
    (snapshot / "sub").mkdir()
    for i, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
        (snapshot / "sub" / path.name).symlink_to(f"../../../blobs/{i}")
    require_contained(snapshot)
    assert load_config(resolve_model(str(snapshot))).model_type == "llama"


@pytest.mark.parametrize(
    "how", ["beside the blobs", "below the blobs", "another model", "through the blob", "blobs is a link", "no snapshot"]
)
def test_snapshots_may_link_to_nothing_else(how: str, secret: Path, tmp_path: Path) -> None:
    snapshot, blobs = cached(tmp_path)
    target: str | Path = "../../blobs/x"
    if how == "beside the blobs":
        shutil.copy(secret, blobs.parent / "x")
        target = "../../x"
    elif how == "below the blobs":
        (blobs / "deep").mkdir()
        shutil.copy(secret, blobs / "deep" / "x")
        target = "../../blobs/deep/x"
    elif how == "another model":
        other = blobs.parent.parent / "models--owner--other" / "blobs"
        other.mkdir(parents=True)
        target = shutil.copy(secret, other / "x")
    elif how == "through the blob":
        (blobs / "x").symlink_to(secret)
    elif how == "blobs is a link":
        blobs.rmdir()
        shutil.copy(secret, secret.parent / "x")
        blobs.symlink_to(secret.parent)
    else:
        snapshot = snapshot.parent.parent / "other" / "0123"
        snapshot.mkdir(parents=True)
        shutil.copy(secret, blobs / "x")
    (snapshot / "config.json").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"config\.json: a link out of the model folder"):
        require_contained(snapshot)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "pipe"])
def test_what_is_neither_file_nor_folder_is_refused_without_waiting(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(CheckpointError, match=f"{name}: neither a file nor a folder"):
        resolve_model(str(model))
    with pytest.raises(BigqError):
        load_config(model) if name == "config.json" else require_contained(model)


def test_a_socket_and_a_link_to_a_device_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    with pytest.raises(CheckpointError, match="socket: neither"):
        require_contained(model)
    (model / "socket").unlink()
    (model / "vocab.txt").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="link out of"):
        require_contained(model)


def test_names_of_files_are_told_in_one_line(model: Path) -> None:
    (model / "a\nb\x1b[31m\udcff").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError) as caught:
        require_contained(model)
    assert str(caught.value).isprintable()


# config.json.

ABSURD: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 10**9},
    "many layers": {"num_hidden_layers": 30_000},
    "hidden": {"hidden_size": 2**40},
    "positions": {"max_position_embeddings": 10**12},
    "vocabulary": {"vocab_size": 10**15},
    "heads": {"num_attention_heads": 10**9, "num_key_value_heads": 10**9},
    "head size": {"head_dim": 2**60},
    "labels": {"num_labels": 10**9},
    "intermediate": {"intermediate_size": 2**63},
    "huge number": {"num_hidden_layers": 10**300},
    "number as text": {"num_hidden_layers": "1000000000"},
    "infinite": {"hidden_size": float("inf"), "num_hidden_layers": float("nan")},
    "list for number": {"hidden_size": [64]},
    "number for list": {"eos_token_id": {"a": [1]}, "layer_types": 3},
    "layer types": {"layer_types": ["full_attention"] * 200_000},
    "nested": {"rope_parameters": {"rope_type": {"a": 1}, "rope_theta": []}},
    "rope": {"rope_parameters": {"rope_type": "no/such\u0000", "rope_theta": 1e4}},
    "surrogates": {"model_type": "\ud800", "hidden_act": "\udfff"},
    "surrogate in text": {"hidden_act": "\ud800"},
    "path as type": {"model_type": "../../etc/passwd"},
    "type with newline": {"model_type": "x\ny\x1b[2J"},
    "code elsewhere": {"auto_map": {"AutoConfig": "evil/repo--x.Y"}, "model_type": "evil"},
    "auto_map number": {"auto_map": 3},
    "auto_map text": {"auto_map": "AutoConfig"},
    "auto_map list": {"auto_map": ["AutoConfig"], "model_type": "evil"},
    "nested code": {"text_config": {"auto_map": {"AutoModel": "evil/repo--x.Y"}}},
    "architectures": {"architectures": {"a": 1}, "hidden_size": 63},
    "dtype": {"dtype": "nn"},
    "dtype object": {"dtype": {"": "float16\ud800"}},
    "dtype list": {"dtype": ["float16"]},
    "quantized by text": {"quantization_config": "gptq"},
    "quantized by list": {"quantization_config": [1]},
    "quantized by nothing": {"quantization_config": {}},
    "quantized by surrogate": {"quantization_config": {"quant_method": "\ud800\n"}},
    "quantized though it is not": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "dropout": {"attention_dropout": -1},
}


@pytest.mark.parametrize("kind", ABSURD)
def test_an_absurd_config_is_refused(kind: str, model: Path, ids_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    change(model / "config.json", **ABSURD[kind])
    out = tmp_path / "out"
    assert (
        main(["quantize", str(model), str(out), "--calibration", str(ids_file), "--samples", "2", "--seqlen", "16", "--device", "cpu"]) == 3
    )
    reading, *said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert (
        reading.startswith("reading ")
        and len(said) == 1
        and said[0].startswith("bigq: error: ")
        and said[0].isprintable()
        and len(said[0]) < 1000
    )
    assert not out.exists()


def test_code_below_the_top_of_a_config_needs_the_flag() -> None:
    for config in ({"text_config": {"auto_map": {}}}, {"a": [{"b": {"auto_map": 3}}]}):
        with pytest.raises(UnsupportedModelError, match="--trust-remote-code"):
            check_config(Path("config.json"), config, trust_remote_code=False)
        check_config(Path("config.json"), config, trust_remote_code=True)


#: Those that transformers would act on at once, for several families; with no weights beside the config there is nothing to compare with.
EXPENSIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "layers": ("llama", {"num_hidden_layers": 32_768}),
    "layer types": ("gemma3", {"num_hidden_layers": 32_768, "layer_types": None}),
    "labels": ("gpt2", {"num_labels": 2**40}),
    "sinusoids": ("codegen", {"n_positions": 2**24, "n_ctx": 2**24, "rotary_dim": 64, "n_embd": 64, "n_head": 1, "n_layer": 1}),
    "rotary": ("gptj", {"n_positions": 2**27, "rotary_dim": 2**26, "n_embd": 2**26, "n_head": 1, "n_layer": 1}),
    "mask": ("gpt_neo", {"max_position_embeddings": 2**20, "num_layers": 1, "attention_types": [[["global"], 1]]}),
    "head": ("llama", {"head_dim": 2**27, "num_hidden_layers": 1}),
}


def test_what_an_absurd_config_takes_is_bounded(checkpoint: Callable[[str], Path], child: Child, tmp_path: Path) -> None:
    """All in one process, which is the same bound on memory for each."""
    lines: list[str | Path] = []
    for kind, (family, values) in EXPENSIVE.items():
        known = family in ("llama", "gemma3", "gpt2")
        config = json.loads((checkpoint(family) / "config.json").read_text()) if known else {"model_type": family}
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | values))
        lines += ["plan", folder, tmp_path, "--device", "cpu", "--on", "h100", "--group-size", "32", "--"]
    done = child("-c", LIMITED, *lines, timeout=60 * len(EXPENSIVE))
    assert "Traceback" not in done.stderr, done.stderr
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("STATUS ")]
    assert len(found) == len(EXPENSIVE), done.stdout + done.stderr
    for kind, (status, seconds, peak) in zip(EXPENSIVE, found, strict=True):
        assert status in ("0", "3", "4") and float(seconds) < 60 and float(peak) < 3 * 2**30, (kind, done.stdout, done.stderr)


def test_sizes_of_published_models_are_taken(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A vocabulary of 262,208, ten million positions, a base of 10¹¹."""
    import torch

    large = {"vocab_size": 262_208, "max_position_embeddings": 10_485_760, "hidden_size": 16_384, "intermediate_size": 53_248}
    config = json.loads((checkpoint("llama") / "config.json").read_text())
    heads = {"num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 126}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10**11}}
    (tmp_path / "config.json").write_text(json.dumps(config | large | heads | rope))
    model = build(load_config(tmp_path), torch.bfloat16)
    assert sum(1 for _ in model.parameters()) > 126 * 9


@pytest.mark.parametrize("asked", ["evil/kernels", "flash_attention_2", {"": "evil/kernels:f"}, 3])
def test_attention_code_of_a_hub_is_not_asked_for(asked: Any, model: Path) -> None:
    import torch

    for name in ("attn_implementation", "_attn_implementation"):
        change(model / "config.json", **{name: asked})
        config = load_config(model)
        assert config._attn_implementation is None
        assert build(config, torch.float32).config._attn_implementation == "sdpa"


# quantization_config.

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}


@pytest.mark.parametrize(
    "values",
    [
        {"bits": "4"},
        {"bits": True},
        {"bits": 5},
        {"bits": 2**70},
        {"group_size": 7},
        {"group_size": 32.0},
        {"sym": 1},
        {"dynamic": [1]},
        {"dynamic": {"+:x": [1]}},
        {"dynamic": {"+:x": {"bits": "8"}}},
        {"dynamic": {"+:x": {"group_size": 3}}},
        {"dynamic": {"+:(": {"bits": 8}}},
        {"dynamic": {"-:(a+)+$": {}}},
        {"dynamic": {"-:(.|.)*x": {}}},
        {"dynamic": {"-:" + ".*" * 9 + "x": {}}},
        {"dynamic": {"-:" + "a" * 2000: {}}},
        {"dynamic": {"-:\ud800(": {}}},
    ],
    ids=str,
)
def test_a_quantization_config_of_nonsense_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="quantization_config") as caught:
        read_schemes(Path("config.json"), GPTQ | values)
    assert str(caught.value).isprintable()


def test_a_quantization_config_without_numbers_is_refused() -> None:
    with pytest.raises(CheckpointError, match="bits or group_size is missing"):
        read_schemes(Path("config.json"), {"quant_method": "gptq"})


def test_what_other_writers_say_of_a_module_is_passed_over() -> None:
    said = GPTQ | {"dynamic": {r"+:.*\.1\..*": {"bits": 8, "desc_act": True, "damp_percent": 0.1}, r"-:.*lm_head": {}}}
    schemes = read_schemes(Path("config.json"), said)
    assert (schemes.scheme("layers.1.x").bits, schemes.scheme("layers.2.x").bits, schemes.format.name) == (8, 4, "gptq")
    with pytest.raises(CheckpointError, match="lm_head is packed, but"):
        schemes.scheme("lm_head")


# Tokenizers.


@pytest.mark.parametrize(
    "name",
    ["RagRetriever", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor", "pipeline", "Trainer", "../x", "", 3, []],
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_class_that_is_no_tokenizer_is_refused(name: Any, file: str, model: Path) -> None:
    change(model / file, tokenizer_class=name)
    with pytest.raises(CalibrationError, match="tokenizer_class"):
        load_tokenizer(model)


def test_what_transformers_exports_is_not_taken_for_a_tokenizer(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes anything of that name. RagRetriever, for one, unpickles, where the packages that it needs are there."""
    ran = []

    class Unpickler:
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> None:
            ran.append(args)

    monkeypatch.setattr(sys.modules["transformers"], "Unpickler", Unpickler, raising=False)
    change(model / "config.json", model_type="gpt2")
    change(model / "tokenizer_config.json", tokenizer_class="Unpickler")
    transformers.AutoTokenizer.from_pretrained(model)
    assert len(ran) == 1, "what bigq keeps off is not there any more"
    with pytest.raises(CalibrationError, match="'Unpickler' is not a tokenizer"):
        load_tokenizer(model)
    assert len(ran) == 1


def test_no_pickle_is_opened_for_a_tokenizer(model: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    attack = f"cos\nsystem\n(S'touch {ran}'\ntR.".encode()
    for name in (
        "psgs_w100.tsv.pkl",
        "hf_bert_base.hnswSQ8_correct_phi_128.c_index.index_meta.dpr",
        "pytorch_model.bin",
        "vocab.bin",
        "vocab.pkl",
    ):
        (model / name).write_bytes(attack)
    for name in ("RagRetriever", "TransfoXLTokenizer", "TransfoXLCorpus", "NoSuchTokenizer"):
        change(model / "tokenizer_config.json", tokenizer_class=name)
        with contextlib.suppress(CalibrationError):
            load_tokenizer(model)
    assert not ran.exists()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_names_no_file_outside_the_folder(file: str, model: Path, secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "special_tokens_map.json").write_text("{}")
    monkeypatch.chdir(secret.parent)
    for key in ("vocab_file", "tokenizer_file", "gguf_file", "vocab"):
        for value in (str(secret), "secret.json", "../elsewhere/secret.json", [str(secret)]):
            (model / file).write_text(json.dumps({key: value}))
            with pytest.raises(CalibrationError, match=r"names a file outside the model's folder"):
                load_tokenizer(model)
    (model / file).write_text(json.dumps({"vocab_file": "/home/of/the/author/vocab.json", "tokenizer_file": str(model / "tokenizer.json")}))
    load_tokenizer(model)


def test_code_of_a_tokenizer_does_not_run_unasked(model: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Evil\n")
    change(model / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    with pytest.raises(CalibrationError, match="tokenizer cannot be loaded"):
        load_tokenizer(model)
    assert not ran.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "null",
        '{"version": "1.0"}',
        "[" * 10000,
        '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["a", "b"]]}}',
        '{"model": {"type": "Unigram", "vocab": [], "unk_id": 99}}',
        '{"model": {"type": "WordPiece", "vocab": {}, "unk_token": "x", "max_input_chars_per_word": 1e99}}',
    ],
)
def test_a_damaged_tokenizer_is_told(text: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (model / "tokenizer.json").write_text(text)
    (tmp_path / "text.txt").write_text("some words\n" * 100)
    from bigq.calibration import calibration_rows

    with pytest.raises(CalibrationError) as caught:
        calibration_rows(str(tmp_path / "text.txt"), model, samples=1, seqlen=8, seed=0)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["[]", "{", "null", '{"a":' * 500 + "1" + "}" * 500, '{"init_inputs": 3}', '{"added_tokens_decoder": 3}'])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_damaged_settings_of_a_tokenizer_are_told(text: str, file: str, model: Path) -> None:
    (model / file).write_text(text)
    said = None
    try:
        load_tokenizer(model)
    except CalibrationError as error:
        said = str(error)
    assert said is None or (said.isprintable() and str(model) in said)


# Sources.


def dangerous(source: str) -> list[str]:
    """Calls and imports in a source that run or unpickle what they are given."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [
                m
                for m in modules
                if m.partition(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
                or (m.partition(".")[0] == "yaml" and isinstance(node, ast.ImportFrom))
            ]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in ("eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "os.system", "os.popen"):
                found.append(name)
            # Of YAML, only nodes are read, which are texts.
            if name.startswith("yaml.") and name not in ("yaml.compose", "yaml.dump"):
                found.append(name)
            if name.rpartition(".")[2] in ("read_pickle", "loads") and not name.startswith("json."):
                found.append(name)
            if options.get("allow_pickle", "False") != "False" or options.get("shell", "False") != "False":
                found.append(f"{name}({options})")
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "bigq").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_bigq_unpickles_and_evaluates_nothing(path: Path) -> None:
    assert dangerous(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "import shelve",
        "def f():\n    from yaml import load",
        "torch.load(p)",
        "torch.load(p, weights_only=True)",
        "eval('1')",
        "exec(s)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(f)",
        "subprocess.run(s, shell=True)",
        "pickle.loads(b)",
    ],
)
def test_what_unpickles_or_evaluates_is_found(source: str) -> None:
    assert dangerous(source)


@pytest.mark.parametrize(
    "source", ["json.loads(s)", "np.load(p, allow_pickle=False)", "model.eval()", "re.compile(p)", "load(p)", "# pickle"]
)
def test_what_only_sounds_like_it_is_not(source: str) -> None:
    assert not dangerous(source)
