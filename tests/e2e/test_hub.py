"""Models and calibration text from the hub: huggingface_hub's real client against a server of our own on 127.0.0.1."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Child
from fake_hub.server import COMMIT, Hub
from models import SEQLEN, stored_tensors, word_tokenizer
from safetensors.torch import save_file
from texts import ids_of, save_lines, tokenizer_folder, words

from bigq.calibration import calibration_rows, evaluation_rows
from bigq.cli.main import main
from bigq.data.spec import HUB_TEXTS

#: Files of the repository that are not to be fetched: no shards of its index, or in folders of their own.
OTHERS = (
    "pytorch_model.bin",
    "consolidated.safetensors",
    "model-extra.safetensors",
    "tiny.gguf",
    "onnx/model.onnx",
    "onnx/config.json",
    "original/params.json",
    "original/consolidated.safetensors",
    "original/tokenizer.model",
)
C4 = ("datasets/allenai/c4", "en/c4-train.00000-of-01024.json.gz")


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return hub.environment(tmp_path / "hf")


@pytest.fixture
def repository(checkpoint: Callable[[str], Path], hub: Hub, tmp_path: Path) -> Path:
    """A model on the hub, as "owner/tiny": shards, config, tokenizer, card, and the same weights in other files, which nobody needs."""
    folder = tmp_path / "repository"
    shutil.copytree(checkpoint("llama"), folder)
    word_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("a card")
    (folder / "LICENSE").write_text("terms")
    for name in OTHERS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((2).to_bytes(8, "little") + b"{}" if name.endswith(".safetensors") else b"{}")
    hub.repositories["owner/tiny"] = folder
    return folder


def shards_of(folder: Path) -> set[str]:
    """File names of the shards that the index names."""
    return set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())


def arguments(model: str, out: Path, calibration: str | Path) -> list[str]:
    flags = ["--samples", "16", "--seqlen", str(SEQLEN), "--group-size", "32", "--device", "cpu", "--quiet"]
    return ["-m", "bigq", "quantize", model, str(out), "--calibration", str(calibration), *flags]


def quantize_here(model: Path, out: Path, calibration: Path) -> None:
    """The same job on local files, in this process."""
    assert main(arguments(str(model), out, calibration)[2:]) == 0


@pytest.mark.long
def test_quantize_from_the_hub_and_again_offline(
    repository: Path, hub: Hub, environment: dict[str, str], ids_file: Path, child: Child, tmp_path: Path
) -> None:
    """The same output as from a local folder. Pickles are never fetched. Once fetched, the hub is not needed."""
    out, again, local = (tmp_path / name for name in ("out", "again", "local"))
    done = child(*arguments("owner/tiny", out, ids_file), env=environment)
    assert done.returncode == 0, done.stderr
    fetched = hub.fetched()
    shards = shards_of(repository)
    assert len(shards) > 2
    wanted = {"config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "LICENSE", "README.md"}
    assert shards | wanted <= fetched
    assert not fetched & set(OTHERS)

    done = child(*arguments("owner/tiny", again, ids_file), env={**environment, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.returncode == 0, done.stderr
    quantize_here(repository, local, ids_file)
    names = sorted(p.name for p in out.iterdir() if p.is_file())
    assert {"config.json", "tokenizer.json", "LICENSE"} <= set(names)
    for name in names:
        assert (out / name).read_bytes() == (again / name).read_bytes(), name
        assert (out / name).read_bytes() == (local / name).read_bytes(), name
    assert any(name.endswith(".qweight") for name in stored_tensors(out))


def test_a_plan_fetches_config_and_headers_only(
    repository: Path, hub: Hub, environment: dict[str, str], child: Child, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same plan as for the folder itself. Headers here are a few KiB; hardly more than those are fetched of each shard."""
    flags = ["--json", "--seqlen", "32", "--samples", "4", "--group-size", "32", "--device", "cpu"]
    done = child("-m", "bigq", "plan", "owner/tiny", *flags, env=environment)
    assert done.returncode == 0, done.stderr
    capsys.readouterr()
    assert main(["plan", str(repository), *flags]) == 0
    plans = [json.loads(text) for text in (done.stdout, capsys.readouterr().out)]
    for name in ("blocks", "rows", "seqlen", "activations", "batch", "written_bytes", "read_bytes"):
        assert plans[0][name] == plans[1][name], name
    assert [[p["phase"], p["flops"]] for p in plans[0]["phases"]] == [[p["phase"], p["flops"]] for p in plans[1]["phases"]]
    shards = shards_of(repository)
    assert plans[0]["fetch"]["way"] == "download"
    assert plans[0]["fetch"]["bytes"] == sum((repository / shard).stat().st_size for shard in shards)
    assert plans[1]["fetch"] is None and plans[0]["disk_bytes"] == plans[1]["disk_bytes"] + plans[0]["fetch"]["bytes"]
    assert len(hub.ranges) >= len(shards)
    whole = {line for line in hub.requests if line.startswith("GET") and line.endswith(".safetensors")}
    assert len(whole) <= len(shards)
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    assert not any(name.endswith(("tokenizer.json", ".bin", "README.md")) for name in hub.fetched())


