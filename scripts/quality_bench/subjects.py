"""The models that are quantized, each with its text, and whether it serves to choose settings or to judge them.

    subject          model                                                       half
    smollm2-docs     SmolLM2-135M-Instruct on technical English                  choosing
    smollm2-prose    the same on a novel                                         judging
    tiny-llama       the shipped model                                           choosing
    outliers         Qwen2's structure (biases of q, k and v), some inputs of every Linear 32 to 64 times larger     choosing
    opt              OPT's structure: biases everywhere, LayerNorm, ReLU, tied embeddings                            judging
    moe              Qwen3-MoE's structure, 32 experts in a layer                judging

Settings, defaults and options of bigq are chosen on the first half only. SmolLM2 is in both, with texts of different kinds: it is the only
model here that was trained on real text at length, so choosing without it would repeat the mistake of choosing on tiny models.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import train_moe
import train_small
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from quality_bench import corpora, smollm2
from quality_bench.corpora import ASSETS, CORPORA
from quality_bench.settings import DRAWS, Subject

Maker = Callable[[Path], dict[str, Any]]
#: A third of train_moe.py's own: minutes count here, where five models are made.
MOE_STEPS = 400


def shipped(out: Path) -> dict[str, Any]:
    shutil.copytree(ASSETS / "tiny-llama", out, dirs_exist_ok=True)
    return {"from": "bigq/assets/tiny-llama, trained by scripts/train_tiny.py"}


def moe(out: Path) -> dict[str, Any]:
    said = train_moe.make(out, MOE_STEPS)
    return {name: value for name, value in said.items() if name != "tokens_of_experts"}


MAKERS: dict[str, Maker] = {
    "smollm2": smollm2.make,
    "tiny-llama": shipped,
    "opt": partial(train_small.make, "opt"),
    "outliers": partial(train_small.make, "outliers"),
    "moe": moe,
}


def prepare_model(models: Path, name: str) -> Path:
    """MODELS/NAME, made unless it is there. origin.json, written last, says where it is from and its hash."""
    folder = models / name
    if not (folder / "origin.json").exists():
        print(f"making {folder.name}", file=sys.stderr, flush=True)
        said = MAKERS[name](folder)
        (folder / "origin.json").write_text(json.dumps(said | {"sha256_of_tensors": tensor_hash(folder)}, indent=1) + "\n")
    return folder


def tensor_hash(folder: Path) -> str:
    """SHA-256 over names and bytes of all tensors, however they are split into files."""
    digest = hashlib.sha256()
    tensors = {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(shard).items()}
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def alone(models: Path) -> Iterator[None]:
    """One process at a time: others wait until it has made what they need too."""
    models.mkdir(parents=True, exist_ok=True)
    with (models / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepare(models: Path, subject: Subject) -> Path:
    """MODELS/texts/SUBJECT with ids-DRAW.safetensors, windows.safetensors, and last facts.json. Returns the model's folder."""
    with alone(models):
        return _prepare(models, subject)


def _prepare(models: Path, subject: Subject) -> Path:
    folder, model = models / "texts" / subject.name, prepare_model(models, subject.model)
    if not (folder / "facts.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        corpus, tokenizer = CORPORA[subject.corpus](), AutoTokenizer.from_pretrained(model)
        draws = corpora.draws(corpus.calibration, tokenizer, subject.rows, subject.seqlen, DRAWS)
        for number, rows in enumerate(draws):
            save_file({"input_ids": rows.contiguous()}, folder / f"ids-{number}.safetensors")
        held = corpora.windows(corpus.heldout, tokenizer, subject.windows, subject.window)
        save_file({"input_ids": held.contiguous()}, folder / "windows.safetensors")
        (folder / "facts.json").write_text(json.dumps({"corpus": subject.corpus, "text": corpus.facts()}) + "\n")
    return model


def windows(models: Path, subject: Subject) -> Tensor:
    return load_file(models / "texts" / subject.name / "windows.safetensors")["input_ids"]


def ids_file(models: Path, subject: Subject, draw: int) -> Path:
    return models / "texts" / subject.name / f"ids-{draw}.safetensors"


def original_file(models: Path, subject: Subject) -> Path:
    """Where the judge keeps the original's hidden states on the windows; another model has another name."""
    digest = json.loads((models / subject.model / "origin.json").read_text())["sha256_of_tensors"]
    return models / "texts" / subject.name / f"original-{digest[:16]}.safetensors"
