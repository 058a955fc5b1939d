"""Parts of the GPU session as tests: kernels on tensors of more than 2³¹ elements, and rates whatever precision the caller chose."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "scripts"))

import gpu_bench
from gpu_steps import large
from gpu_steps.setting import Findings, Setting

#: Free bytes that the checks of large tensors need: a matrix of 57344² in fp32, and what is made of it.
NEEDED = 40 * 2**30


def found_by(work: Path, *, smoke: bool) -> Findings:
    found = Findings(work / "large.json")
    large.run(Setting(step="large", work=work, smoke=smoke), found)
    return found


def test_the_checks_of_large_tensors_pass_on_small_ones(tmp_path: Path) -> None:
    found = found_by(tmp_path, smoke=True)
    assert found.failures == [] and {"permutation", "rank_update", "a finite matrix is finite"} <= set(found.values)


@pytest.mark.parametrize("kernel", ["syrk_", "is_finite", "mirror_", "permute_", "rank_update_"])
def test_the_checks_of_large_tensors_find_a_kernel_that_does_nothing(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, kernel, lambda *_: True)
    assert found_by(tmp_path, smoke=True).failures


@pytest.mark.gpu
def test_kernels_on_more_than_2_to_the_31_elements(tmp_path: Path) -> None:
    torch.cuda.empty_cache()  # of the tests before
    free = torch.cuda.mem_get_info()[0]
    if free < NEEDED:
        pytest.skip(f"needs {NEEDED / 2**30:.0f} GiB of free device memory, there are {free / 2**30:.1f}")
    assert found_by(tmp_path, smoke=False).failures == []


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_gpu_bench_keeps_the_caller_s_precision_of_fp32_products(precision: str) -> None:
    """And torch refuses to read its older flag once the caller has set the newer one."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        rates = gpu_bench.ceilings(gpu_bench.Bench(torch.device("cuda:0"), smoke=False))
        assert matmul.fp32_precision == precision
        assert rates["tf32_tflops"] > rates["fp32_tflops"], "one of the two was measured with the other's precision"
    finally:
        matmul.fp32_precision = before