BEFORE_FETCH = """
import sys
from pathlib import Path
from bigq.config import JobConfig
from bigq.errors import BigqError
from bigq.io.hub import resolve_model
from bigq.scheme import QuantScheme
from bigq.sched.plan.inputs import plan_before_fetch
model, out, disk, rule, fetch = sys.argv[1:]
from bigq.scheme import Rule
rules = (Rule(rule, None),) if rule else ()
scheme = QuantScheme(group_size=32)
config = JobConfig(scheme=scheme, rules=rules, samples=4, seqlen=32, device="cpu", disk=int(disk) or None, checkpoint_every=None)
for fetched in (False, True) if fetch == "fetch" else (False,):
    if fetched:
        resolve_model(model)
    try:
        _, found = plan_before_fetch(model, Path(out), config)
        print("nothing to fetch" if found is None else f"{found.fetch.to_json()['way']} {found.fetch.size}")
    except BigqError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.long
def test_a_job_is_planned_before_its_model_is_fetched(
    repository: Path, hub: Hub, environment: dict[str, str], child: Child, tmp_path: Path
) -> None:
    def planned(model: str | Path, disk: int = 0, rule: str = "", fetch: str = "") -> str:
        done = child("-c", BEFORE_FETCH, model, tmp_path / "out", str(disk), rule, fetch, env=environment)
        assert done.returncode == 0, done.stderr
        return str(done.stdout).strip()

    size = sum((repository / shard).stat().st_size for shard in shards_of(repository))
    assert planned("owner/tiny") == f"download {size}"
    # The output is smaller than the model: with room for the one but not for both, nothing is begun.
    short = planned("owner/tiny", disk=size)
    assert short.startswith("ResourceError owner/tiny: the job does not fit, so nothing is fetched: disk: ")
    assert "of MODEL downloaded to " in short and short.endswith("; give --disk 10MiB or more")
    assert planned("owner/tiny", disk=3 * size) == f"download {size}"
    assert planned("owner/tiny", rule="o_proj").startswith("UsageError --skip 'o_proj': matches no Linear")
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    assert planned(repository) == "nothing to fetch"
    assert planned("owner/tiny", fetch="fetch") == f"download {size}\nnothing to fetch"
    assert not (tmp_path / "out").exists()


SHARED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from bigq.config import JobConfig
from bigq.errors import BigqError
from bigq.scheme import QuantScheme
from bigq.sched.plan.inputs import plan_before_fetch
model, out, fetch, count = sys.argv[1:]
config = JobConfig(scheme=QuantScheme(group_size=32), samples=4, seqlen=32, device="cpu", fetch=fetch)
try:
    _, found = plan_before_fetch(model, Path(out), config, SimpleNamespace(count=int(count), local_count=int(count)))
    print(found.fetch.to_json()["way"], found.work.rows, found.scaling.to_json()["count"] if found.scaling else 1)
except BigqError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.long
def test_several_processes_download_their_model(
    repository: Path, hub: Hub, environment: dict[str, str], child: Child, tmp_path: Path
) -> None:
    """What stays on a server they cannot share, and are told so before anything is fetched."""

    def planned(fetch: str, count: int) -> str:
        done = child("-c", SHARED, "owner/tiny", tmp_path / "out", fetch, str(count), env=environment)
        assert done.returncode == 0, done.stderr
        return str(done.stdout).strip()

    assert planned("stream", 1) == "stream 4 1"
    assert planned("stream", 2).startswith("UsageError a model that stays on a server: 2 processes cannot share such a job")
    assert planned("auto", 2) == "download 2 2"
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_a_repository_of_one_shard(
    checkpoint: Callable[[str], Path], hub: Hub, environment: dict[str, str], child: Child, tmp_path: Path
) -> None:
    folder = tmp_path / "single"
    folder.mkdir()
    save_file(stored_tensors(checkpoint("llama")), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(checkpoint("llama") / "config.json", folder)
    (folder / "consolidated.safetensors").write_bytes(b"x")
    hub.repositories["owner/single"] = folder
    done = child("-c", BEFORE_FETCH, "owner/single", tmp_path / "out", "0", "", "fetch", env=environment)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.splitlines()
    assert before.startswith("download ") and after == "nothing to fetch"
    assert {name for name in hub.fetched() if name.endswith(".safetensors")} == {"model.safetensors"}


def test_a_plan_for_what_the_hub_does_not_have(repository: Path, hub: Hub, environment: dict[str, str], child: Child) -> None:
    for shard in repository.glob("*.safetensors*"):
        shard.unlink()
    program = "import sys; from bigq.cli.main import main; print(*(main(['plan', model]) for model in sys.argv[1:]))"
    done = child("-c", program, "owner/absent", "owner/tiny", env=environment)
    assert done.stdout == "3 3\n", done.stderr
    absent, empty = [line for line in done.stderr.splitlines() if line.startswith("bigq: error: ")]
    assert "no such model" in absent and "no safetensors" in empty and empty == done.stderr.splitlines()[-1]
    done = child("-m", "bigq", "plan", "owner/tiny", env={**environment, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "/nonexistent"})
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr


def test_an_adapter_and_two_models_on_the_hub(repository: Path, environment: dict[str, str], child: Child, tmp_path: Path) -> None:
    """Refused before any weights are fetched."""
    command = ("-m", "bigq", "plan", "owner/tiny", "--group-size", "32", "--device", "cpu")
    (repository / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    done = child(*command, env=environment)
    assert done.returncode == 3 and "adapter_config.json: a LORA adapter lies beside the weights" in done.stderr
    (repository / "adapter_config.json").unlink()
    (repository / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    done = child(*command, env={**environment, "HF_HOME": str(tmp_path / "other")})
    assert done.returncode == 3, done.stderr
    assert "owner/tiny: holds model.safetensors beside model.safetensors.index.json, which names other files (model-00001" in done.stderr
    (repository / "model.safetensors").unlink()
    assert main(["plan", str(repository), *command[4:]]) == 0


def test_files_in_subfolders_on_the_hub(
    repository: Path, environment: dict[str, str], ids_file: Path, child: Child, tmp_path: Path
) -> None:
    """Templates, code and the settings of sentence-transformers are fetched; other copies of the model are not."""
    kept = ("additional_chat_templates/tool.jinja", "1_Pooling/config.json", "code/layers.py")
    left = ("onnx/config.json", "original/params.json", "1_Dense/model.safetensors")
    for name in (*kept, *left):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("{}")
    done = child(*arguments("owner/tiny", tmp_path / "out", ids_file), env=environment)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / "out" / name).read_text() == "{}" for name in kept)
    assert not any((tmp_path / "out" / name).exists() for name in left)


def test_unknown_repository_and_unknown_revision(
    repository: Path, environment: dict[str, str], ids_file: Path, child: Child, tmp_path: Path
) -> None:
    program = "import sys; from bigq.cli.main import main; print(*(main(sys.argv[i::2]) for i in (1, 2)))"
    pairs = zip(*(arguments(model, tmp_path / "out", ids_file)[2:] for model in ("owner/absent", "owner/tiny@v99")), strict=True)
    done = child("-c", program, *(argument for pair in pairs for argument in pair), env=environment)
    assert done.stdout == "3 3\n", done.stderr
    absent, revision = done.stderr.splitlines()
    assert absent.startswith("bigq: error: owner/absent: ") and "no such model" in absent
    assert revision.startswith("bigq: error: owner/tiny@v99: ") and "no such model" in revision
    assert not (tmp_path / "out").exists()


def test_c4_from_the_hub(repository: Path, hub: Hub, environment: dict[str, str], child: Child, tmp_path: Path) -> None:
    """The same rows, so the same codes, as from the same file given by its path."""
    words = [f"w{i}" for i in range(3, 120)]
    documents = [{"text": " ".join(words[(7 * i + k) % len(words)] for k in range(50)), "url": "x"} for i in range(100)]
    name, file = C4
    path = tmp_path / "c4" / file
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(document) + "\n" for document in documents)
    hub.repositories[name] = tmp_path / "c4"
    done = child(*arguments(str(repository), tmp_path / "one", "c4"), env=environment)
    assert done.returncode == 0, done.stderr
    quantize_here(repository, tmp_path / "two", path)
    assert f"GET /{name}/resolve/main/{file}" in hub.requests or f"GET /{name}/resolve/{COMMIT}/{file}" in hub.requests
    one, two = stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "two")
    assert one.keys() == two.keys() and all(one[n].equal(two[n]) for n in one)


ROWS = """
import sys
from pathlib import Path
from bigq.calibration import evaluation_rows, read_calibration
model, *sources = sys.argv[1:]
for source in sources:
    found = read_calibration(source, Path(model), samples=12, seqlen=16, seed=3)
    held = evaluation_rows(source.partition(":")[0], Path(model), seqlen=16, samples=4)
    print(found.rows.tolist(), held.tolist(), [made.text() for made in found.made], sep="\\n")
