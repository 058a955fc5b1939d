#!/usr/bin/env python3
"""QLoRA on an output of bigq: train LoRA adapters with PEFT, see the loss fall on held-out text, and merge them into the original model.

    python scripts/train_adapter.py OUT --original MODEL --text 'docs/*.md' --heldout docs/formats.md --save FOLDER [--json FILE]

Runs where transformers, PEFT and the packages that read OUT are installed (docs/adapters.md); bigq itself is not needed. OUT stays as it
is: only adapters are trained. The merged model is in FOLDER/merged, the adapter in FOLDER/adapter. --json adds a row to a result file.
"""

from __future__ import annotations

import argparse
import glob
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent))

from facts import revision, version_of

#: Names of the Linears that get adapters, in families like Llama.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows_of(tokenizer: Any, files: list[str], length: int) -> Tensor:
    """Token ids [rows, length] of some text files."""
    text = "\n\n".join(Path(file).read_text(encoding="utf-8") for file in files)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Tensor, batch: int) -> float:
    """The mean negative log-likelihood of a token. In training mode, which changes nothing without dropout: on a CPU, bitsandbytes would
    repack its weights for inference, and has no gradients from then on."""
    model.train()
    return float(torch.stack([model(input_ids=part, labels=part).loss for part in rows.split(batch)]).mean())


def load(folder: str) -> PreTrainedModel:
    """In fp32. GPTQModel's usual kernels have no gradients, so it is told to choose one that has."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    is_gptq = config.get("quant_method") == "gptq"
    more = {"quantization_config": GPTQConfig(bits=config["bits"], backend="auto_trainable")} if is_gptq else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)


def train(model: nn.Module, rows: Tensor, steps: int, batch: int, rate: float) -> list[float]:
    """The losses of the steps."""
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(adapters, lr=rate), []
    for step in range(steps):
        part = rows[torch.arange(step * batch, (step + 1) * batch) % len(rows)]
        loss = model(input_ids=part, labels=part, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", help="a quantized model, written by bigq")
    parser.add_argument("--original", required=True, help="the unquantized model, into which the adapters are merged")
    parser.add_argument("--text", required=True, help="pattern of text files to train on")
    parser.add_argument("--heldout", required=True, help="a text file that the loss is measured on; left out of --text")
    parser.add_argument("--save", type=Path, required=True, help="folder for the adapter and the merged model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step (default: 8)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (default: 128)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (default: 0.001)")
    parser.add_argument("--name", help="name of the row in the result file")
    parser.add_argument("--json", type=Path, help="result file")
    given = parser.parse_args()
    torch.manual_seed(0)
    began = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(given.out)
    files = sorted(file for file in glob.glob(given.text) if Path(file).resolve() != Path(given.heldout).resolve())
    rows, heldout = rows_of(tokenizer, files, given.length), rows_of(tokenizer, [given.heldout], given.length)
    model = load(given.out)
    before = mean_loss(model, heldout, given.batch)
    tuned = get_peft_model(model, LoraConfig(r=given.rank, lora_alpha=given.rank, target_modules=TARGETS, task_type="CAUSAL_LM"))
    losses = train(tuned, rows, given.steps, given.batch, given.rate)
    after = mean_loss(tuned, heldout, given.batch)
    tuned.save_pretrained(given.save / "adapter")
    original = load(given.original)
    unquantized = mean_loss(original, heldout, given.batch)
    merged = PeftModel.from_pretrained(original, given.save / "adapter").merge_and_unload()
    row = {
        "revision": revision(),
        "versions": {name: version_of(name) for name in ("torch", "transformers", "peft")},
        "steps": given.steps,
        "tokens_trained": given.steps * given.batch * given.length,
        "heldout_tokens": heldout.numel(),
        "loss_original": unquantized,
        "loss_before": before,
        "loss_of_first_steps": losses[:3],
        "loss_of_last_steps": losses[-3:],
        "loss_after": after,
        "loss_merged_into_original": mean_loss(merged, heldout, given.batch),
        "trained_parameters": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        "seconds": round(time.monotonic() - began, 1),
    }
    merged.save_pretrained(given.save / "merged")
    tokenizer.save_pretrained(given.save / "merged")
    print(json.dumps(row, indent=2))
    if given.json is not None:
        result = json.loads(given.json.read_text(encoding="utf-8")) if given.json.exists() else {}
        result[given.name or Path(given.out).name] = row
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
