#!/usr/bin/env python3
"""Feed mutated files to bigq's readers and check their contract: only bigq's own errors, as one printable line that names the
file, and memory in proportion to the file.

    python scripts/fuzz.py --inputs 100000 --out docs/results/fuzz.json

Every reader in KINDS gets the same number of inputs. Half of them are mutated as bytes, half as parsed JSON, all from --seed.
Inputs that break the contract are written to --keep, and the exit status is 1. To add a reader, add an entry to KINDS.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

import torch
from facts import print_table
from mutate import mutate_bytes, mutate_json
from safetensors.torch import save, save_file

from bigq.config import JobConfig
from bigq.data.opening import documents
from bigq.data.records import is_known
from bigq.errors import BigqError
from bigq.io.checksum import seal
from bigq.io.index import INDEX_NAME, Checkpoint, read_header
from bigq.io.json_file import read_json_object
from bigq.io.shard_record import ShardRecord
from bigq.io.text_files import contents_of, text_pieces
from bigq.job.journal import Commit, read_commits, read_job
from bigq.job.request import compare, make_request

#: The memory that a reader may use: a constant, plus a number of bytes per byte of the file.
BASE_BYTES, BYTES_PER_BYTE = 256 * 1024, 100
LONGEST_MESSAGE = 1000
#: Violations printed for each kind.
SHOWN_BROKEN = 5


@dataclass(frozen=True, slots=True)
class Kind:
    """One reader and its inputs.

    seeds: valid files, as bytes. read: reads the file at a path, and uses the result as bigq uses it. name: of the file in its folder.
    pack, unpack: convert between the bytes of a file and its JSON value. prepare: makes the other files that the folder needs.
    """

    seeds: tuple[bytes, ...]
    read: Callable[[Path], None]
    name: str
    pack: Callable[[Any, bytes], bytes]
    unpack: Callable[[bytes], Any]
    prepare: Callable[[Path], None] = lambda folder: None


@dataclass(slots=True)
class Tally:
    """Results for one kind of input. seconds: time spent reading. Peaks in bytes."""

    inputs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    peak_bytes: int = 0
    peak_input_bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": self.inputs,
            "accepted": self.accepted,
            "errors": dict(self.errors.most_common()),
            "broken": len(self.broken),
            "seconds": round(self.seconds, 2),
            "inputs_per_s": round(self.inputs / max(self.seconds, 1e-9)),
            "slowest_s": round(self.slowest_s, 4),
            "peak_bytes": self.peak_bytes,
            "peak_input_bytes": self.peak_input_bytes,
        }


def dumped(value: Any) -> bytes:
    """A mutated value as JSON, including NaN and lone surrogates."""
    return json.dumps(value).encode()


def shard(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def shard_parts(file: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack("<Q", file[:8])
    return file[8 : 8 + length], file[8 + length :]


def read_shard(path: Path) -> None:
    tensors, _ = read_header(path)
    for info in tensors.values():
        assert 0 <= info.start <= info.stop <= path.stat().st_size, info
        assert info.nbytes == torch.Size(info.shape).numel() * info.dtype.itemsize, info
        info.name.encode()


def read_index(path: Path) -> None:
    checkpoint = Checkpoint.open(path.parent)
    for name in checkpoint:
        assert checkpoint[name].file.parent == path.parent, name
    checkpoint.sample(checkpoint)


def read_config(path: Path) -> None:
    """Read a config and write it again, as finish_folder does."""
    json.dumps(read_json_object(path) | {"quantization_config": {}}, indent=2).encode()


def read_documents(path: Path) -> None:
    kind = contents_of(path, is_known)
    for each in text_pieces(path) if kind == "text" else documents(path, kind):
        each.encode() if isinstance(each, str) else json.dumps(each.messages).encode()


def read_journal(path: Path) -> None:
    """Every commit that is read must give the same line when it is written."""
    commits, damaged = read_commits(path.parent.parent)
    kept = b"".join(commit.to_line() for commit in commits)
    assert kept == path.read_bytes() or damaged, "a commit is written differently from the line it was read from"
    for commit in commits:
        assert Path(commit.shard.file).suffix is not None and commit.shard.size == int(commit.shard.size)
        "".join([*commit.shard.tensors, *commit.left_out, *(commit.skipped or {}).values()])


def read_request(path: Path) -> None:
    job = read_job(path.parent.parent)
    assert job is not None
    JobConfig.from_frozen(job.get("settings"), str(path))
    compare(path.parent, job, REQUEST)


def sealed(value: Any, *, line: bool = False) -> bytes:
    """A mutated record with a valid checksum, so that the reader checks its content too."""
    return seal({k: v for k, v in value.items() if k != "check"}, line=line) if isinstance(value, dict) else dumped(value) + b"\n"


def two_shards(folder: Path) -> None:
    save_file({"a": torch.arange(4.0), "b": torch.zeros(2, 2)}, folder / "one.safetensors")
    save_file({"c": torch.arange(3)}, folder / "two.safetensors")


def state_folder(folder: Path) -> None:
    (folder / ".bigq").mkdir()


def _shards() -> tuple[bytes, ...]:
    plain = {"embed.weight": torch.ones(4, 3), "norm.weight": torch.ones(5, dtype=torch.bfloat16), "empty": torch.empty(0, 7)}
    kinds = {"scalar": torch.tensor(2.5, dtype=torch.float64), "flags": torch.tensor([True, False]), "ids": torch.arange(6).view(1, 2, 3)}
    return save(plain, metadata={"format": "pt"}), save(kinds)


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "eos_token_id": [1, 2],
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
INDEX = {"metadata": {"total_size": 56}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}

REQUEST = make_request(JobConfig(seqlen=64, batch=2), ROOT / "bigq/assets/tiny-llama", "0" * 64, None, torch.device("cpu"))
COMMITS = [
    Commit(
        unit=unit,
        shard=ShardRecord(file=f"model-{i + 1:05d}-of-00002.safetensors", size=1234, sha256="ab" * 32, tensors=("a.weight", "b.qweight")),
        linears=({"name": "a", "loss": 0.5, "shape": [2, 3]},),
        modified=1_700_000_000_000_000_000 + i,
        left_out=("a.router",),
        skipped={"a.up": "its Hessian is not finite"},
        source="cd" * 32,
        batch=i or None,
    )
    for i, unit in enumerate(("rest-0", "block-0"))
]

CONVERSATIONS = [
    {"messages": [{"role": "user", "content": "a question"}, {"role": "assistant", "content": None, "tool_calls": []}], "tools": [{}]},
    {"conversations": [{"from": "human", "value": "a question"}, {"from": "gpt", "value": "an answer"}]},
    {"instruction": "a question", "input": "more", "output": "an answer"},
]

KINDS: dict[str, Kind] = {
    "header": Kind(
        seeds=_shards(),
        read=read_shard,
        name="model.safetensors",
        pack=lambda value, seed: shard(dumped(value), shard_parts(seed)[1]),
        unpack=lambda file: json.loads(shard_parts(file)[0]),
    ),
    "index": Kind(
        seeds=(dumped(INDEX),),
        read=read_index,
        name=INDEX_NAME,
        pack=lambda value, seed: dumped(value),
        unpack=json.loads,
        prepare=two_shards,
    ),
    "config": Kind(
        seeds=(dumped(CONFIG),), read=read_config, name="config.json", pack=lambda value, seed: dumped(value), unpack=json.loads
    ),
    "journal": Kind(
        seeds=(b"".join(commit.to_line() for commit in COMMITS),),
        read=read_journal,
        name=".bigq/journal.jsonl",
        pack=lambda value, seed: b"".join(sealed(line, line=True) for line in value) if isinstance(value, list) else dumped(value),
        unpack=lambda file: [json.loads(line) for line in file.splitlines()],
        prepare=state_folder,
    ),
    "request": Kind(
        seeds=(seal(REQUEST),),
        read=read_request,
        name=".bigq/job.json",
        pack=lambda value, seed: sealed(value),
        unpack=json.loads,
        prepare=state_folder,
    ),
    "documents": Kind(
        seeds=(b'{"text": "some words", "url": "x"}\n\n' * 3, b"".join(dumped(record) + b"\n" for record in CONVERSATIONS)),
        read=read_documents,
        name="text.jsonl",
        pack=lambda value, seed: b"\n".join(dumped(line) for line in value) if isinstance(value, list) else dumped(value),
        unpack=lambda file: [json.loads(line) for line in file.splitlines() if line],
    ),
    "array": Kind(
        seeds=(json.dumps([{"text": "some words"}, *CONVERSATIONS], indent=1).encode(),),
        read=read_documents,
        name="text.txt",
        pack=lambda value, seed: dumped(value),
        unpack=json.loads,
    ),
}


def mutated(rng: random.Random, kind: Kind) -> bytes:
    seed = rng.choice(kind.seeds)
    if rng.random() < 0.5:
        return mutate_bytes(rng, seed)
    return kind.pack(mutate_json(rng, kind.unpack(seed)), seed)


def feed(kind: Kind, path: Path, data: bytes, tally: Tally) -> str | None:
    """Give a reader one file. Returns how it broke its contract, or None."""
    path.unlink(missing_ok=True)  # some file systems flush a file that is overwritten
    path.write_bytes(data)
    tracemalloc.start()
    started = time.perf_counter()
    said: str | None = None
    broken: str | None = None
    try:
        kind.read(path)
    except BigqError as error:
        said = str(error)
        tally.errors[type(error).__name__] += 1
    except Exception as error:  # any other error breaks the contract
        broken = f"{type(error).__name__}: {error!r:.200}"
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tally.inputs += 1
    tally.accepted += said is None and broken is None
    tally.seconds += seconds
    tally.slowest_s = max(tally.slowest_s, seconds)
    if peak > tally.peak_bytes:
        tally.peak_bytes, tally.peak_input_bytes = peak, len(data)
    if said is not None and not (said.isprintable() and str(path.parent) in said and len(said) < LONGEST_MESSAGE):
        broken = f"the message is not one printable line that names the file: {said!r:.200}"
    if peak > BASE_BYTES + BYTES_PER_BYTE * len(data):
        broken = f"{peak} bytes of memory for a file of {len(data)}"
    return broken


def fuzz(kind: Kind, inputs: int, seed: int, keep: Path | None = None) -> Tally:
    """Feed ``inputs`` mutated files to a reader. Inputs that break its contract are in the tally, and in the folder ``keep``."""
    rng = random.Random(seed)
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        kind.prepare(Path(folder))
        path = Path(folder) / kind.name
        for _ in range(inputs):
            data = mutated(rng, kind)
            broken = feed(kind, path, data, tally)
            if broken is not None:
                tally.broken.append(broken)
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{hashlib.sha256(data).hexdigest()[:12]}-{Path(kind.name).name}").write_bytes(data)
    return tally


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, metavar="N", help="number of inputs, over all kinds (default: %(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="readers to test, separated by commas (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures to this file, as JSON")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write inputs that break a reader to this folder")
    args = parser.parse_args(argv)
    names = args.kinds.split(",")
    if unknown := [name for name in names if name not in KINDS]:
        parser.error(f"--kinds {','.join(unknown)}: choose from {', '.join(KINDS)}")
    started = time.perf_counter()
    each = -(-args.inputs // len(names))
    tallies = {name: fuzz(KINDS[name], each, args.seed, args.keep) for name in names}
    result = {
        "inputs": sum(t.inputs for t in tallies.values()),
        "broken": sum(len(t.broken) for t in tallies.values()),
        "seconds": round(time.perf_counter() - started, 1),
        "seed": args.seed,
        "python": sys.version.split()[0],
        "memory": "peak of Python's own allocations while one input is read",
        "kinds": {name: tally.to_json() for name, tally in tallies.items()},
    }
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, tally in tallies.items():
        for what in tally.broken[:SHOWN_BROKEN]:
            print(f"{name}: {what}", file=sys.stderr)
    print_table(result)
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
