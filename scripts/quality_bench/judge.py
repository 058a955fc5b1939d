"""Judging: the KL divergence from the original, the negative log likelihood and the agreement of the top token, window by window.

No part of bigq takes part: a quantized model is a dense checkpoint here, run by transformers in fp32. ``dense_from_gptq`` unpacks what
bigq wrote.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

#: Positions whose distributions over the vocabulary are compared at once.
POSITIONS = 256
BATCH = 8

logging.disable_progress_bar()


class Judge:
    """Compares models with an original on rows of token ids int64 [N, T], which predict T − 1 tokens each."""

    def __init__(self, original: Path, rows: Tensor, kept: Path) -> None:
        """kept: a file for the original's hidden states, which it computes once."""
        self._rows = rows
        model = load(original)
        self._head = model.get_output_embeddings()
        if not kept.exists():
            partial = kept.with_suffix(f".{os.getpid()}.tmp")
            save_file({"hidden": hidden_states(model, rows)}, partial)
            os.replace(partial, kept)
        self._hidden = load_file(kept)["hidden"]
        require_head(model, self._hidden[:1], rows[:1])

    @torch.no_grad()
    def judge(self, folder: Path) -> dict[str, Any]:
        """Means over a window's tokens, in nats per token, one figure per window; top1: the share of tokens."""
        model = load(folder)
        return self.compare(hidden_states(model, self._rows), model.get_output_embeddings())

    @torch.no_grad()
    def compare(self, hidden: Tensor, head: torch.nn.Module) -> dict[str, Any]:
        """hidden: [N, T, D] behind the last norm."""
        found: dict[str, list[float]] = {"kl": [], "nll": [], "original_nll": [], "top1": []}
        for row, ours, theirs in zip(self._rows, hidden, self._hidden, strict=True):
            sums = torch.zeros(4, dtype=torch.float64)
            for lo in range(0, len(row) - 1, POSITIONS):
                hi = min(lo + POSITIONS, len(row) - 1)
                p, q = (log_probabilities(part[lo:hi], h) for part, h in ((ours, head), (theirs, self._head)))
                targets = row[lo + 1 : hi + 1, None]
                agreed = (p.argmax(-1) == q.argmax(-1)).sum()
                kl = (q.exp() * (q - p)).sum(-1).double().sum()
                sums += torch.stack([kl, -p.gather(1, targets).double().sum(), -q.gather(1, targets).double().sum(), agreed.double()])
            for values, total in zip(found.values(), sums.tolist(), strict=True):
                values.append(total / (len(row) - 1))
        return found


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def hidden_states(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """What the output head takes: [N, T, D], fp32."""
    return torch.cat([model.base_model(input_ids=part, use_cache=False).last_hidden_state for part in rows.split(BATCH)])


@torch.no_grad()
def require_head(model: PreTrainedModel, hidden: Tensor, rows: Tensor) -> None:
    """Raises ValueError for a model that does more to its hidden states than its head does."""
    logits = model(input_ids=rows, use_cache=False).logits
    if not torch.allclose(model.get_output_embeddings()(hidden), logits, atol=1e-4, rtol=1e-4):
        raise ValueError(f"{type(model).__name__}: logits are not the output head's of the last hidden states")


def log_probabilities(hidden: Tensor, head: torch.nn.Module) -> Tensor:
    result: Tensor = head(hidden).log_softmax(-1)
    return result


def dense_from_gptq(original: Path, packed: Path, out: Path) -> int:
    """Write a dense checkpoint in OUT from a folder of format gptq_v2. Returns the number of packed Linears."""
    stored = {name: t for shard in sorted(packed.glob("*.safetensors")) for name, t in load_file(shard).items()}
    names = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    weights = {}
    for name in names:
        qweight, qzeros, scales, groups = (stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
        bits = 32 * len(qweight) // len(groups)  # Linears may differ
        codes = unpacked(qweight, bits)
        zeros = unpacked(qzeros.T.contiguous(), bits).T[groups.long()]
        weights[f"{name}.weight"] = (scales.float()[groups.long()] * (codes - zeros)).T.contiguous()
    packed_parts = {f"{name}.{part}" for name in names for part in ("qweight", "qzeros", "scales", "g_idx")}
    write_dense(original, weights, out, {name: t for name, t in stored.items() if name not in packed_parts})
    settings = json.loads((packed / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if key != "quantization_config"}))
    return len(names)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [k · bits / 32, n] → codes fp32 [k, n]: a stream of bits down the first dimension, lowest first."""
    stream = (words.unsqueeze(1) >> torch.arange(32).view(1, 32, 1)) & 1
    weights = (2 ** torch.arange(bits)).view(1, bits, 1)
    return (stream.reshape(-1, bits, words.shape[1]) * weights).sum(1).float()


def original_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(shard).items()}


def write_dense(original: Path, weights: Mapping[str, Tensor], out: Path, others: Mapping[str, Tensor] | None = None) -> None:
    """The original with some weights replaced, as one file. Raises ValueError unless each of them replaces another.

    others: the output's unquantized tensors, where these may be other ones, as those of a rotated model are.
    """
    before = original_tensors(original)
    require_replaced(before, weights)
    out.mkdir(parents=True, exist_ok=True)
    save_file(before | dict(others or {}) | dict(weights), out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(original / "config.json", out)


def require_replaced(before: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """A program's names must be the checkpoint's, or its weights would be beside the original's, which would be judged."""
    for name, weight in weights.items():
        if name not in before or before[name].shape != weight.shape:
            raise ValueError(f"{name} is not a weight of the original with the same shape")
        if torch.equal(before[name].float(), weight.float()):
            raise ValueError(f"{name} is as it was before quantization")
