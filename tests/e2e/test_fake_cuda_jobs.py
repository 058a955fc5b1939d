"""Whole jobs on a simulated CUDA device: the bytes are those of the CPU, and every planted fault is found.

The device (``tests/fake_cuda``) copies as late as CUDA allows. Its jobs run in three child processes; one of them is not ``long``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_checkpoints import coded_and_decoded
from conftest import CUDA, ROOT, Child
from fake_cuda.planted import FAULTS
from models import make_checkpoint, random_ids, save_ids, word_tokenizer
from moe_families import moe_model

from bigq.cli.main import main

pytestmark = pytest.mark.skipif(CUDA, reason="the simulated device takes the place of a real one")

FAMILIES = ("llama", "bloom", "qwen2", "opt")
TIERS = ("gpu", "host", "disk")

#: Job → family, method and further arguments, which the CPU's run has too.
JOBS: dict[str, tuple[str, str, list[str]]] = {
    "llama gptq": ("llama", "gptq", []),
    "llama rtn": ("llama", "rtn", ["--scales", "minmax"]),
    "small gptq": ("small", "gptq", ["--sweeps", "0"]),
    # Of bloom without searches and sweeps: the codes of its last Linears hang on how a processor rounds sums.
    "bloom gptq": ("bloom", "gptq", ["--quality", "fast"]),
    "experts fast": ("deepseek_v3", "gptq", ["--format", "compressed-tensors", "--quality", "fast"]),
    "llama gptaq": ("llama", "gptaq", ["--order", "activation", "--scales", "minmax"]),
    "llama gptaq, searched": ("llama", "gptaq", []),
    # Of others too where a default job has been run: searches and sweeps take most of the time.
    "qwen2 gptaq": ("qwen2", "gptaq", ["--order", "natural", "--scales", "minmax", "--sweeps", "0"]),
    "qwen2 gptq": ("qwen2", "gptq", ["--bits", "3", "--asym"]),
    "opt gptq": ("opt", "gptq", ["--on-nonfinite", "skip", "--quality", "fast"]),
    "opt rtn": ("opt", "rtn", ["--bits", "8", "--scales", "minmax"]),
    "experts gptq": ("deepseek_v3", "gptq", ["--format", "compressed-tensors", "--scales", "minmax"]),
    "fp8 experts gptq": ("deepseek_v3_fp8", "gptq", ["--format", "compressed-tensors", "--quality", "fast"]),
    "nvfp4 gptq": ("llama_nvfp4", "gptq", ["--quality", "fast"]),
    "small folded": ("small", "gptq", ["--quality", "fast", "--fold", "awq"]),
    "experts folded": ("deepseek_v3", "gptq", ["--format", "compressed-tensors", "--quality", "fast", "--fold", "awq"]),
}
#: Simulated run → the job, the tier and the fault.
RUNS: dict[str, tuple[str, str, str]] = {
    **{f"{job}, {tier}": (job, tier, "") for job in ("llama gptq", "llama gptaq") for tier in TIERS},
    **{f"{job}, host": (job, "host", "") for job in ("bloom gptq", "qwen2 gptaq", "opt gptq", "llama rtn", "opt rtn")},
    "llama gptaq, searched, host": ("llama gptaq, searched", "host", ""),
    "experts gptq, gpu": ("experts gptq", "gpu", ""),
    "experts fast, disk": ("experts fast", "disk", ""),
    "fp8 experts gptq, gpu": ("fp8 experts gptq", "gpu", ""),
    "nvfp4 gptq, host": ("nvfp4 gptq", "host", ""),
    "qwen2 gptq, disk": ("qwen2 gptq", "disk", ""),
    "experts folded, gpu": ("experts folded", "gpu", ""),
    "llama gptq, host, out of memory": ("llama gptq", "host", "batch.begun:9:OOM"),
    "llama gptaq, disk, out of memory": ("llama gptaq", "disk", "batch.begun:30:OOM"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bf16 model of each family, and token ids."""
    folder = tmp_path_factory.mktemp("fake_cuda")
    for family in FAMILIES:
        word_tokenizer().save_pretrained(make_checkpoint(folder / family, family, dtype=torch.bfloat16))
    moe_model("deepseek_v3", torch.bfloat16).save_pretrained(folder / "deepseek_v3")  # type: ignore[operator]
    coded_and_decoded(folder / "deepseek_v3", folder / "fp8", "fp8 blocks")[0].rename(folder / "deepseek_v3_fp8")
    coded_and_decoded(folder / "llama", folder / "nvfp4", "nvfp4")[0].rename(folder / "llama_nvfp4")
    make_checkpoint(folder / "small", "llama", dtype=torch.bfloat16, num_hidden_layers=2)
    save_ids(folder / "ids.safetensors", random_ids())
    return folder


