#!/usr/bin/env python3
"""Check that llama.cpp computes the same from bigq's GGUF files as bigq computes from the quantized folders.

The script quantizes tiny models of each family and writes GGUF files. llama.cpp reads them in a separate process
(``scripts/read_gguf.py``, run by the Python that has llama-cpp-python). Its logits are compared with those of the dequantized
weights in fp32. Each file has a control with the same weights as F32, which shows llama.cpp's own arithmetic error. llama.cpp
multiplies quantized blocks with 8-bit activations, so the logits of packed files differ more; ``tests/e2e/test_gguf.py`` checks
their weights bit by bit. A file with the rows of q and k in transformers' order must fail the comparison.

Then the script trains a tokenizer of every kind that ``bigq.io.gguf_vocab`` supports on the shipped text, and compares the tokens
of both programs.

    python scripts/check_gguf.py --reader VENV/bin/python --work DIR --json docs/results/clients_llamacpp.json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from models import FIRST_ID, VOCABULARY, make_checkpoint, random_ids, save_ids, streamed_logits
from tokenizers_for_gguf import TEXTS, TOKENIZERS, save_tokenizer

import bigq
from bigq.calibration import evaluation_rows
from bigq.conversion import gguf, gguf_families
from bigq.conversion.gguf import write_gguf
from bigq.data.opening import ASSETS, BUILTIN_HELDOUT
from bigq.data.tokenizer import load_tokenizer
from bigq.io import gguf_vocab
from bigq.model.pager import Pager

CPU = torch.device("cpu")
ROWS = 4
#: Largest error of a control, relative to the standard deviation of the logits; how many times larger the negative control's must be.
CONTROL_LIMIT, NEGATIVE_FACTOR = 2e-3, 100
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Kinds of tokenizers that differ only in how they split text into words.
SPLITTINGS = {"gpt-2", "llama-bpe", "qwen2"}
_WIDE = {"hidden_size": 256, "intermediate_size": 512}
_ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 32}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, how it is quantized, and the GGUF type of its Linears. positions: tokens per row."""

    name: str
    type: str
    family: str = "llama"
    dtype: str = "float32"
    model: Mapping[str, Any] = field(default_factory=dict)
    scheme: Mapping[str, Any] = field(default_factory=dict)
    rules: Sequence[bigq.Rule] = ()
    format: str = "gptq"
    positions: int = 64


