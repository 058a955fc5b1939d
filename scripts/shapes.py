#!/usr/bin/env python3
"""Write random checkpoints in the shapes of published models, for benchmarks of time and memory.

Tensors are written piece by piece, so a small machine can write a checkpoint of any size. Weights are normal with a standard
deviation of 0.02, the usual initialization; norms are 1 and biases close to 0; all tensors are bf16. A weight of more than
2²⁴ elements is not drawn by itself, which would take most of the time: it is a pool of 67,108,859 drawn numbers, repeated
end to end from a place that its name gives.

    python scripts/shapes.py llama-2-7b DIR                          # a whole checkpoint; resumes a partial one
    python scripts/shapes.py tiny DIR --ids ids.safetensors --samples 8 --seqlen 128
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from bigq.io.index import INDEX_NAME, SINGLE_NAME, TensorInfo, read_header
from bigq.io.reader import as_bytes
from bigq.io.writer import OutputTensor, write_shard
from bigq.model import skeleton
from bigq.model.blocks import find_blocks

#: Elements drawn at a time, and the most that a tensor may have to be drawn by itself: 64 MiB in fp32.
PIECE = 2**24
#: Elements of the pool for larger tensors, a prime: rows of a matrix begin at different places of the pool, so that no row occurs twice.
POOL = 2**26 - 5
#: Elements of the pool that one thread draws at a time.
POOL_PIECE = 2**21
#: Standard deviation of weights.
WEIGHT_SCALE = 0.02
#: Tensors outside the blocks share shards of at most this many bytes (a larger tensor has one of its own).
REST_SHARD_BYTES = 4 * 10**9

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False}
_LLAMA_2 = _LLAMA | {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32000}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The dimensions of a model.

    config: its config.json as published, without ``dtype``. layers_key: the key of the number of blocks in it.
    parameters: the published number of parameters. groups: the Linears of a block by last name; the Linears of a group share
    their input, and so a Hessian.
    """

    name: str
    config: Mapping[str, Any]
    parameters: int
    groups: tuple[tuple[str, ...], ...]
    layers_key: str = "num_hidden_layers"

    @property
    def blocks(self) -> int:
        return int(self.config[self.layers_key])

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def hidden(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def linears_per_block(self) -> int:
        return sum(len(group) for group in self.groups)

    def with_vocabulary(self, size: int) -> Shape:
        """The same blocks with another vocabulary size, as SHAPE-vSIZE. Its number of parameters is not a published one."""
        return replace(self, name=f"{self.name}-v{size}", config={**self.config, "vocab_size": size})

    def config_json(self, blocks: int | None = None) -> dict[str, Any]:
        """config.json of this shape in bf16, with ``blocks`` blocks if given."""
        return dict(self.config) | {"dtype": "bfloat16", self.layers_key: self.blocks if blocks is None else blocks}


_LLAMA_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))

SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            name="tiny",
            config=_LLAMA
            | {
                "bos_token_id": 1,
                "eos_token_id": 2,
                "hidden_size": 256,
                "intermediate_size": 640,
                "max_position_embeddings": 512,
                "num_attention_heads": 4,
                "num_hidden_layers": 6,
                "num_key_value_heads": 2,
                "rms_norm_eps": 1e-05,
                "vocab_size": 1024,
            },
            parameters=4_656_384,
            groups=_LLAMA_GROUPS,
        ),
        Shape(
            name="llama-2-7b",
            config=_LLAMA_2
            | {
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_attention_heads": 32,
                "num_hidden_layers": 32,
                "num_key_value_heads": 32,
            },
            parameters=6_738_415_616,
            groups=_LLAMA_GROUPS,
        ),
        Shape(
            name="llama-2-70b",
            config=_LLAMA_2
            | {
                "hidden_size": 8192,
                "intermediate_size": 28672,
                "num_attention_heads": 64,
                "num_hidden_layers": 80,
                "num_key_value_heads": 8,
            },
            parameters=68_976_648_192,
            groups=_LLAMA_GROUPS,
        ),
        Shape(
            name="llama-3.1-405b",
            config=_LLAMA
            | {
                "bos_token_id": 128000,
                "eos_token_id": 128001,
                "hidden_size": 16384,
                "intermediate_size": 53248,
                "max_position_embeddings": 131072,
                "num_attention_heads": 128,
                "num_hidden_layers": 126,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-05,
                "rope_scaling": {
                    "factor": 8.0,
                    "high_freq_factor": 4.0,
                    "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 8192,
                    "rope_type": "llama3",
                },
                "rope_theta": 500000.0,
                "vocab_size": 128256,
            },
            parameters=405_853_388_800,
            groups=_LLAMA_GROUPS,
        ),
        Shape(
            name="bloom-176b",
            config={
                "apply_residual_connection_post_layernorm": False,
                "architectures": ["BloomForCausalLM"],
                "attention_dropout": 0.0,
                "attention_softmax_in_fp32": True,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "hidden_dropout": 0.0,
                "hidden_size": 14336,
                "initializer_range": 0.02,
                "layer_norm_epsilon": 1e-05,
                "masked_softmax_fusion": True,
                "model_type": "bloom",
                "n_head": 112,
                "n_layer": 70,
                "pad_token_id": 3,
                "pretraining_tp": 4,
                "seq_length": 2048,
                "slow_but_exact": False,
                "vocab_size": 250880,
            },
            parameters=176_247_271_424,
            groups=(("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)),
            layers_key="n_layer",
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Names and shapes of the tensors of a checkpoint. blocks_path: the module path of the blocks, such as ``model.layers``."""

    blocks_path: str
    block: Mapping[str, tuple[int, ...]]
    rest: Mapping[str, tuple[int, ...]]

    def of_block(self, i: int) -> dict[str, tuple[int, ...]]:
        """The tensors of block i by their full names."""
        return {f"{self.blocks_path}.{i}.{name}": shape for name, shape in self.block.items()}


def write_config(shape: Shape, folder: Path, blocks: int | None = None) -> None:
    """Write config.json, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config_json(blocks), indent=2) + "\n")


def layout_of(folder: Path) -> Layout:
    """The tensors of a checkpoint with the folder's config.json, from the model on meta. Tied parameters occur once."""
    model = skeleton.build(skeleton.load_config(folder), torch.bfloat16)
    path, _ = find_blocks(model)
    first, inside = f"{path}.0.", f"{path}."
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return Layout(
        blocks_path=path,
        block={name.removeprefix(first): shape for name, shape in shapes.items() if name.startswith(first)},
        rest={name: shape for name, shape in shapes.items() if not name.startswith(inside)},
    )


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> OutputTensor:
    """A bf16 tensor whose values are made while it is written. They depend only on name and seed."""
    elements, own = torch.Size(shape).numel(), zlib.crc32(f"{seed} {name}".encode())

    def drawn() -> Iterator[memoryview]:
        mean, scale = _distribution(name, shape)
        yield as_bytes(_normal(elements, own).mul_(scale).add_(mean).to(torch.bfloat16))

    def repeated() -> Iterator[memoryview]:
        values, place, left = pool(seed), own % POOL, elements
        while left:
            part = values[place : place + min(left, PIECE)]
            yield as_bytes(part)
            place, left = (place + len(part)) % POOL, left - len(part)

    return OutputTensor(name=name, dtype=torch.bfloat16, shape=shape, chunks=drawn if elements <= PIECE else repeated)


@functools.cache
def pool(seed: int) -> Tensor:
    """bf16 [POOL], as ``_distribution`` has weights. Every piece has its own seed, so any number of threads draws the same values."""
    values = torch.empty(POOL, dtype=torch.bfloat16)

    def draw(piece: Tensor, number: int) -> None:
        piece.copy_(_normal(len(piece), zlib.crc32(f"{seed} pool {number}".encode())).mul_(WEIGHT_SCALE))

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(draw, values.split(POOL_PIECE), itertools.count()))
    return values


