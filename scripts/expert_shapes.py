"""Shapes of published models with experts, for ``bench_176b``: a layer with experts as the only kind of block.

The shard of a block holds ``distinct`` experts. The others share their bytes: expert e has those of expert e % distinct, so that a layer of
23 GB need not be written. An expert still has its own tokens, and so its own Hessian and codes.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from flops import Group, block_flops, groups_of
from moe_shapes import MOE_SHAPES
from shapes import WEIGHT_SCALE, Layout, Shape, random_tensor

from bigq.io.reader import as_bytes
from bigq.io.writer import OutputTensor
from bigq.model import skeleton
from bigq.model.blocks import find_blocks

#: What the phases of a bank of experts begin with in the seconds by phase.
OF_EXPERTS = "experts: "
#: The logarithm of a router row's length is normal with this deviation: experts with longer rows are chosen more often.
ROUTER_SKEW = 0.08
#: Standard deviation of the router's correction bias. Scores lie between 0 and 1.
BIAS_SCALE = 0.01
ROUTER, CORRECTION = "mlp.gate.weight", "mlp.gate.e_score_correction_bias"
#: A tensor of one expert: what comes before its number, the number, the rest.
ONE_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape(Shape):
    """A model whose blocks all have experts. groups: the Linears outside the experts.

    experts_key: the key of the number of experts. attention: the width of causal attention's two products, all heads together, such that
    they take 2 · seqlen · attention operations a token. distinct: experts with bytes of their own. note: what differs from the model.
    """

    experts_key: str
    attention: int
    distinct: int = 32
    note: str = ""

    @property
    def experts(self) -> int:
        return int(self.config[self.experts_key])

    @property
    def chosen(self) -> int:
        """Experts of a token."""
        return int(self.config["num_experts_per_tok"])

    @property
    def width(self) -> int:
        """Intermediate size of an expert."""
        return int(self.config["moe_intermediate_size"])

    @property
    def honesty(self) -> str:
        """What a measurement does not show of the published model."""
        shared = f"every {self.distinct} experts share their bytes on disk" if self.distinct < self.experts else ""
        return "; ".join(filter(None, (shared, self.note)))

    def with_experts(self, count: int) -> ExpertShape:
        """The same layers with fewer experts, of which a token takes at most half. Its number of parameters is not a published one."""
        config = {**self.config, self.experts_key: count, "num_experts_per_tok": min(self.chosen, max(1, count // 2))}
        config |= {key: 1 for key in ("n_group", "topk_group") if key in config}
        return replace(self, name=f"{self.name}-e{count}", config=config)


_LATENT_GROUPS = (
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_b_proj",),
    ("kv_b_proj",),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1}

EXPERT_SHAPES: Mapping[str, ExpertShape] = {
    shape.name: shape
    for shape in (
        ExpertShape(
            name="tiny-experts",
            config={
                **MOE_SHAPES["deepseek-v3"].config,
                **_TOKENS,
                "first_k_dense_replace": 0,
                "rope_scaling": None,
                "hidden_size": 512,
                "intermediate_size": 1024,
                "kv_lora_rank": 128,
                "max_position_embeddings": 2048,
                "moe_intermediate_size": 256,
                "n_group": 8,
                "n_routed_experts": 64,
                "num_attention_heads": 8,
                "num_hidden_layers": 4,
                "num_key_value_heads": 8,
                "q_lora_rank": 256,
                "qk_nope_head_dim": 64,
                "qk_rope_head_dim": 32,
                "topk_group": 4,
                "v_head_dim": 64,
                "vocab_size": 1024,
            },
            parameters=106_633_472,
            groups=_LATENT_GROUPS,
            experts_key="n_routed_experts",
            attention=8 * (96 + 64) // 2,
        ),
        ExpertShape(
            name="deepseek-v3",
            config={**MOE_SHAPES["deepseek-v3"].config, **_TOKENS, "first_k_dense_replace": 0, "num_hidden_layers": 58},
            parameters=669_275_969_024,
            groups=_LATENT_GROUPS,
            experts_key="n_routed_experts",
            attention=128 * (192 + 128) // 2,
            note="58 layers with experts; the published model has three dense layers before them",
        ),
        ExpertShape(
            name="qwen3-235b",
            config={**MOE_SHAPES["qwen3-235b-a22b"].config, **_TOKENS},
            parameters=235_093_634_560,
            groups=(("q_proj", "k_proj", "v_proj"), ("o_proj",)),
            experts_key="num_experts",
            attention=64 * 128,
        ),
    )
}


def expert_layout(shape: ExpertShape, folder: Path) -> Layout:
    """The tensors of a checkpoint with the folder's config.json, as published: one tensor for each matrix of the first experts.

    Those are the ``distinct`` experts whose bytes are on disk.
    """
    model = skeleton.build(skeleton.load_config(folder), torch.bfloat16)
    path, _ = find_blocks(model)
    stored = set(model.state_dict())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes |= {name: tuple(b.shape) for name, b in model.named_buffers() if name in stored}
    first, inside = f"{path}.0.", f"{path}."
    block: dict[str, tuple[int, ...]] = {}
    banks: dict[str, tuple[int, ...]] = {}
    for name, size in shapes.items():
        if name.startswith(first):
            (banks if ".experts." in name else block)[name.removeprefix(first)] = size
    for e in range(min(shape.distinct, shape.experts)):
        for name, size in banks.items():
            block |= matrices(name, e, size[1:])
    return Layout(blocks_path=path, block=block, rest={name: size for name, size in shapes.items() if not name.startswith(inside)})


def matrices(parameter: str, expert: int, size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The stored tensors of one expert's part [outputs, inputs] of a bank's parameter."""
    path, _, leaf = parameter.rpartition(".")
    if leaf == "gate_up_proj":
        return {f"{path}.{expert}.{part}.weight": (size[0] // 2, size[1]) for part in ("gate_proj", "up_proj")}
    return {f"{path}.{expert}.{leaf}.weight": size}


def aliases(name: str, distinct: int, experts: int) -> list[str]:
    """The names of the tensors that have the bytes of the tensor ``name``: itself, and for an expert's those of others."""
    found = ONE_EXPERT.fullmatch(name)
    if found is None:
        return [name]
    return [f"{found[1]}{e}{found[3]}" for e in range(int(found[2]), experts, distinct)]


def expert_tensor(name: str, shape: tuple[int, ...], seed: int) -> OutputTensor:
    """``random_tensor``, with routers that choose some experts more often than others."""
    kind = ".".join(name.split(".")[-3:])
    if kind not in (ROUTER, CORRECTION):
        return random_tensor(name, shape, seed)

    def chunks() -> Iterator[memoryview]:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        values = torch.empty(shape).normal_(generator=generator)
        if kind == ROUTER:
            values.mul_(torch.empty(shape[0], 1).normal_(generator=generator).mul_(ROUTER_SKEW).exp_())
        yield as_bytes(values.mul_(WEIGHT_SCALE if kind == ROUTER else BIAS_SCALE).to(torch.bfloat16))

    return OutputTensor(name=name, dtype=torch.bfloat16, shape=shape, chunks=chunks)


def expert_flops(shape: ExpertShape, weights: Mapping[str, tuple[int, ...]], rows: int, seqlen: int) -> dict[str, float]:
    """``block_flops`` of the Linears outside the experts, and the experts' own under the names of their phases.

    weights: of the block, by name. A routed token takes one forward through its expert, and its input products are in two Hessians.
    """
    plain = {name: size for name, size in weights.items() if ".experts." not in name and not name.endswith(ROUTER)}
    found = block_flops(groups_of(plain, shape.groups), shape.attention, rows, seqlen)
    routed = float(rows * seqlen * shape.chosen)
    experts = [Group(inputs=shape.hidden, outputs=(shape.width, shape.width)), Group(inputs=shape.width, outputs=(shape.hidden,))]
    own = {
        "forward": routed * sum(2.0 * m * g.inputs for g in experts for m in g.outputs),
        "hessian": routed * sum(g.inputs**2 for g in experts),
        "factor": shape.experts * sum(g.inputs**3 / 3 for g in experts),
        "solve": shape.experts * sum(float(m) * g.inputs**2 for g in experts for m in g.outputs),
    }
    return found | {f"{OF_EXPERTS}{phase}": count for phase, count in own.items()}


def block_bytes(shape: ExpertShape, layout: Layout) -> int:
    """bf16 bytes of the tensors of one block, those of all its experts included."""
    distinct = min(shape.distinct, shape.experts)
    return sum(2 * math.prod(size) * len(aliases(f".{name}", distinct, shape.experts)) for name, size in layout.block.items())