def arguments(place: Path, job: str, out: Path, device: str, tier: str = "host") -> list[str]:
    family, method, more = JOBS[job]
    rows = [] if method == "rtn" else ["--calibration", str(place / "ids.safetensors"), "--samples", "16", "--seqlen", "24", "--batch", "4"]
    run = [] if method == "rtn" else ["--activations", "host" if device == "cpu" and tier == "gpu" else tier]
    command = ["quantize", str(place / family), str(out), "--method", method, "--group-size", "32", "--device", device]
    return [*command, *rows, *run, *more]


def evaluation(place: Path, model: Path, device: str) -> list[str]:
    rows = ["--data", str(place / "ids.safetensors"), "--samples", "4", "--seqlen", "24", "--batch", "2"]
    return ["eval", str(model), "--baseline", str(place / "llama"), *rows, "--device", device, "--json"]


def generation(model: Path, device: str) -> list[str]:
    return ["generate", str(model), "--prompt", "w5 w6 w7", "--max-new-tokens", "8", "--device", device, "--quiet"]


def on_device(child: Child, folder: Path, jobs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Run jobs on the simulated device."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = ("-m", "fake_cuda.run_jobs", folder / "jobs.json", folder / "results.json")
    done = child(*command, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results: dict[str, dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return results


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of everything that a job wrote, but its own records."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def on_cpu(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(job, fault, tier) → the folder that the CPU's run wrote."""
    known: dict[tuple[str, str, str], Path] = {}

    def get(job: str, fault: str = "", tier: str = "host") -> Path:
        if (job, fault, tier) not in known:
            out = known[job, fault, tier] = tmp_path_factory.mktemp("cpu") / "out"
            with pytest.MonkeyPatch.context() as patch:
                if fault:
                    patch.setenv("BIGQ_FAULT", fault)
                assert main([*arguments(place, job, out, "cpu", tier), "--quiet"]) == 0
        return known[job, fault, tier]

    return get


@pytest.fixture(scope="module")
def results(place: Path, child: Child) -> dict[str, dict[str, Any]]:
    """Every run on the simulated device, in one process."""
    jobs: list[dict[str, Any]] = [
        {"name": name, "argv": arguments(place, job, place / name, "cuda:0", tier), "fault": fault}
        for name, (job, tier, fault) in RUNS.items()
    ]
    resumed = arguments(place, "llama gptq", place / "resumed", "cuda:0")
    jobs += [{"name": "killed", "argv": resumed, "fault": "block.solved:2:kill"}, {"name": "resumed", "argv": resumed}]
    model = place / "llama gptq, gpu"
    jobs += [{"name": "eval", "argv": evaluation(place, model, "cuda:0")}, {"name": "generate", "argv": generation(model, "cuda:0")}]
    return on_device(child, place, jobs)


def require_sound(result: dict[str, Any]) -> None:
    assert (result["code"], result["raised"], result["problems"]) == (0, "", []), result["told"]


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_a_job_writes_the_bytes_of_the_cpu(name: str, results: dict[str, dict[str, Any]], on_cpu: Callable[..., Path], place: Path) -> None:
    job, tier, fault = RUNS[name]
    require_sound(results[name])
    # Where memory ends, kept inputs go first, and only then the batch is halved. With activations on disk nothing is kept.
    assert hashes(place / name) == hashes(on_cpu(job, fault, tier) if fault else on_cpu(job))
    done = results[name]["done"]
    assert done["late copy to the device"] > 10 and done["late copy to the host"] > 10
    assert done["pack_triton"] and ("rtn" in job or (done["gptq_block_triton_"] and done["syrk_triton_"]))


@pytest.mark.long
def test_experts_side_by_side_have_the_bytes_of_the_cpu(child: Child, on_cpu: Callable[..., Path], place: Path, tmp_path: Path) -> None:
    """The CPU solves one after the other. A batch is one launch; the plan chooses as many as there are. 3 of 8 leave a rest."""
    kind = "experts fast"

    def argv(out: str, *more: str) -> list[str]:
        return [*arguments(place, kind, tmp_path / out, "cuda:0"), *more]

    jobs: list[dict[str, Any]] = [{"name": n, "argv": argv(n, "--experts-at-once", n)} for n in ("1", "3")]
    killed = argv("going on", "--experts-at-once", "3")
    jobs += [{"name": "killed", "argv": killed, "fault": "expert.solved:5:kill"}, {"name": "going on", "argv": killed}]
    results = on_device(child, tmp_path, [*jobs, {"name": "as planned", "argv": argv("as planned")}])
    assert results["killed"]["code"] == -9
    for name in ("1", "3", "going on", "as planned"):
        require_sound(results[name])
        assert hashes(tmp_path / name) == hashes(on_cpu(kind)), name
    one, three, planned = (results[name]["done"]["gptq_block_triton_"] for name in ("1", "3", "as planned"))
    assert one > three > planned


@pytest.mark.long
def test_a_killed_job_ends_with_the_same_bytes(results: dict[str, dict[str, Any]], on_cpu: Callable[..., Path], place: Path) -> None:
    assert results["killed"]["code"] == -9
    require_sound(results["resumed"])
    assert hashes(place / "resumed") == hashes(on_cpu("llama gptq"))


@pytest.mark.long
def test_eval_gives_the_figures_of_the_cpu(
    results: dict[str, dict[str, Any]], on_cpu: Callable[..., Path], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_sound(results["eval"])
    assert main(evaluation(place, on_cpu("llama gptq"), "cpu")) == 0
    found, expected = json.loads(results["eval"]["said"]), json.loads(capsys.readouterr().out)
    assert found["kl"] > 0
    assert {name: found[name] for name in ("perplexity", "kl", "top1_agreement")} == pytest.approx(
        {name: expected[name] for name in ("perplexity", "kl", "top1_agreement")}, rel=1e-6
    )


@pytest.mark.long
def test_a_packed_model_generates(results: dict[str, dict[str, Any]]) -> None:
    """One vector at a time through the kernel for packed weights."""
    require_sound(results["generate"])
    assert results["generate"]["done"]["dequant_matvec_triton"] >= 7 * 7 * 3
    words = results["generate"]["said"].split()
    assert words and all(word.startswith("w") for word in words)


def fault_jobs(place: Path, folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """A job with each planted fault; "" is none."""
    folder.mkdir()
    return [
        {
            "name": name or "none",
            "argv": arguments(place, "small gptq", folder / (name or "none"), "cuda:0", "disk" if "asynchronous" in name else "host"),
            "planted": name,
        }
        for name in names
    ]


def test_a_job_and_a_fault(place: Path, child: Child, on_cpu: Callable[..., Path]) -> None:
    """The shortest form of all the tests below, and a job with folds."""
    folder, fault = place / "few", next(iter(FAULTS))
    folded = {"name": "folded", "argv": arguments(place, "small folded", folder / "folded", "cuda:0")}
    results = on_device(child, folder, [*fault_jobs(place, folder, ["", fault]), folded])
    for name, job in (("none", "small gptq"), ("folded", "small folded")):
        require_sound(results[name])
        assert hashes(folder / name) == hashes(on_cpu(job))
    assert any(FAULTS[fault].found in kind for _, kind, _ in results[fault]["problems"])


@pytest.fixture(scope="module")
def with_faults(place: Path, child: Child) -> dict[str, dict[str, Any]]:
    """A job with each planted fault, and one without; all in one process."""
    folder = place / "faults"
    return on_device(child, folder, fault_jobs(place, folder, ["", *FAULTS]))


@pytest.mark.long
def test_without_a_fault_nothing_is_found(with_faults: dict[str, dict[str, Any]]) -> None:
    require_sound(with_faults["none"])


@pytest.mark.long
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, with_faults: dict[str, dict[str, Any]], place: Path) -> None:
    result, found = with_faults[name], FAULTS[name].found
    if found:
        assert any(found in kind for _, kind, _ in result["problems"]), result
    else:
        assert result["code"] or hashes(place / "faults" / name) != hashes(place / "faults" / "none")
