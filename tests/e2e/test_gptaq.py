"""Jobs with ``--method gptaq``: what is solved is what the inputs in the original model and in the quantized one say, however it is run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    LEVELS,
    decode,
    linear_module,
    make_checkpoint,
    matrix,
    packed_prefixes,
    put_matrix,
    random_ids,
    reference_model,
    save_ids,
    stored_tensors,
)
from torch import Tensor, nn

import bigq
from bigq.cli.main import main
from bigq.config import JobConfig
from bigq.errors import NumericsError, UsageError
from bigq.io.checksum import unseal
from bigq.job.journal import Commit, Journal
from bigq.model.forward.block_call import BlockCall
from bigq.sched.plan import inputs
from bigq.sched.rows.reference import ReferenceBlock
from bigq.sched.rows.store import ActivationStore
from bigq.sched.solving import _Spare
from bigq.scheme import QuantScheme, Rule
from bigq.solver.gptq import quantize_linear

ROWS, SEQLEN = 16, 24
#: Of a packed Linear, what is solved for.
PARTS = ("qweight", "scales", "qzeros")


def job(ids: Path, **changes: Any) -> JobConfig:
    values = {
        "scheme": QuantScheme(group_size=32, bits=3),
        "method": "gptaq",
        "calibration": str(ids),
        "samples": ROWS,
        "seqlen": SEQLEN,
        "batch": 8,
        "device": "cpu",
        "quiet": True,
    }
    return JobConfig(**{**values, **changes})


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def shards(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in hashes(out).items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def whole(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, settings) → the output of an uninterrupted run; each is run once."""
    known: dict[str, Path] = {}

    def get(family: str, **changes: Any) -> Path:
        key = f"{family} {changes}"
        if key not in known:
            known[key] = tmp_path_factory.mktemp("whole") / "out"
            bigq.quantize(str(checkpoint(family)), known[key], job(ids_file, **changes))
        return known[key]

    return get


def inputs_of(model: nn.Module, prefixes: list[str], ids: Tensor) -> dict[str, Tensor]:
    """What each Linear receives, fp64 [tokens, n]."""
    seen: dict[str, Tensor] = {}

    def hook(prefix: str) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[prefix] = args[0].reshape(-1, args[0].shape[-1]).double()

        return before

    handles = [linear_module(model, prefix).register_forward_pre_hook(hook(prefix)) for prefix in prefixes]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("family", "scheme", "alpha"),
    [
        ("llama", QuantScheme(group_size=32, bits=3), 0.5),
        ("bloom", QuantScheme(group_size=-1, bits=3, order="activation", symmetric=False), 1.0),
        ("gpt2", QuantScheme(group_size=32, bits=4, order="activation", scales="minmax"), 0.7),
    ],
)
def test_every_linear_is_solved_for_what_the_original_gives_on_its_own_inputs(
    family: str, scheme: QuantScheme, alpha: float, checkpoint: Callable[[str], Path], ids_file: Path, whole: Callable[..., Path]
) -> None:
    """X from transformers' model with the original weights, X̂ from the one with those packed, and the rest in fp64.

    A Linear's input depends only on Linears before it, so the finished model shows what it was solved with.
    """
    out = whole(family, scheme=scheme, alpha=alpha)
    tensors, original, packed = stored_tensors(out), reference_model(checkpoint(family)), reference_model(checkpoint(family))
    prefixes = list(packed_prefixes(tensors))
    codes = {prefix: decode(tensors, prefix, scheme.bits) for prefix in prefixes}
    for prefix in prefixes:
        put_matrix(linear_module(packed, prefix), codes[prefix].weight(torch.float32))
    ids = stored_ids(ids_file)
    before, now = inputs_of(original, prefixes, ids), inputs_of(packed, prefixes, ids)
    same = plain = total = 0
    for prefix in prefixes:
        x, xq = before[prefix], now[prefix]
        h, d = 2 / len(x) * xq.T @ xq, 2 / len(x) * (x - xq).T @ xq
        weight, own = matrix(linear_module(original, prefix)).detach().double(), dataclasses.replace(scheme, min_zero=1)
        same += int((quantize_linear(weight, h, own, d, alpha).codes == codes[prefix].codes).sum())
        plain += int((quantize_linear(weight, h, own).codes == codes[prefix].codes).sum())
        total += codes[prefix].codes.numel()
    assert same > 0.998 * total
    assert plain < 0.98 * total


