"""Quantizing the output head: on what really reaches it, resumed like a block, told in each format's way, or refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import decode, make_checkpoint, random_ids, rewrite, save_ids, stored_tensors, streamed_logits
from torch import Tensor
from transformers import AutoModelForCausalLM

import bigq
from bigq.calibration import calibration_rows
from bigq.config import JobConfig
from bigq.errors import Stopped, UsageError
from bigq.inspect.verify import verify
from bigq.job.journal import Commit, Journal
from bigq.job.stop import Stop
from bigq.methods import gptq as gptq_module
from bigq.progress.progress import Progress
from bigq.sched import solving
from bigq.sched.plan.inputs import plan
from bigq.sched.solve import head as head_module
from bigq.scheme import QuantScheme, Rule
from bigq.solver.gptq import quantize_linear
from bigq.solver.rtn import round_to_nearest

SCHEME = QuantScheme(group_size=32, symmetric=False)


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ids(tmp_path_factory.mktemp("ids") / "ids.safetensors", random_ids())


def job(ids: Path, **changes: Any) -> JobConfig:
    values: dict[str, Any] = {"scheme": SCHEME, "calibration": str(ids), "samples": 8, "seqlen": 24, "batch": 3, "quiet": True}
    return JobConfig(**{**values, "lm_head": True, "format": "gptq_v2", **changes})


def dense(out: Path, source: Path) -> Any:
    """transformers' model with the decoded weights of all packed Linears but the head."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors = stored_tensors(out)
    for name, module in model.named_modules():
        if f"{name}.qweight" in tensors and not name.startswith(("lm_head", "embed_out")):
            module.weight.data = decode(tensors, name, 4, 2).weight(torch.float32)
    return model.eval()


