#!/usr/bin/env python3
"""Train the tiny Llama that ships in ``bigq/assets/tiny-llama``.

Text: the sources of the Python standard library of the interpreter that runs this script (PSF licence, redistributable;
without tests, IDLE and vendored wheels). Files are split by a hash of their relative path: 1/32 of them are held out, 1/32 are
for calibration, the rest is for training. The two small parts become the text files that ship with the package.

The tokenizer is byte-level (token id = byte value, then ``<s>`` and ``</s>``). Training uses AdamW, bf16
autocast over fp32 master weights and a warm-up / constant / linear-decay schedule, so that a run can be
stopped and resumed with another ``--steps``.

All embeddings start near one common vector. Large models develop such a direction, shared by all tokens, during training
(Ethayarajh 2019; Sun et al. 2024, "massive activations"). It makes them sensitive to rounding: the error of a row of weights
along it is the same for every token. A model of this size does not develop it by itself: without it, the perplexity of a model
trained on 8 M tokens (2 layers of width 512) rose by only 17 % with 2-bit rounding to nearest.

    python scripts/train_tiny.py --work /tmp/tiny --steps 12000 --stop-at 1800
    python scripts/train_tiny.py --work /tmp/tiny --steps 2200 --out bigq/assets
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pathlib
import platform
import sysconfig
import time

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXCLUDED_DIRS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}
CONFIG = LlamaConfig(
    vocab_size=258,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    bos_token_id=256,
    eos_token_id=257,
    attn_implementation="eager",  # a sixth less time for a step on a CPU, at this size
)

#: Length of the common vector of the embeddings, in standard deviations of their initial values.
COMMON = 24

SHARD_SIZE = "2MB"
CALIBRATION_BYTES = 160_000
HELDOUT_BYTES = 80_000


def corpus() -> tuple[bytes, bytes, bytes]:
    """The (train, calibration, held-out) text, in a fixed order of files."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[bytes]] = {"train": [], "calibration": [], "heldout": []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_DIRS & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        bucket = hashlib.sha256(relative.as_posix().encode()).digest()[0] % 32
        part = {0: "heldout", 1: "calibration"}.get(bucket, "train")
        parts[part].append(text.encode() + b"\n\n")
    return b"".join(parts["train"]), excerpts(parts["calibration"], CALIBRATION_BYTES), excerpts(parts["heldout"], HELDOUT_BYTES)


def excerpts(files: list[bytes], size: int) -> bytes:
    """At most an equal share of each file, cut at line ends, so that no single long file dominates."""
    share = size // len(files)
    taken = []
    for text in files:
        taken.append(text if len(text) <= 2 * share else text[: text.rfind(b"\n", 0, 2 * share) + 1])
    joined = b"".join(taken)
    return joined[: joined.rfind(b"\n", 0, size) + 1]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the bytes of the text, without special tokens at the ends."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    alphabet = {b: chr(b) if b in visible else chr(next(spare)) for b in range(256)}
    vocab = {alphabet[b]: b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=256)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up for 200 steps, constant, then linear to 1 % of the peak over the last 35 %."""
    decay_from = int(steps * 0.65)
    if step < 200:
        return peak * (step + 1) / 200
    if step < decay_from:
        return peak
    return peak * max(0.01, (steps - step) / (steps - decay_from))


def perplexity(model: LlamaForCausalLM, text: bytes, seqlen: int) -> float:
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows.to(model.device).split(16):
            with torch.autocast(model.device.type, torch.bfloat16):
                loss = model(row, labels=row).loss
            total += loss.item() * row.shape[0]
            count += row.shape[0]
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for the resumable training state")
    parser.add_argument("--out", type=pathlib.Path, help="write the model and the text files here at the end")
    parser.add_argument("--steps", type=int, default=6000, help="length of the learning-rate schedule")
    parser.add_argument("--stop-at", type=int, help="end after this many steps of the schedule")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.0, help="weight decay")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    train, calibration, heldout = corpus()
    print(f"text: {len(train):,} bytes to train on, {len(calibration):,} calibration, {len(heldout):,} held out", flush=True)
    data = torch.frombuffer(bytearray(train), dtype=torch.uint8)

    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).float()
    with torch.no_grad():
        model.model.embed_tokens.weight += COMMON * CONFIG.initializer_range * torch.randn(1, CONFIG.hidden_size)
    model.to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": args.decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    state_file, first, seconds = args.work / "state.pt", 0, 0.0
    runs: list[str] = []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=args.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, runs = state["step"], state["seconds"], state["runs"]
    started = time.monotonic() - seconds

    last = min(args.stop_at or args.steps, args.steps)
    if last > first:
        runs.append(f"--steps {args.steps} --stop-at {last} --batch {args.batch} --seqlen {args.seqlen} --lr {args.lr}")
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(0, len(data) - args.seqlen, (args.batch,), generator=generator)
        batch = torch.stack([data[s : s + args.seqlen] for s in starts.tolist()]).long().to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0:
            print(f"step {step + 1} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == last:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "runs": runs}
            state["seconds"] = time.monotonic() - started
            torch.save(state, args.work / "state.tmp")
            os.replace(args.work / "state.tmp", state_file)
            print(f"step {step + 1} held-out perplexity {perplexity(model, heldout, args.seqlen):.4f}", flush=True)

    if args.out:
        target = args.out / "tiny-llama"
        model.to("cpu", torch.bfloat16).save_pretrained(target, max_shard_size=SHARD_SIZE)
        byte_tokenizer().save_pretrained(target)
        (args.out / "calibration.txt").write_bytes(calibration)
        (args.out / "heldout.txt").write_bytes(heldout)
        licence = pathlib.Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
        (args.out / "LICENSE-PSF.txt").write_bytes(licence.read_bytes())
        origin = {
            "text": f"Python {platform.python_version()} standard library sources, PSF licence",
            "steps": last,
            "tokens": last * args.batch * args.seqlen,
            "heldout_perplexity": perplexity(model.float(), heldout, args.seqlen),
            "seconds": round(time.monotonic() - started),
            "commands": [f"python scripts/train_tiny.py {run}" for run in runs],
        }
        (target / "training.json").write_text(json.dumps(origin, indent=2) + "\n")


if __name__ == "__main__":
    main()