def stored_ids(path: Path) -> Tensor:
    from safetensors.torch import load_file

    return load_file(path)["input_ids"][:ROWS, :SEQLEN]


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_nothing_has_changed_before_the_first_linears(family: str, whole: Callable[..., Path]) -> None:
    """Their inputs are those of the original model, bit for bit: the codes are GPTQ's. Those behind them differ."""
    ours, gptq = (stored_tensors(whole(family, method=method)) for method in ("gptaq", "gptq"))
    first = min(packed_prefixes(ours), key=lambda p: [int(part) for part in p.split(".") if part.isdigit()])
    block = first[: first.index(".0.") + 2]
    level_0 = {f"{block}.{name}" for group in LEVELS[family][0] for name in group}
    differ = {p for p in packed_prefixes(ours) if not all(torch.equal(ours[f"{p}.{s}"], gptq[f"{p}.{s}"]) for s in PARTS)}
    assert level_0 and not level_0 & differ
    assert len(differ) == len(list(packed_prefixes(ours))) - len(level_0)


def test_with_strength_0_the_shards_are_those_of_gptq(whole: Callable[..., Path]) -> None:
    assert shards(whole("llama", alpha=0.0)) == shards(whole("llama", method="gptq"))


def interrupt(number: int, source: Path, out: Path, config: JobConfig) -> None:
    """Run a job that is stopped right after so many commits."""
    commit, done = Journal.commit, []

    def striking(self: Journal, record: Commit) -> None:
        commit(self, record)
        done.append(record.unit)
        if len(done) == number:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "commit", striking)
        with pytest.raises(KeyboardInterrupt):
            bigq.quantize(str(source), out, config)