def _normal(elements: int, seed: int) -> Tensor:
    return torch.empty(elements).normal_(generator=torch.Generator().manual_seed(seed))


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(mean, standard deviation) of the values of a tensor, by its kind."""
    if name.endswith(".bias"):
        return 0.0, 1e-3
    return (1.0, 0.0) if len(shape) == 1 else (0.0, WEIGHT_SCALE)


def rest_shards(rest: Mapping[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """The tensors outside the blocks, by shard."""
    shards: list[dict[str, tuple[int, ...]]] = []
    size = 0
    for name, shape in rest.items():
        nbytes = 2 * torch.Size(shape).numel()
        if not shards or size + nbytes > REST_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    return shards


def ensure_shard(
    path: Path,
    tensors: Mapping[str, tuple[int, ...]],
    seed: int = 0,
    make: Callable[[str, tuple[int, ...], int], OutputTensor] = random_tensor,
) -> dict[str, TensorInfo]:
    """Write a shard of random tensors unless it exists; a partial shard never appears. Returns its tensors. make: one of them."""
    if not path.exists():
        write_shard(path, [make(name, shape, seed) for name, shape in tensors.items()])
    infos, _ = read_header(path)
    if {name: info.shape for name, info in infos.items()} != dict(tensors):
        raise SystemExit(f"{path}: holds the tensors of another shape; delete it and run the command again")
    return infos


def write_checkpoint(shape: Shape, folder: Path, blocks: int | None = None, seed: int = 0, say: Callable[[str], object] = print) -> None:
    """Write a whole checkpoint: one shard for each block, one or more for the rest, the index last.

    Existing shards are kept, so an interrupted call can be resumed.
    """
    if (folder / INDEX_NAME).exists():
        return
    write_config(shape, folder, blocks)
    layout = layout_of(folder)
    count = shape.blocks if blocks is None else blocks
    wanted = [*rest_shards(layout.rest), *(layout.of_block(i) for i in range(count))]
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(wanted, 1):
        path = folder / SINGLE_NAME.replace(".", f"-{number:05d}-of-{len(wanted):05d}.")
        infos = ensure_shard(path, tensors, seed)
        weight_map |= dict.fromkeys(infos, path.name)
        total += sum(info.nbytes for info in infos.values())
        say(f"{path.name}: {number} of {len(wanted)} shards, {total / 1e9:.2f} GB")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    partial = folder / (INDEX_NAME + ".partial")
    partial.write_text(json.dumps(index) + "\n")
    partial.rename(folder / INDEX_NAME)


def zipf_ids(rows: int, seqlen: int, vocabulary: int, seed: int = 7, reserved: int = 4, exponent: float = 1.1) -> Tensor:
    """Token ids, int64 [rows, seqlen], Zipf-distributed as words are; the first ``reserved`` ids do not occur."""
    share = 1.0 / torch.arange(1, vocabulary - reserved + 1).double() ** exponent
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.multinomial(share / share.sum(), rows * seqlen, replacement=True, generator=generator) + reserved
    return tokens.reshape(rows, seqlen)


def write_ids(path: Path, ids: Tensor) -> None:
    """Write token ids as ``--calibration`` takes them; a partial file never appears."""
    partial = path.with_name(path.name + ".partial")
    save_file({"input_ids": ids}, partial)
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, help="number of blocks (default: the shape's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ids", type=Path, help="also write random token ids to this file")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    write_checkpoint(shape, args.folder, args.blocks, args.seed, lambda line: print(line, file=sys.stderr, flush=True))
    if args.ids:
        write_ids(args.ids, zipf_ids(args.samples, args.seqlen, shape.vocabulary))


if __name__ == "__main__":
    main()
