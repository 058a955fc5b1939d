#!/usr/bin/env python3
"""Compare streamed logits with transformers' own for a tiny random model of every causal family that transformers knows.

    python scripts/families.py --json docs/results/families.json [FAMILY …]

Transformers runs experts one after the other here (``eager``), as bigq does; its other ways sum in another order.
Each family ends in one of four ways: "equal", where the logits have the same bits; "refused", with bigq's reason; "not built", where this
script finds no tiny config that transformers can run; or "different", which is a fault. A family is also planned on meta, as ``bigq plan``
does; what the plan refuses is not quantized. Exit code 1 if a family is different.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from facts import host, revision, versions
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bigq.errors import BigqError
from bigq.infer.evaluate import Stream
from bigq.model import skeleton
from bigq.model.pager import Pager
from bigq.sched.plan.survey import Outline, survey

VOCABULARY, ROWS, TOKENS, SEQLEN = 160, 3, 24, 32
#: Sizes of a tiny model, for whatever names a family's config has for them.
TINY: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "n_vocab", "vocabulary_size"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size", "model_dim", "embed_dim", "word_embed_proj_dim"), 64
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 3),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "num_key_value_heads",
        ),
        4,
    ),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim",), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok"), 4),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp", "moe_shared_expert_intermediate_size"), 64
    ),
    "sliding_window": 16,
    "attention_window": 16,
    "type_vocab_size": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "num_experts_per_token": 2,
    "rotary_dim": 8,
}
#: Settings of families for which the sizes above do not make a model that runs.
SPECIAL: dict[str, dict[str, Any]] = {
    "cpmant": {"prompt_types": 4, "prompt_length": 4, "segment_types": 4},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [32, 32],
        "feed_forward_size": 64,
        "attention_head_size": 16,
    },
    "xlm": {"emb_dim": 64, "n_langs": 1, "causal": True},
    "transfo-xl": {},
    "opt": {"word_embed_proj_dim": 32},
    "rwkv": {"attention_hidden_size": 64, "context_length": 64},
    "mamba": {"state_size": 8, "time_step_rank": 8},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16, "chunk_size": 16},
}
#: Attention with latent keys and values, whose heads are wider for keys than for values, and experts in groups (DeepSeek's kind).
LATENT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Encoders that transformers also offers as causal models.
DECODER = ("is_decoder",)


def shrink(config: Any, kind: str) -> Any:
    """The config with tiny sizes, its inner configs too."""
    for name in list(vars(config)):
        value = getattr(config, name, None)
        if hasattr(value, "to_dict"):
            shrink(value, kind)
    for name, tiny in TINY.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > tiny:
            setattr(config, name, tiny)
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in list(vars(config).items()):
        if (
            isinstance(value, list)
            and isinstance(layers, int)
            and len(value) > layers
            and name.lstrip("_").startswith(("layer", "block", "attention", "mlp"))
        ):
            setattr(config, name, [*value[: layers - 1], value[-1]])
        elif name.endswith(("token_id", "_index")) and isinstance(value, int) and value >= VOCABULARY:
            setattr(config, name, 2)
    for name in DECODER:
        if hasattr(config, name):
            setattr(config, name, True)
    return config


def configs(kind: str) -> Iterator[Any]:
    """Tiny configs to try, in order."""
    special = SPECIAL.get(kind, {})
    config = CONFIG_MAPPING[kind]()
    shrink(config, kind)
    for name, value in special.items():
        setattr(config, name, value)
    yield config
    small = {
        name: TINY[name]
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
    }
    yield CONFIG_MAPPING[kind](**{**small, "max_position_embeddings": 128, "pad_token_id": 0, **special})
    yield CONFIG_MAPPING[kind](**{**small, "max_position_embeddings": 128, "pad_token_id": 0, "num_hidden_layers": 4, **special})
    yield CONFIG_MAPPING[kind](**{**LATENT, **special})
    yield CONFIG_MAPPING[kind](**{**LATENT, "layer_types": ["full_attention"] * 3, **special})


def make(kind: str, folder: Path) -> str:
    """Save a random model with random norms and biases. Returns its class's name."""
    problems = []
    for config in configs(kind):
        try:
            with torch.device("meta"):
                whole = AutoModelForCausalLM.from_config(config)
            count = sum(p.numel() for p in whole.parameters())
            if count > 30_000_000:
                raise ValueError(f"{count} parameters")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for param in model.parameters():
                    param.normal_(0, 0.15) if param.ndim >= 2 else param.add_(torch.randn_like(param) * 0.1)
                # Training leaves this row 0, and transformers zeroes it when it loads a Youtu model.
                for module in model.modules():
                    if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                        module.weight[module.padding_idx] = 0
                model.tie_weights()
                logits = model(input_ids=rows()[:1], use_cache=False).logits
            if not torch.isfinite(logits).all():
                raise ValueError("its logits are not finite")
            model.save_pretrained(folder)
            AutoModelForCausalLM.from_pretrained(folder)
            return type(model).__name__
        except Exception as error:
            problems.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    raise ValueError(" / ".join(dict.fromkeys(problems)))


