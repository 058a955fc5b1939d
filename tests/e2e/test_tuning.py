"""Jobs with ``--tune-steps``: scales change and codes do not, no block's error grows, and stopped jobs end with the same bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import packed_prefixes, stored_tensors
from test_gptaq import hashes, interrupt, job

import bigq
from bigq.cli.main import main
from bigq.errors import UsageError
from bigq.sched.solve import tune

STEPS = 12


@pytest.fixture(scope="module")
def whole(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, steps) → the output of an uninterrupted run; each is run once."""
    known: dict[tuple[str, int], Path] = {}

    def get(family: str, steps: int = STEPS) -> Path:
        if (family, steps) not in known:
            known[family, steps] = tmp_path_factory.mktemp("tuned") / "out"
            bigq.quantize(str(checkpoint(family)), known[family, steps], job(ids_file, tune_steps=steps))
        return known[family, steps]

    return get


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_first_block_keeps_its_codes_and_zero_points(family: str, whole: Callable[..., Path]) -> None:
    tuned, plain = stored_tensors(whole(family)), stored_tensors(whole(family, 0))
    first = [p for p in packed_prefixes(plain) if re.search(r"\.0\.", p)]
    assert first
    for prefix in first:
        assert torch.equal(tuned[f"{prefix}.qweight"], plain[f"{prefix}.qweight"])
        assert torch.equal(tuned[f"{prefix}.qzeros"], plain[f"{prefix}.qzeros"])
    assert not all(torch.equal(tuned[f"{prefix}.scales"], plain[f"{prefix}.scales"]) for prefix in first)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_error_grows_and_some_fall(
    family: str, checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = job(ids_file, tune_steps=STEPS, quiet=False)
    bigq.quantize(str(checkpoint(family)), tmp_path / "out", config)
    said = re.findall(r"tuned, error of its outputs (\S+) → (\S+)", capsys.readouterr().err)
    pairs = [(float(before), float(after)) for before, after in said]
    assert len(pairs) > 1
    assert all(after <= before for before, after in pairs)
    assert any(after < 0.98 * before for before, after in pairs)


@pytest.mark.parametrize("every", [0.0, None], ids=["from a checkpoint", "from the first block"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stopped_job_ends_with_the_same_bytes(
    family: str, every: float | None, checkpoint: Callable[[str], Path], ids_file: Path, whole: Callable[..., Path], tmp_path: Path
) -> None:
    out, config = tmp_path / "out", job(ids_file, checkpoint_every=every, tune_steps=STEPS)
    interrupt(2, checkpoint(family), out, config)
    bigq.quantize(str(checkpoint(family)), out, config)
    assert hashes(out) == hashes(whole(family))


@pytest.mark.parametrize("every", [0.0, None], ids=["from a checkpoint", "from the first block"])
def test_job_stopped_while_it_tunes_ends_with_the_same_bytes(
    every: float | None, checkpoint: Callable[[str], Path], ids_file: Path, whole: Callable[..., Path], tmp_path: Path
) -> None:
    out, config = tmp_path / "out", job(ids_file, checkpoint_every=every, tune_steps=STEPS)
    real, steps = tune.rate_at, []

    def stopping(*args: float) -> float:
        steps.append(args)
        if len(steps) == STEPS + 5:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "rate_at", stopping)
        with pytest.raises(KeyboardInterrupt):
            bigq.quantize(str(checkpoint("llama")), out, config)
    assert bigq.quantize(str(checkpoint("llama")), out, config).resumed_blocks == 1
    assert hashes(out) == hashes(whole("llama"))


def test_another_number_of_steps_is_refused(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(2, checkpoint("llama"), out, job(ids_file, tune_steps=STEPS))
    with pytest.raises(UsageError, match="tune-steps"):
        bigq.quantize(str(checkpoint("llama")), out, job(ids_file, tune_steps=STEPS + 1))


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_methods_without_rows_of_the_original_model_are_refused(
    method: str, checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--group-size", "32", "--tune-steps", "3", "--device", "cpu", "--method", method, "--calibration", str(ids_file)]
    assert main(["quantize", str(checkpoint("llama")), str(tmp_path / "out"), *arguments]) == 2
    assert "--tune-steps 3: no effect without --method gptaq; add that, or leave out --tune-steps" in capsys.readouterr().err