"""


def test_code_from_the_hub(hub: Hub, environment: dict[str, str], child: Child, tmp_path: Path) -> None:
    """The rows of the same file given by its path, by its own field; in a mix, which fetches what it names."""
    folder = tokenizer_folder(tmp_path / "model")
    path = tmp_path / "code" / HUB_TEXTS["code"].file
    path.parent.mkdir()
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({"content": words(ids_of(30, 30 * i)), "license": "mit"}) + "\n" for i in range(100))
    hub.repositories[f"datasets/{HUB_TEXTS['code'].repository}"] = tmp_path / "code"
    done = child("-c", ROWS, folder, "code", env=environment)
    assert done.returncode == 0, done.stderr
    expected = calibration_rows(str(path), folder, samples=12, seqlen=16, seed=3, text_field="content")
    assert json.loads(done.stdout.splitlines()[0]) == expected.tolist()
    save_lines(tmp_path / "own.txt", [{"text": words([20] * 16)}] * 20)
    done = child("-c", ROWS, folder, f"code:0.5,{tmp_path / 'own.txt'}:0.5", env={**environment, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    half = calibration_rows(str(path), folder, samples=6, seqlen=16, seed=3, text_field="content").tolist()
    assert json.loads(done.stdout.splitlines()[0]) == [*half, *[[20] * 16] * 6]
    assert "code: 6 rows from" in done.stdout and "own.txt: 6 rows from" in done.stdout


def test_conversations_and_paragraphs_from_the_hub(hub: Hub, environment: dict[str, str], child: Child, tmp_path: Path) -> None:
    """ultrachat through the chat template; wikitext2 as one text with blank lines; evaluation takes their other files."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    folder = tokenizer_folder(tmp_path / "model", bos=True, chat=True)
    chat = [
        [{"content": words(ids_of(9, 20 * i)), "role": "user"}, {"content": words(ids_of(20, i)), "role": "assistant"}] for i in range(60)
    ]
    paragraphs = ["", *(" " + words(ids_of(12, 12 * i)) + " \n" for i in range(100)), ""]
    for name, records in (
        ("ultrachat", [{"prompt": "w3", "prompt_id": "x", "messages": each} for each in chat]),
        ("wikitext2", [{"text": each} for each in paragraphs]),
    ):
        text = HUB_TEXTS[name]
        for file, of in ((text.file, records), (str(text.heldout), records[::-1])):
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(pyarrow.Table.from_pylist(of), path)
        hub.repositories[f"datasets/{text.repository}"] = tmp_path / name
    local = {"ultrachat": tmp_path / "chat.jsonl", "wikitext2": tmp_path / "wiki.txt"}
    done = child("-c", ROWS, folder, *local, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for step in (1, -1):
        save_lines(local["ultrachat"], [{"messages": each} for each in chat[::step]])
        local["wikitext2"].write_text("\n\n".join(paragraphs[::step]))
        for (name, path), (rows, held, made) in zip(local.items(), (lines[:3], lines[3:]), strict=True):
            if step < 0:
                assert json.loads(held) == evaluation_rows(str(path), folder, seqlen=16, samples=4).tolist()
            else:
                assert json.loads(rows) == calibration_rows(str(path), folder, samples=12, seqlen=16, seed=3).tolist()
                assert ("conversations by the chat template" if name == "ultrachat" else "tokens of one text") in made
    assert {line.rpartition("/")[2] for line in hub.requests if line.startswith("GET") and line.endswith(".parquet")} == {
        file.rpartition("/")[2] for name in local for file in (HUB_TEXTS[name].file, str(HUB_TEXTS[name].heldout))
    }


def test_c4_missing_on_the_hub(repository: Path, environment: dict[str, str], child: Child, tmp_path: Path) -> None:
    done = child(*arguments(str(repository), tmp_path / "out", "c4"), env=environment)
    assert done.returncode == 4, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("bigq: error: ") and "allenai/c4" in lines[0], done.stderr
    assert "--calibration FILE" in lines[0] and "builtin" in lines[0]
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_job_that_does_not_fit_fetches_no_shard(
    repository: Path, hub: Hub, environment: dict[str, str], ids_file: Path, child: Child, tmp_path: Path
) -> None:
    done = child(*arguments("owner/tiny", tmp_path / "out", ids_file), "--disk", "100KB", env=environment)
    assert done.returncode == 4, done.stderr
    assert "the job does not fit, so nothing is fetched: disk: " in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "hf").rglob("*.safetensors")) and not (tmp_path / "out").exists()
