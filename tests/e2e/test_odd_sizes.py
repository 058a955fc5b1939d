"""Linears whose sizes are no multiples of 32, in compressed-tensors: a whole job, its check, its conversion and its logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import make_checkpoint, random_ids, reference_model, save_ids, streamed_logits

import bigq
from bigq.conversion.convert import convert
from bigq.errors import UsageError
from bigq.inspect.verify import verify
from bigq.model.pager import Pager
from bigq.scheme import QuantScheme


@pytest.mark.parametrize(("bits", "group_size"), [(4, 8), (8, -1)])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_a_whole_job(bits: int, group_size: int, symmetric: bool, tmp_path: Path) -> None:
    """The vocabulary has 131 words, the feed-forward layer 200 units."""
    source = make_checkpoint(tmp_path / "m", "llama", num_hidden_layers=2, intermediate_size=200, vocab_size=131)
    ids = random_ids(8, 16)
    config = bigq.JobConfig(
        scheme=QuantScheme(bits=bits, group_size=group_size, symmetric=symmetric),
        format="compressed-tensors",
        lm_head=True,
        calibration=str(save_ids(tmp_path / "ids.safetensors", ids)),
        samples=8,
        seqlen=16,
        device="cpu",
        quiet=True,
    )
    report = bigq.quantize(str(source), tmp_path / "out", config)
    assert len(report.linears) == 15, "all Linears, and the head"
    assert verify(tmp_path / "out") == []
    model = reference_model(source)
    pager = Pager(tmp_path / "out", device=torch.device("cpu"), dtype="float32")
    assert len(pager.packed) == 15
    for name in pager.packed:
        dense, packed = model.get_parameter(name), pager.dequantized(name)
        assert packed.shape == dense.shape and float((packed - dense).norm() / dense.norm()) < (0.2 if bits == 4 else 0.02)
    limit = 0.5 if bits == 4 else 0.03
    with torch.no_grad():
        logits, exact = streamed_logits(tmp_path / "out", ids, 4), model(ids).logits
    assert float((logits - exact).norm() / exact.norm()) < limit
    with pytest.raises(UsageError, match=r"are 131 × 64|is 131 × 64|are 200 × 64.*packed dimensions must be multiples of 32"):
        convert(tmp_path / "out", tmp_path / "gptq", "gptq_v2")