@pytest.mark.parametrize("every", [0.0, None], ids=["from a checkpoint", "from the first block"])
@pytest.mark.parametrize("commits", [2, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_interrupted_job_ends_with_the_same_bytes(
    family: str,
    commits: int,
    every: float | None,
    checkpoint: Callable[[str], Path],
    ids_file: Path,
    whole: Callable[..., Path],
    tmp_path: Path,
) -> None:
    out, config = tmp_path / "out", job(ids_file, checkpoint_every=every)
    interrupt(commits, checkpoint(family), out, config)
    saved = list((out / ".bigq").glob("activations-*.safetensors"))
    assert len(saved) == (every is not None and commits > 2)
    assert bigq.quantize(str(checkpoint(family)), out, config).resumed_blocks == commits - 1
    assert hashes(out) == hashes(whole(family))


@pytest.mark.parametrize(
    "changes",
    [
        {"true_sequential": False},
        {"dtype": "bfloat16"},
        {"scheme": QuantScheme(group_size=-1, bits=2, scales="search", order="activation")},
        {"rules": (Rule(r".*\.o_proj", None), Rule.parse(r".*\.(down|q|k|v|qkv)_proj:bits=8,sym=false,order=activation"))},
        {"on_nonfinite": "skip"},
    ],
    ids=["together", "bf16", "mse, act-order", "rules", "skip"],
)
def test_every_setting_resumes_to_the_same_bytes(
    changes: dict[str, Any], checkpoint: Callable[[str], Path], ids_file: Path, whole: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(3, checkpoint("llama"), out, job(ids_file, **changes))
    bigq.quantize(str(checkpoint("llama")), out, job(ids_file, **changes))
    assert hashes(out) == hashes(whole("llama", **changes))
    assert shards(out) != shards(whole("llama", **changes, method="gptq"))


@pytest.mark.parametrize("changes", [{"activations": "disk"}, {"read_ahead": 1}, {"on_nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_how_the_job_is_run_changes_nothing(
    family: str, changes: dict[str, Any], checkpoint: Callable[[str], Path], ids_file: Path, whole: Callable[..., Path], tmp_path: Path
) -> None:
    bigq.quantize(str(checkpoint(family)), tmp_path / "out", job(ids_file, **changes))
    assert shards(tmp_path / "out") == shards(whole(family))


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
def test_without_memo_the_output_is_the_same(
    family: str,
    checkpoint: Callable[[str], Path],
    ids_file: Path,
    whole: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = inputs.make_plan

    def without(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        assert found.choice.memo
        return dataclasses.replace(found, choice=dataclasses.replace(found.choice, memo=False))

    expected = shards(whole(family))
    monkeypatch.setattr(inputs, "make_plan", without)
    bigq.quantize(str(checkpoint(family)), tmp_path / "out", job(ids_file))
    assert shards(tmp_path / "out") == expected


#: Moment → which call of a block fails, and where the job halves: block, step and row. Each batch of a level calls it twice, for the
#: original rows first; then a propagation does so for two batches of the original rows, and of the others.
MOMENTS: Mapping[str, tuple[int, tuple[int, int, int]]] = {
    "the original rows of the first capture": (1, (0, 1, 0)),
    "the others": (2, (0, 1, 0)),
    "second batch of a later level": (7, (0, 16, 0)),
    "original rows propagate": (18, (0, 2**20, 8)),
    "first batch of the others": (19, (1, 0, 0)),
    "second batch of the others": (20, (1, 0, 8)),
    "second block": (26, (1, 16, 0)),
}


def fail_once(patch: pytest.MonkeyPatch, number: int) -> None:
    """Let the device run out of memory at the given call of a block, and never again once the batch is halved."""
    run, drop, calls = BlockCall.outputs, _Spare.drop, [0]

    def dropping(self: Any) -> None:
        drop(self)
        calls[0] = number - 1

    def failing(self: BlockCall, block: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
        if len(hidden) > 1 and not hidden.is_meta:  # the structure is found on one row, or on none that is real
            calls[0] += 1
            if calls[0] == number:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(self, block, hidden)

    patch.setattr(BlockCall, "outputs", failing)
    patch.setattr(_Spare, "drop", dropping)


@pytest.mark.parametrize("moment", MOMENTS)
def test_memory_ends_and_the_job_can_still_be_taken_up_to_the_same_bytes(
    moment: str, checkpoint: Callable[[str], Path], ids_file: Path, whole: Callable[..., Path], tmp_path: Path
) -> None:
    number, place = MOMENTS[moment]
    with pytest.MonkeyPatch.context() as patch:
        fail_once(patch, number)
        bigq.quantize(str(checkpoint("llama")), tmp_path / "out", job(ids_file))
    value = unseal((tmp_path / "out" / ".bigq" / "batches.json").read_bytes())
    assert value is not None and value["halvings"] == [[*place, 4]]
    for commits in (3, 4):
        with pytest.MonkeyPatch.context() as patch:
            fail_once(patch, number)
            interrupt(commits, checkpoint("llama"), tmp_path / str(commits), job(ids_file, checkpoint_every=None))
        bigq.quantize(str(checkpoint("llama")), tmp_path / str(commits), job(ids_file))
        assert shards(tmp_path / str(commits)) == shards(tmp_path / "out")


def test_tokens_that_overflow_in_the_original_model_only(tmp_path: Path) -> None:
    """They are left out of the cross matrix with skip, and named without."""
    source = make_checkpoint(tmp_path / "model", "llama")
    ids = save_ids(tmp_path / "ids.safetensors", random_ids(ROWS, SEQLEN))
    align, spoilt = ReferenceBlock.align, [False]

    def with_inf(self: ReferenceBlock, store: ActivationStore) -> ActivationStore:
        found = align(self, store)
        if not spoilt[0]:
            spoilt[0] = True
            rows = found.rows(0, 1).clone()
            rows[0, -1] = torch.inf
            found.put(0, rows)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceBlock, "align", with_inf)
        with pytest.raises(NumericsError, match=r"q_proj.*its inputs in the original model contain NaN or Inf.*--on-nonfinite skip"):
            bigq.quantize(str(source), tmp_path / "stop", job(ids))
        spoilt[0] = False
        report = bigq.quantize(str(source), tmp_path / "skip", job(ids, on_nonfinite="skip"))
    assert not report.left_out and len(report.linears) == 3 * 7
    assert all(float(record["relative_error"]) < 0.5 for record in report.linears)  # type: ignore[arg-type]


def test_the_strength_is_part_of_the_job(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(2, checkpoint("llama"), out, job(ids_file))
    with pytest.raises(UsageError, match=r"--alpha 0\.25: the job in .* was begun with --alpha 0\.5"):
        bigq.quantize(str(checkpoint("llama")), out, job(ids_file, alpha=0.25))
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(UsageError, match="--alpha"):
            job(ids_file, alpha=wrong)


def test_the_plan_counts_both_streams(checkpoint: Callable[[str], Path], ids_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for method in ("gptq", "gptaq"):
        flags = ["--method", method, "--samples", "16", "--seqlen", "24", "--group-size", "32", "--device", "cpu", "--json"]
        assert main(["plan", str(checkpoint("llama")), *flags]) == 0
        found[method] = json.loads(capsys.readouterr().out)
    phases = {method: {p["phase"]: p for p in value["phases"]} for method, value in found.items()}
    assert phases["gptaq"]["replay"]["flops"]["products"] == 2 * phases["gptq"]["replay"]["flops"]["products"]
    assert phases["gptaq"]["hessian"]["flops"]["hessian"] == 3 * phases["gptq"]["hessian"]["flops"]["hessian"]
    for phase in ("replay", "hessian", "solve"):
        assert phases["gptaq"][phase]["host_bytes"] > phases["gptq"][phase]["host_bytes"]
    assert found["gptaq"]["written_bytes"] == found["gptq"]["written_bytes"]
