"""The cases that clients read: a tiny model, bigq's output of it, and what a client must find in that output.

The folder of a case holds

    model/                  the source, in fp16: the same values whether it is read in fp16 or fp32
    out/                    bigq's output, quantized on 16 × 40 random tokens
    expected.safetensors    ids int64 [N, T]; logits fp32 [N, T, V] of the dense model with bigq's dequantized weights, rounded to
                            fp16 as readers store them, computed in fp32; weight.NAME fp32 [outputs, inputs] of every packed
                            Linear, not rounded
    case.json               names of the packed Linears, and the settings that the client module has for its reader
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from models import linear_module, logits_of, make_checkpoint, matrix, put_matrix, random_ids, reference_model, save_ids, word_tokenizer

from bigq.cli.main import main as bigq
from bigq.kernels.grid import GridSpec, find_grid
from bigq.model.pager import Pager

#: Sizes that are multiples of all group sizes used here; the tests' own models have an intermediate size of 96.
SIZES: Mapping[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 128},
    "qwen2": {"intermediate_size": 128},
    "opt": {"ffn_dim": 128},
    "bloom": {},
}
CALIBRATION = ("--samples", "16", "--seqlen", "40", "--dtype", "float32")
EVALUATED_ROWS = 4

#: Largest error of a weight, relative to the error of rounding to nearest.
FARTHEST = 2.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """name: of the row and of the folder. family, model: the family of the tiny model, and its changed config values.

    flags: options of ``bigq quantize``. reader: settings for the client's reader.
    """

    name: str
    family: str
    flags: tuple[str, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    reader: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A program that reads bigq's output.

    name: of its virtual environment and of the results file (docs/results/clients_NAME.json).
    reader: a script in this folder. The environment's own Python runs it, without bigq, as ``reader RESULTS FOLDER…``. It appends
    a JSON line to RESULTS for each case and way of reading, {"case": …, "route": …} and its findings, and prints {"versions": {…}}
    as its last line. environment: of the reader's process. cases: the cases that it must read.
    fails: the reason why a row is wrong; None if it is right.
    limits: regular expression for ROUTE/NAME → why the reader cannot read these cases.
    """

    name: str
    reader: str
    cases: tuple[Case, ...]
    fails: Callable[[dict[str, Any]], str | None]
    limits: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def prepare(case: Case, work: Path) -> Path:
    """Make the folder of a case, unless it exists with the same settings. Returns the folder."""
    folder = work / case.name
    settings = {"family": case.family, "model": dict(case.model), "flags": list(case.flags), "reader": dict(case.reader)}
    described = folder / "case.json"
    if described.exists() and json.loads(described.read_text())["settings"] == settings:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with silent():
        make_checkpoint(folder / "model", case.family, dtype=torch.float16, **{**SIZES.get(case.family, {}), **case.model})
    word_tokenizer().save_pretrained(folder / "model")
    save_ids(folder / "calibration.safetensors", random_ids())
    quantize(folder, case.flags)
    packed = write_expected(folder)
    described.write_text(json.dumps({"settings": settings, "packed": packed, **case.reader}, indent=2) + "\n")
    return folder


def quantize(folder: Path, flags: tuple[str, ...]) -> None:
    command = ["quantize", str(folder / "model"), str(folder / "out"), "--calibration", str(folder / "calibration.safetensors")]
    status = bigq([*command, *CALIBRATION, "--device", "cpu", "--quiet", *flags])
    if status:
        sys.exit(f"clients: bigq quantize {' '.join(flags)} ended with status {status}")


def dequantized(out: Path) -> Iterator[tuple[str, Tensor]]:
    """(module name, fp32 [outputs, inputs]) of every packed Linear, as bigq dequantizes it."""
    pager = Pager(out, device=torch.device("cpu"), dtype="float32")
    for i in range(len(pager.blocks)):
        pager.load_block(i)
        for name in pager.block_names(i):
            if name in pager.packed:
                yield name.removesuffix(".weight"), pager.model.get_parameter(name).detach().clone()
        pager.evict_block(i)
    if f"{pager.head_name}.weight" in pager.packed:
        yield pager.head_name, pager.dequantized(f"{pager.head_name}.weight")


def write_expected(folder: Path) -> list[str]:
    """Write expected.safetensors; returns the names of the packed Linears."""
    weights = dict(dequantized(folder / "out"))
    with silent():
        model = reference_model(folder / "model")
    records = {r["name"]: r for r in map(json.loads, (folder / "out/.bigq/linears.jsonl").read_text().splitlines())}
    for name, weight in weights.items():
        require_near(name, weight, matrix(linear_module(model, name)), records[name]["bits"], records[name]["group_size"])
        put_matrix(linear_module(model, name), weight.to(torch.float16).float())
    ids = random_ids(EVALUATED_ROWS, seed=1)
    logits = logits_of(model, ids, EVALUATED_ROWS).float().contiguous()
    tensors = {"ids": ids, "logits": logits} | {f"weight.{name}": weight.contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "expected.safetensors")
    return sorted(weights)


def require_near(name: str, weight: Tensor, source: Tensor, bits: int, group_size: int) -> None:
    """Exit if a dequantized weight [N, K] is too far from its source.

    Without this check, an error that packing and reading share would become the expected value. A zero point that is off by one gives
    three times the error of rounding to nearest; GPTQ gives up to 1.7 times.
    """
    width = source.shape[1] if group_size == -1 else group_size
    grouped = source.view(len(source), -1, width).permute(2, 0, 1)
    scale, zero = find_grid(grouped, GridSpec(bits=bits, symmetric=True))
    rounded = scale * torch.clamp(torch.round(grouped / scale), -zero, 2**bits - 1 - zero)
    ratio = float((weight - source).norm() / (rounded - grouped).norm())
    if not ratio < FARTHEST:
        sys.exit(f"clients: {name} is read back {ratio:.1f} times as far from its source as rounding to nearest would be")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Discard stderr: transformers writes progress bars to it even when they are disabled."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