CASES = (
    Case(name="llama, groups of 32", type="Q4_0", scheme={"group_size": 32}),
    Case(name="llama, groups of 128", type="Q4_0", model=_WIDE, scheme={"group_size": 128}),
    Case(name="llama, one group", type="Q4_0", scheme={"group_size": -1}),
    Case(name="llama, from compressed-tensors", type="Q4_0", scheme={"group_size": 32}, format="compressed-tensors"),
    Case(name="llama, act-order", type="Q4_0", scheme={"group_size": 32, "order": "activation"}),
    Case(name="llama, 8 bits, groups of 32", type="Q8_0", scheme={"bits": 8, "group_size": 32}),
    Case(name="llama, 8 bits, one group", type="Q8_0", scheme={"bits": 8, "group_size": -1}),
    Case(name="llama, asymmetric, groups of 32", type="Q4_1", scheme={"group_size": 32, "symmetric": False, "scale_bits": 7}),
    Case(
        name="llama, asymmetric, groups of 128", type="Q4_1", model=_WIDE, scheme={"group_size": 128, "symmetric": False, "scale_bits": 7}
    ),
    Case(
        name="llama, mixed, bf16",
        type="mixed",
        dtype="bfloat16",
        scheme={"group_size": 32},
        format="gguf",
        rules=(bigq.Rule(r".*v_proj$", {"bits": 8}), bigq.Rule(r".*\.1\..*(k|down)_proj$", None)),
    ),
    Case(name="llama, fp16", type="Q4_0", dtype="float16", scheme={"group_size": 32}),
    Case(name="llama, tied", type="Q4_0", model={"tie_word_embeddings": True}, scheme={"group_size": 32}),
    Case(name="llama, biases", type="Q4_0", model={"attention_bias": True, "mlp_bias": True}, scheme={"group_size": 32}),
    Case(name="llama, heads of 32", type="Q4_0", model={"head_dim": 32}, scheme={"group_size": 32}),
    Case(
        name="llama, frequencies of Llama 3",
        type="Q4_0",
        model={"rope_parameters": {**_ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        scheme={"group_size": 32},
    ),
    Case(
        name="llama, linear scaling",
        type="Q4_0",
        model={"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}},
        scheme={"group_size": 32},
    ),
    Case(
        name="llama, yarn",
        type="Q4_0",
        model={"head_dim": 32, "rope_parameters": {**_ROPE, "rope_type": "yarn", "factor": 4.0}},
        scheme={"group_size": 32},
    ),
    Case(name="mistral", type="Q4_0", family="mistral", model={"sliding_window": None}, scheme={"group_size": 32}),
    Case(name="mistral, as far as its window", type="Q4_0", family="mistral", scheme={"group_size": 32}, positions=16),
    Case(name="qwen2", type="Q4_0", family="qwen2", model={"use_sliding_window": False}, scheme={"group_size": 32}),
    Case(
        name="qwen2, tied, asymmetric",
        type="Q4_1",
        family="qwen2",
        model={"use_sliding_window": False, "tie_word_embeddings": True},
        scheme={"group_size": -1, "symmetric": False, "scale_bits": 7},
    ),
    Case(name="qwen3", type="Q4_0", family="qwen3", scheme={"group_size": 32}),
    Case(name="qwen3, 8 bits, heads of 32", type="Q8_0", family="qwen3", model={"head_dim": 32}, scheme={"bits": 8, "group_size": 32}),
)


class Asked(NamedTuple):
    """A request to llama.cpp for one file: logits of rows of token ids, tokens of texts."""

    gguf: Path
    ids: Sequence[Sequence[int]] = ()
    texts: Sequence[str] = ()
    specials: bool = False


class Reader:
    """llama.cpp, in another Python."""

    def __init__(self, python: Path, work: Path) -> None:
        self.python, self.work, self.version = python, work, ""

    def read(self, *files: Asked) -> list[tuple[Tensor, list[list[int]]]]:
        """For each file: logits [rows, T, vocabulary], tokens of each text."""
        path = self.work / "jobs.json"
        outs = [self.work / f"read-{i}.npz" for i in range(len(files))]
        jobs = [
            {"gguf": str(file.gguf), "ids": file.ids, "texts": file.texts, "specials": file.specials, "out": str(out)}
            for file, out in zip(files, outs, strict=True)
        ]
        path.write_text(json.dumps(jobs), encoding="utf-8")
        done = subprocess.run([self.python, ROOT / "scripts/read_gguf.py", path], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{self.work}: llama.cpp failed\n{done.stderr[-2000:]}")
        result = []
        for got in map(np.load, outs):
            self.version = str(got["version"])
            tokens = [part.tolist() for part in np.split(got["tokens"], got["lengths"].cumsum()[:-1])]
            result.append((torch.from_numpy(got["logits"]), tokens))
        return result


def compared(reference: Tensor, got: Tensor) -> dict[str, float]:
    """Largest difference (also relative to the reference's standard deviation), mean KL divergence, share of equal top tokens."""
    reference, got = reference.double(), got.double()
    p, q = reference.log_softmax(-1), got.log_softmax(-1)
    worst = float((reference - got).abs().max())
    return {
        "max_abs": worst,
        "of_spread": worst / float(reference.std()),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "top1": float((reference.argmax(-1) == got.argmax(-1)).double().mean()),
    }


def save_dequantized(folder: Path, out: Path) -> Path:
    """The model of a packed folder as an fp32 checkpoint, without a tokenizer."""
    pager = Pager(folder, device=CPU, dtype="float32")
    out.mkdir()
    tensors = {}
    for i in range(len(pager.blocks)):
        pager.load_block(i)
        tensors |= {name: pager.model.get_parameter(name).detach().clone() for name in pager.block_names(i)}
        pager.evict_block(i)
    with pager.rest_loaded():
        tensors |= {name: pager.model.get_parameter(name).detach().clone() for name in pager.rest_names()}
    with pager.head_loaded():
        tensors["lm_head.weight"] = pager.head.weight.detach().clone()
    with pager.embedding_rows(torch.arange(pager.embedding.num_embeddings)):
        tensors["model.embed_tokens.weight"] = pager.embedding.weight.detach().clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return out


@contextlib.contextmanager
def rows_in_transformers_order() -> Iterator[None]:
    """Write the rows of q and k in transformers' order for every family."""
    families = {kind: dataclasses.replace(family, paired=()) for kind, family in gguf_families.FAMILIES.items()}
    with mock.patch.object(gguf_families, "FAMILIES", families):
        yield


def compare_case(reader: Reader, work: Path, name: str, folder: Path, ids: Tensor, texts: Sequence[str] = ()) -> dict[str, Any]:
    """Compare llama.cpp's logits of a packed folder with bigq's. ``tokens``: llama.cpp's tokens of the texts."""
    reference = streamed_logits(folder, ids, 1, "float32")
    files = {what: work / f"{what}.gguf" for what in ("packed", "control", "rows_not_in_order")}
    write_gguf(folder, files["packed"])
    plain = save_dequantized(folder, work / "plain")
    write_gguf(plain, files["control"])
    with rows_in_transformers_order():
        write_gguf(plain, files["rows_not_in_order"])
    if files["control"].read_bytes() == files["rows_not_in_order"].read_bytes():
        del files["rows_not_in_order"]  # GGUF files of this family have them in transformers' order
    read = reader.read(*(Asked(file, ids.tolist(), texts if what == "packed" else ()) for what, file in files.items()))
    row: dict[str, Any] = {"case": name, "bytes": files["packed"].stat().st_size}
    row |= {what: compared(reference, logits) for what, (logits, _) in zip(files, read, strict=True)}
    row["sound"] = row["control"]["of_spread"] < CONTROL_LIMIT
    if "rows_not_in_order" in row:
        row["sound"] &= row["rows_not_in_order"]["of_spread"] > NEGATIVE_FACTOR * CONTROL_LIMIT
    return row | ({"tokens": read[0][1]} if texts else {})


def model_case(reader: Reader, work: Path, case: Case) -> dict[str, Any]:
    source = make_checkpoint(work / "source", case.family, dtype=DTYPES[case.dtype], **case.model)
    config = bigq.JobConfig(
        scheme=bigq.QuantScheme(**case.scheme),
        rules=tuple(case.rules),
        format=case.format,
        calibration=str(save_ids(work / "ids.safetensors", random_ids())),
        samples=16,
        seqlen=40,
        quiet=True,
    )
    bigq.quantize(str(source), str(work / "out"), config)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(FIRST_ID, VOCABULARY, (ROWS, case.positions), generator=generator)
    return {"type": case.type, **compare_case(reader, work, case.name, work / "out", ids)}


def shipped_case(reader: Reader, work: Path, bits: int, symmetric: bool, group_size: int) -> dict[str, Any]:
    """The shipped model and its tokenizer, on its held-out text."""
    source = ASSETS / "tiny-llama"
    scheme = bigq.QuantScheme(
        bits=bits, group_size=group_size, symmetric=symmetric, order="activation", scale_bits=None if symmetric else 7
    )
    config = bigq.JobConfig(scheme=scheme, calibration="builtin", samples=64, dtype="float32")
    bigq.quantize(str(source), str(work / "out"), config)
    ids = evaluation_rows("builtin", source, seqlen=256, samples=ROWS)
    text = BUILTIN_HELDOUT.read_text(encoding="utf-8")[:20000]
    row = compare_case(reader, work, f"shipped model, {bits} bits, groups of {group_size}", work / "out", ids, [text])
    row["tokens_equal"] = row.pop("tokens") == [load_tokenizer(source)(text, add_special_tokens=False).input_ids]
    row["sound"] &= row["tokens_equal"]
    return {"type": {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}[bits, symmetric], **row}


def tokenizer_case(reader: Reader, work: Path, kind: str) -> dict[str, Any]:
    """Train a tokenizer of this kind on the shipped text, and compare its tokens with llama.cpp's."""
    folder = work / "model"
    folder.mkdir()
    tokenizer = save_tokenizer(folder, kind)
    make_checkpoint(folder, "llama", vocab_size=tokenizer.get_vocab_size() + 3)
    write_gguf(folder, work / "model.gguf")
    row: dict[str, Any] = {"case": kind, "texts": len(TEXTS), "tokens": 0, "different": []}
    both = reader.read(*(Asked(work / "model.gguf", texts=TEXTS, specials=specials) for specials in (False, True)))
    for specials, (_, got) in zip((False, True), both, strict=True):
        for text, ids in zip(TEXTS, got, strict=True):
            expected = tokenizer.encode(text, add_special_tokens=specials).ids
            row["tokens"] += len(expected)
            if ids != expected and (specials or not any(token in text for token in ("<s>", "</s>"))):
                row["different"].append({"text": text, "specials": specials, "llama.cpp": ids, "tokenizer": expected})
    row["sound"] = not row["different"]
    if kind in SPLITTINGS:
        row["different_as"] = {other: split_otherwise(reader, work, folder, tokenizer, other) for other in SPLITTINGS - {kind}}
        row["sound"] &= all(row["different_as"].values())
    return row


def split_otherwise(reader: Reader, work: Path, folder: Path, tokenizer: Tokenizer, name: str) -> int:
    """How many texts get other tokens if the file names another way of splitting. Above 0, the comparison can detect an error."""
    vocabulary = {**gguf_vocab.read_vocabulary(folder, tokenizer.get_vocab_size() + 3), "tokenizer.ggml.pre": name}
    with mock.patch.object(gguf, "read_vocabulary", return_value=vocabulary):
        gguf.write_gguf(folder, work / "other.gguf")
    ((_, got),) = reader.read(Asked(work / "other.gguf", texts=TEXTS))
    return sum(ids != tokenizer.encode(text, add_special_tokens=False).ids for text, ids in zip(TEXTS[:-1], got, strict=False))


class Results:
    """Rows by case, written after each case, so that single cases can be run again."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        old = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
        self.rows = {where: {row["case"]: row for row in old.get(where, ())} for where in ("models", "tokenizers")}

    @property
    def sound(self) -> bool:
        return all(row["sound"] for rows in self.rows.values() for row in rows.values())

    def add(self, where: str, row: dict[str, Any], reader: str) -> None:
        self.rows[where][row["case"]] = row
        if self.path is not None:
            versions = {name: importlib.metadata.version(name) for name in ("gguf", "torch", "transformers", "tokenizers")}
            versions |= {"llama-cpp-python": reader, "python": platform.python_version(), "bigq": bigq.__version__}
            rows = {where: list(rows.values()) for where, rows in self.rows.items()}
            self.path.write_text(json.dumps({"sound": self.sound, "versions": versions, **rows}, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--reader", type=Path, required=True, help="a Python interpreter with llama-cpp-python")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for models")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--only", default="", help="run only cases whose name contains this text")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    reader = Reader(given.reader, given.work)
    tasks = [(case.name, lambda work, case=case: model_case(reader, work, case)) for case in CASES]
    shipped = ((4, True, -1), (4, True, 128), (8, True, 128), (4, False, 32))
    tasks += [(f"shipped {one}", lambda work, one=one: shipped_case(reader, work, *one)) for one in shipped]
    tokenizers = [(f"tokenizer {kind}", lambda work, kind=kind: tokenizer_case(reader, work, kind)) for kind in TOKENIZERS]
    results = Results(given.json)
    for where, some in (("models", tasks), ("tokenizers", tokenizers)):
        for name, task in some:
            if given.only in name:
                work = given.work / "case"
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                row = task(work)
                results.add(where, row, reader.version)
                shown = {key: row[key] for key in ("packed", "control", "rows_not_in_order", "tokens_equal", "different") if key in row}
                print("sound" if row["sound"] else "WRONG", row["case"], json.dumps(shown)[:900], flush=True)
    return 0 if results.sound else 1


if __name__ == "__main__":
    raise SystemExit(main())
