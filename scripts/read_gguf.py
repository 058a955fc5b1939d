#!/usr/bin/env python3
"""Compute llama.cpp's logits for token ids, and its tokens for texts. Needs llama-cpp-python; does not need bigq.

    python scripts/read_gguf.py JOBS.json     # [{"gguf": FILE, "ids": [[…], …], "texts": […], "specials": BOOL, "out": FILE.npz}, …]

Writes for each job ``logits`` [rows, T, vocabulary], ``tokens`` (of all texts, joined; ``lengths`` has the number of each) and
``version``. Keys and values are stored in fp32, so that only the types of the weights cause differences.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

F32 = 0


def read(job: dict[str, Any]) -> None:
    longest = max([len(row) for row in job["ids"]] or [1])
    model = llama_cpp.Llama(
        job["gguf"], n_ctx=max(64, longest), logits_all=True, n_threads=2, type_k=F32, type_v=F32, flash_attn=False, verbose=False
    )
    logits = []
    for row in job["ids"]:
        model.reset()
        model.eval(row)
        logits.append(np.array(model.scores[: len(row)], dtype=np.float32))
    tokens = [model.tokenize(text.encode(), add_bos=job["specials"], special=job["specials"]) for text in job["texts"]]
    np.savez(
        job["out"],
        logits=np.stack(logits) if logits else np.zeros((0, 0, 0), np.float32),
        tokens=np.array([token for text in tokens for token in text], dtype=np.int64),
        lengths=np.array([len(text) for text in tokens], dtype=np.int64),
        version=np.array(llama_cpp.__version__),
    )
    model.close()


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        read(job)


if __name__ == "__main__":
    main()