def rows() -> torch.Tensor:
    ids: torch.Tensor = torch.randint(3, VOCABULARY - 2, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))
    return ids


def compare(folder: Path) -> dict[str, Any]:
    """The streamed logits against those of the whole model, in the same batches; and what the plan says."""
    batch = 2
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        expected = torch.cat([whole(input_ids=part, use_cache=False).logits for part in rows().split(batch)])
        pager = Pager(folder, device=torch.device("cpu"), dtype="float32")
        found: dict[str, Any] = {"plan": planned(folder)}
        try:
            stream = Stream(pager, rows(), batch)
            with stream.tail_ready():
                got = torch.cat([stream.logits(lo, min(lo + batch, ROWS)) for lo in range(0, ROWS, batch)])
        except BigqError as error:
            return {"result": "refused", "reason": str(error), **found}
    found["bytes"] = torch.equal(got, expected)
    found["difference"] = float((got - expected).abs().max() / expected.abs().max())
    return {"result": "equal" if found["bytes"] else "different", **found}


def planned(folder: Path) -> str:
    """The plan's own view of the model: "fits", or why it refuses."""
    try:
        pager = Pager(folder, device=torch.device("cpu"), dtype="float32")
        survey(Outline(model=pager.model, blocks_path=pager.blocks_path, dtype=pager.dtype, sources=pager.sources), SEQLEN)
    except BigqError as error:
        return str(error)
    return "fits"


def family(kind: str) -> dict[str, Any]:
    """What becomes of one family."""

    def too_long(*_: Any) -> None:
        raise TimeoutError("took more than two minutes of CPU time")

    signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, 120)
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = make(kind, Path(folder))
        except Exception as error:
            return {"result": "not built", "reason": str(error)}
        try:
            found = compare(Path(folder))
        except BigqError as error:
            found = {"result": "refused", "reason": str(error)}
        except Exception as error:
            found = {"result": "different", "reason": f"{type(error).__name__}: {error}"}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    found = {"class": made, **found}
    return {k: v.replace(folder, "MODEL") if isinstance(v, str) else v for k, v in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; all by default")
    parser.add_argument("--json", type=Path, help="write the results here; those of families that are not asked for are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    skeleton.silence_transformers()
    results = {}
    for kind in args.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        results[kind] = family(kind)
        print(f"{kind}: {results[kind]['result']} {results[kind].get('reason', '')} | plan: {results[kind].get('plan')}", flush=True)
    if args.json and args.families and args.json.exists():
        results = {**json.loads(args.json.read_text())["families"], **results}
    counts = Counter(r["result"] for r in results.values())
    print(dict(counts))
    if args.json:
        report = {"revision": revision(), "host": host(), "versions": versions(), "counts": counts, "families": results}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(bool(counts["different"]))


if __name__ == "__main__":
    raise SystemExit(main())
