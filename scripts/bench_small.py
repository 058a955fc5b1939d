#!/usr/bin/env python3
"""Measure wall time, CPU time and memory of ``bigq quantize`` as a whole process, on a small Llama-shaped model with random weights.

8 blocks, hidden 1024, intermediate 2816, 8 heads, 4 key/value heads, vocabulary 4096, bf16; 32 × 512 tokens; 4 bits,
groups of 128, symmetric. Compare CPU figures only with other programs on the same machine, run in turn.

    python scripts/bench_small.py --work /tmp/bench --json docs/results/bench_small.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 4096
ROWS, SEQLEN = 32, 512


def make_inputs(model: Path, ids: Path) -> None:
    """Write the model folder and the file of token ids (Zipf-distributed).

    Runs in a separate process: the peak memory of a child starts at its parent's, so the measuring process must stay small.
    """
    import torch
    from shapes import write_ids, zipf_ids
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model, max_shard_size="45MB")
    # The rows are token ids, but other programs ask for a tokenizer.
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0").save_pretrained(model)
    write_ids(ids, zipf_ids(ROWS, SEQLEN, VOCABULARY))


def measure(model: Path, ids: Path, out: Path) -> dict[str, float]:
    """One run in a separate process: wall seconds, CPU seconds, peak resident MiB."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "bigq", "quantize", str(model), str(out), "--calibration", str(ids)]
    command += ["--samples", str(ROWS), "--seqlen", str(SEQLEN), "--device", "cpu", "--quiet"]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    if status:
        sys.exit(f"bench_small: bigq ended with status {os.waitstatus_to_exitcode(status)}")
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_rss_mib": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model and the output")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model, ids = args.work / "llama-small", args.work / "tokens.safetensors"
    if not ids.exists():
        maker = multiprocessing.get_context("spawn").Process(target=make_inputs, args=(model, ids))
        maker.start()
        maker.join()
    runs = [measure(model, ids, args.work / "out") for _ in range(args.runs)]
    print(f"{'run':>4} {'wall s':>8} {'CPU s':>8} {'peak MiB':>9}")
    for i, run in enumerate(runs):
        print(f"{i:>4} {run['wall_s']:>8.1f} {run['cpu_s']:>8.1f} {run['peak_rss_mib']:>9.0f}")
    result = {
        "command": "python scripts/bench_small.py --work DIR --json docs/results/bench_small.json",
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "cores": os.cpu_count(),
        "revision": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "runs": runs,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