def expected_hessian(model: Any, rows: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(rows)
    hook.remove()
    x = torch.cat(seen).double()
    return 2 / len(x) * x.T @ x


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_head_is_solved_on_what_reaches_it(family: str, checkpoint: Callable[[str], Path], ids: Path, tmp_path: Path) -> None:
    source, out = checkpoint(family), tmp_path / "out"
    seen: list[Tensor] = []
    factorize = gptq_module.factorize

    def recording(h: Tensor, *, name: str, **options: Any) -> Any:
        if name in ("lm_head", "embed_out"):  # the blocks' Linears are factored by the same function
            seen.append(h.clone())
        return factorize(h, name=name, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq_module, "factorize", recording)
        bigq.quantize(str(source), out, job(ids))
    rows = calibration_rows(str(ids), source, samples=8, seqlen=24, seed=0)
    model = dense(out, source)
    expected = expected_hessian(model, rows)
    assert torch.allclose(seen[0].double(), expected, rtol=1e-4, atol=1e-4 * float(expected.diagonal().mean()))
    name = "lm_head" if family == "llama" else "embed_out"
    weight = load_head(source, name)
    solved = quantize_linear(weight, seen[0], SCHEME)
    got = decode(stored_tensors(out), name, 4, 2)
    assert (got.codes == solved.codes).float().mean() > 0.999, "all in one go may round a tie otherwise"
    model.get_output_embeddings().weight.data = got.weight(torch.float32)
    with torch.no_grad():
        assert torch.allclose(streamed_logits(out, rows, 4), model(rows).logits, atol=1e-4)
    assert verify(out) == []


def load_head(source: Path, name: str) -> Tensor:
    return stored_tensors(source)[f"{name}.weight"].float()


def test_some_rows_at_a_time_are_as_good_as_all(
    checkpoint: Callable[[str], Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bigq.quantize(str(checkpoint("llama")), tmp_path / "all", job(ids))
    monkeypatch.setattr(head_module, "HEAD_CHUNK", 64 * 48)
    bigq.quantize(str(checkpoint("llama")), tmp_path / "some", job(ids))
    a, b = (decode(stored_tensors(tmp_path / name), "lm_head", 4, 2) for name in ("all", "some"))
    assert (a.codes == b.codes).float().mean() > 0.999 and a.scales.shape == b.scales.shape


def test_rounding_to_nearest(checkpoint: Callable[[str], Path], ids: Path, tmp_path: Path) -> None:
    bigq.quantize(str(checkpoint("llama")), tmp_path / "out", job(ids, method="rtn"))
    got = decode(stored_tensors(tmp_path / "out"), "lm_head", 4, 2)
    expected = round_to_nearest(load_head(checkpoint("llama"), "lm_head"), SCHEME)
    assert (got.codes == expected.codes).all()
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("method", ["gptq", "gptaq", "rtn"])
def test_a_job_that_is_taken_up_ends_in_the_same_bytes(
    method: str, checkpoint: Callable[[str], Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(checkpoint("llama"))
    bigq.quantize(source, tmp_path / "whole", job(ids, method=method))
    expected = hashes(tmp_path / "whole")
    units = len([*(tmp_path / "whole").glob("*.safetensors")])
    commit = Journal.commit
    for commits in (units - 2, units - 1, units):
        done: list[str] = []

        def striking(self: Journal, record: Commit, done: list[str] = done, commits: int = commits) -> None:
            commit(self, record)
            done.append(record.unit)
            if len(done) == commits:
                raise KeyboardInterrupt

        out = tmp_path / f"after {commits}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "commit", striking)
            with pytest.raises(KeyboardInterrupt):
                bigq.quantize(source, out, job(ids, method=method, checkpoint_every=0.0))
        assert done[-1] == ("head-0" if commits == units else f"block-{commits - units + 3}")
        bigq.quantize(source, out)
        assert hashes(out) == expected
    (tmp_path / "whole" / f"model-{units:05d}-of-{units:05d}.safetensors").unlink()
    assert verify(tmp_path / "whole")
    bigq.quantize(source, tmp_path / "whole")
    assert hashes(tmp_path / "whole") == expected and verify(tmp_path / "whole") == []


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_each_format_tells_it_in_its_way(format: str, checkpoint: Callable[[str], Path], ids: Path, tmp_path: Path) -> None:
    source = str(checkpoint("llama"))
    for name, with_head in (("with", True), ("without", False)):
        rules = (Rule.parse("lm_head$:bits=8,sym=true"),) if with_head else ()
        bigq.quantize(source, tmp_path / name, job(ids, format=format, lm_head=with_head, rules=rules))
        config = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        if format == "gptq":
            assert config["lm_head"] is with_head
        else:
            assert ("lm_head" in config["ignore"]) is not with_head
            named = [group["targets"] for group in config["config_groups"].values()]
            assert (["lm_head"] in named) is with_head
        assert verify(tmp_path / name) == []
    stored = stored_tensors(tmp_path / "with")
    assert "lm_head.weight" not in stored and "lm_head.weight" in stored_tensors(tmp_path / "without")


def test_where_it_is_skipped_too_there_is_nothing_to_do(checkpoint: Callable[[str], Path], ids: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no Linear would be quantized"):
        bigq.quantize(str(checkpoint("llama")), tmp_path / "out", job(ids, rules=(Rule(".*", None),)))
    bigq.quantize(str(checkpoint("llama")), tmp_path / "out", job(ids, rules=(Rule("(?!lm_head)", None),)))
    assert "lm_head.qweight" in stored_tensors(tmp_path / "out") and verify(tmp_path / "out") == []


def test_skip_leaves_it_as_it_is(checkpoint: Callable[[str], Path], ids: Path, tmp_path: Path) -> None:
    bigq.quantize(str(checkpoint("llama")), tmp_path / "out", job(ids, rules=(Rule("lm_head", None),)))
    assert "lm_head.weight" in stored_tensors(tmp_path / "out") and verify(tmp_path / "out") == []


#: What a head cannot be: (the model, the job, what is said of it).
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "the embedding": ({"tie_word_embeddings": True}, {}, r"--lm-head: lm_head has the input embedding's weight"),
    "no whole words": ({"vocab_size": 130}, {}, r"lm_head is 130 × 64.*--skip 'lm_head\$'"),
    "no whole groups": (
        {},
        {"rules": (Rule("lm_head", {"group_size": 128}),)},
        r"lm_head has 64 inputs, which group size 128 does not divide",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_any_text_is_read(case: str, tmp_path: Path) -> None:
    """By the plan too."""
    model, changes, says = REFUSED[case]
    source = make_checkpoint(tmp_path / "model", "llama", **model)
    unreadable = tmp_path / "text.txt"
    unreadable.write_bytes(b"caf\xe9")  # refused as soon as it is read
    config = job(unreadable, **changes)
    for attempt in (lambda: bigq.quantize(str(source), tmp_path / "out", config), lambda: plan(str(source), tmp_path, config)):
        with pytest.raises(UsageError, match=says):
            attempt()
    assert not (tmp_path / "out").exists()


def mixed(folder: Path) -> Path:
    """A llama in fp16 whose head is bf16."""
    source = make_checkpoint(folder, "llama", dtype=torch.float16)
    rewrite(source, "lm_head.weight", stored_tensors(source)["lm_head.weight"].bfloat16())
    return source


def test_scales_fit_the_head_s_type_too(ids: Path, tmp_path: Path) -> None:
    source = str(mixed(tmp_path / "model"))
    bigq.quantize(source, tmp_path / "out", job(ids, format="compressed-tensors"))
    stored = stored_tensors(tmp_path / "out")
    assert stored["lm_head.weight_scale"].dtype == torch.bfloat16 and verify(tmp_path / "out") == []
    config = job(ids, format="compressed-tensors", scheme=dataclasses.replace(SCHEME, scale_bits=11))
    with pytest.raises(UsageError, match=r"--scale-bits 11: .*model is bf16, .*compressed-tensors.* use --scale-bits 8, or leave it out"):
        bigq.quantize(source, tmp_path / "other", config)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("moment", ["before", "within"])
def test_a_job_that_is_asked_to_stop_there_leaves_and_goes_on(
    moment: str, checkpoint: Callable[[str], Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, stop = str(checkpoint("llama")), Stop()
    solve_head = solving.solve_head
    block_done = Progress.block_done

    def asked(*args: Any, **kwargs: Any) -> Any:
        stop.request("SIGTERM")
        return solve_head(*args, **kwargs)

    def done(self: Progress, index: int, *args: Any) -> None:
        block_done(self, index, *args)
        if index == 2:
            stop.request("SIGTERM")

    if moment == "within":
        monkeypatch.setattr(solving, "solve_head", asked)
    else:
        monkeypatch.setattr(Progress, "block_done", done)
    with pytest.raises(Stopped, match="stopped at the output head; run the same command again"):
        bigq.quantize(source, tmp_path / "out", job(ids, checkpoint_every=0.0), stop)
    monkeypatch.undo()
    assert (tmp_path / "out/.bigq/activations-00003.safetensors").exists()
    bigq.quantize(source, tmp_path / "out")
    bigq.quantize(source, tmp_path / "whole", job(ids))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_the_plan_knows_of_it(checkpoint: Callable[[str], Path], ids: Path, tmp_path: Path) -> None:
    with_head, without = (plan(str(checkpoint("llama")), tmp_path, job(ids, lm_head=lm_head)) for lm_head in (True, False))
    report = bigq.quantize(str(checkpoint("llama")), tmp_path / "out", job(ids))
    assert with_head.cost.output < without.cost.output
    headers = 4096 * len([*(tmp_path / "out").glob("*.safetensors")])
    assert with_head.cost.output <= report.output_bytes <= with_head.cost.output + headers
