"""Peak memory does not grow with the number of experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from moe_families import moe_model
from safetensors.torch import save_file

Child = Callable[..., "CompletedProcess[str]"]

FEW, MANY = 16, 128
HIDDEN, INNER = 512, 256
#: Gate, up and down of one expert, in bf16.
EXPERT_BYTES = 3 * HIDDEN * INNER * 2

#: Experts of which each takes more than 8192 of 64 · 256 tokens.
MANY_TOKENS = {"num_experts": 4, "hidden_size": 512, "moe_intermediate_size": 1408}

PROGRAM = """
import json, re, sys
import bigq
from bigq.config import JobConfig
from bigq.scheme import QuantScheme

model, out, ids = sys.argv[1:4]
bigq.quantize(model, out, JobConfig(calibration=ids, samples=32, seqlen=256, batch=4, device="cpu", format="compressed-tensors",
                                    scheme=QuantScheme(bits=4, group_size=32), quiet=True))
print(json.dumps({"peak": int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024}))
"""
#: What a process holds that has only imported everything that a job needs.
IDLE = """
import re
import bigq, transformers.models.qwen3_moe.modeling_qwen3_moe, bigq.sched.run, bigq.kernels.cpu.columns, bigq.kernels.cpu.syrk
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


PLANNED = """
import json, sys
import bigq

model, out, ids, rows, seqlen, method = sys.argv[1:]
config = bigq.JobConfig(scheme=bigq.QuantScheme(group_size=32), calibration=ids, samples=int(rows), seqlen=int(seqlen), device="cpu",
                        method=method, format="compressed-tensors", quiet=True)
report = bigq.quantize(model, out, config)
print(json.dumps({"peak": report.host_peak_bytes, "planned": report.planned_host_bytes}))
"""


def peak(child: Child, folder: Path, experts: int) -> int:
    model = folder / str(experts)
    moe_model(
        "qwen3_moe",
        torch.bfloat16,
        num_experts=experts,
        num_experts_per_tok=4,
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        num_attention_heads=8,
        head_dim=64,
        num_hidden_layers=1,
        max_position_embeddings=512,
    ).save_pretrained(model)  # type: ignore[operator]
    done = child(
        "-c", PROGRAM, model, folder / f"{experts}-out", folder / "ids.safetensors", env={"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    )
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


@pytest.mark.long
def test_peak_does_not_follow_the_number_of_experts(child: Child, tmp_path: Path) -> None:
    """8 times as many experts of one size, 88 MB more of weights: within one expert's bytes and a tenth of what the job needs."""
    ids = torch.randint(3, 128, (32, 256), generator=torch.Generator().manual_seed(2))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    few, many = (peak(child, tmp_path, experts) for experts in (FEW, MANY))
    idle = child("-c", IDLE)
    assert idle.returncode == 0, idle.stderr
    needed = few - int(idle.stdout)
    assert needed > 0
    assert many - few < EXPERT_BYTES + needed / 10, f"{few / 2**20:.1f} MiB for {FEW} experts, {many / 2**20:.1f} MiB for {MANY}"


@pytest.mark.long
@pytest.mark.parametrize("method", ["gptq", "gptaq"])
@pytest.mark.parametrize(
    ("rows", "seqlen", "sizes"),
    [
        (8, 256, {"num_experts": 16, "hidden_size": 2048, "moe_intermediate_size": 2816}),
        (64, 256, MANY_TOKENS),
    ],
    ids=["large experts", "more tokens than an expert takes at a time"],
)
def test_the_peak_with_experts_is_within_a_tenth_of_the_plan(
    rows: int, seqlen: int, sizes: dict[str, int], method: str, child: Child, tmp_path: Path
) -> None:
    require_the_peak_of_the_plan(rows, seqlen, sizes, method, child, tmp_path)


@pytest.mark.long
def test_the_peak_with_scales_inside_experts_is_within_a_tenth_of_the_plan(child: Child, tmp_path: Path) -> None:
    require_the_peak_of_the_plan(64, 256, MANY_TOKENS, "awq", child, tmp_path)


def require_the_peak_of_the_plan(rows: int, seqlen: int, sizes: dict[str, int], method: str, child: Child, tmp_path: Path) -> None:
    attention = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512}
    model = moe_model("qwen3_moe", torch.bfloat16, **attention, num_experts_per_tok=4, num_hidden_layers=1, **sizes)
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    ids = torch.randint(3, 128, (rows, seqlen), generator=torch.Generator().manual_seed(2))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    names = (tmp_path / "model", tmp_path / "out", tmp_path / "ids.safetensors")
    done = child("-c", PLANNED, *names, str(rows), str(seqlen), method, env={"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["peak"] == pytest.approx(result["planned"], rel=0.1)
