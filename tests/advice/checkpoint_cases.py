"""Messages about checkpoints, their configs and classes, and how each is made and followed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from follow import line
from models import rewrite, shard_of, stored_tensors
from place import (
    EVAL,
    PLAN,
    RTN,
    Act,
    Case,
    Place,
    cut,
    damaged,
    index,
    nan,
    packed,
    restored,
    weights,
)
from safetensors.torch import save_file

DOCS = Path(__file__).resolve().parents[2] / "docs" / "what-happens-when.md"

DAMAGED = (
    damaged(
        "{}: contains no {} or {}; MODEL must be a folder of safetensors shards or a hub id",
        lambda p: [path.unlink() for path in p.model.glob("*.safetensors*")],
        RTN,
    ),
    damaged(
        "{}: transformers {} does not know model type {}; install a transformers that does, or correct model_type in config.json",
        lambda p: p.config(model_type="nonsense"),
    ),
    damaged("{}: has no weight_map; fetch the index again", lambda p: index(p, lambda value: value.pop("weight_map"))),
    damaged("{}: the shard of {} is {}, which is not a file name; fetch the index again", lambda p: weights(p, x="../y")),
    damaged("{}{}: missing, but the index names it; fetch it again", lambda p: weights(p, x="y.safetensors")),
    damaged(
        "{}: tensor {} is missing, but the index names it; fetch the shard again",
        lambda p: weights(p, x=shard_of(p.model, p.tensor("0.mlp.down_proj.weight")).name),
    ),
    damaged("the file is truncated, fetch it again", cut),
    damaged(
        "{}: too short for a safetensors file; fetch it again",
        lambda p: shard_of(p.model, p.tensor("0.mlp.down_proj.weight")).write_bytes(b"123"),
    ),
    damaged(
        "{}: is a pointer of Git LFS, not the file itself; run git lfs pull in the model's folder",
        lambda p: shard_of(p.model, p.tensor("0.mlp.down_proj.weight")).write_text(
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
        ),
    ),
    Case(
        "{}: begins with a byte order mark, which JSON files must not have; save it as UTF-8 without one",
        PLAN,
        lambda p: (p.model / "config.json").write_text((p.model / "config.json").read_text(), encoding="utf-8-sig") and None,
        lambda p: (p.model / "config.json").write_text((p.model / "config.json").read_text(encoding="utf-8-sig")) and None,
    ),
    damaged(
        "{}: header of {} bytes in a file of {}; damaged or not safetensors, fetch it again",
        lambda p: shard_of(p.model, p.tensor("0.mlp.down_proj.weight")).write_bytes(b"\xff" * 64),
    ),
    damaged(
        "{}: {} bytes after the last tensor; the file is damaged, fetch it again",
        lambda p: shard_of(p.model, p.tensor("0.mlp.down_proj.weight")).open("ab").write(b"12345678"),
    ),
    damaged("{}: tensor {} contains NaN or Inf; the checkpoint is damaged, fetch it again", nan, RTN),
    damaged("{}: quantization_config is {}, not an object; fetch it again", lambda p: p.config(quantization_config=3), RTN),
    damaged(
        "{}: has a quantization_config, but no tensor is packed; fetch the checkpoint again",
        lambda p: p.config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32}),
        EVAL,
    ),
    damaged("{}: {} is {}, above the limit of {}; correct it", lambda p: p.config(num_hidden_layers=10**9)),
    damaged("{}: {} is {}, which is not a probability; correct it", lambda p: p.config(attention_dropout=5)),
    damaged("bigq computes in float32, bfloat16 or float16 (choose one with --dtype)", lambda p: p.config(dtype="float64"), RTN),
    damaged(
        "{}: missing; MODEL must be a folder with config.json and safetensors shards, or a hub id",
        lambda p: (p.model / "config.json").unlink(),
    ),
    damaged("{}: a link to itself; remove it", lambda p: (p.model / "loop").symlink_to("loop"), RTN),
    damaged(
        "{}: is a file; MODEL must be a folder of safetensors shards or a hub id",
        lambda p: (shutil.rmtree(p.model), p.model.write_text("")),
    ),
)


def single(place: Place, name: str, **changes: torch.Tensor) -> None:
    """The checkpoint becomes one file."""
    tensors = {**stored_tensors(place.model), **changes}
    for path in [*place.model.glob("*.safetensors"), place.model / "model.safetensors.index.json"]:
        path.unlink()
    save_file(tensors, place.model / name, metadata={"format": "pt"})


def renamed(change: Callable[[str], str]) -> Act:
    """All tensors get other names."""

    def act(place: Place) -> None:
        tensors = {change(name): tensor for name, tensor in stored_tensors(place.model).items()}
        single(place, "model.safetensors")
        save_file(tensors, place.model / "model.safetensors", metadata={"format": "pt"})

    return act


def by_the_docs(prefix: str) -> Act:
    """The lines of the docs that rename the tensors of a saved checkpoint."""

    def act(place: Place) -> None:
        found = re.search(r"^```python\n(.*?PREFIX.*?)^```", DOCS.read_text(), re.DOTALL | re.MULTILINE)
        assert found is not None
        lines = found[1].replace('"MODEL"', repr(str(place.model))).replace('"_orig_mod."', repr(prefix))
        exec(compile(lines, str(DOCS), "exec"), {})

    return act


QUERY = "model.layers.0.self_attn.q_proj"


def adapter(place: Place, **config: Any) -> None:
    """A LoRA adapter of one Linear beside the weights."""
    values = {"peft_type": "LORA", "base_model_name_or_path": str(place.original), "lora_alpha": 4, "r": 2, **config}
    (place.model / "adapter_config.json").write_text(json.dumps(values))
    save_file(lora(), place.model / "adapter_model.safetensors")


def lora() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        f"{QUERY}.lora_A.weight": torch.randn(2, 64, generator=draw),
        f"{QUERY}.lora_B.weight": torch.randn(64, 2, generator=draw),
    }


def merged(place: Place) -> None:
    """What peft's merge_and_unload and save_pretrained do, in a new folder that takes the place of MODEL."""
    place.restore()
    tensors = lora()
    weight = stored_tensors(place.model)[f"{QUERY}.weight"]
    rewrite(place.model, f"{QUERY}.weight", weight + 2 * tensors[f"{QUERY}.lora_B.weight"] @ tensors[f"{QUERY}.lora_A.weight"])


def only_adapter(place: Place, **config: Any) -> None:
    shutil.rmtree(place.model)
    place.model.mkdir()
    adapter(place, **config)


def unmerged(place: Place) -> None:
    single(place, "model.safetensors", **lora())


def other_config(place: Place, **values: Any) -> None:
    (place.model / "config.json").write_text(json.dumps(values))


def headless(place: Place) -> None:
    tensors = {name: tensor for name, tensor in stored_tensors(place.model).items() if name != "lm_head.weight"}
    single(place, "model.safetensors")
    save_file(tensors, place.model / "model.safetensors", metadata={"format": "pt"})


def without_entry(place: Place, *names: str) -> None:
    path = place.model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in names}))


def named_class(says: str, *architectures: str, advised: str = "LlamaForCausalLM") -> Case:
    """A class that is not the model's, and the one that the message names."""
    return Case(says, PLAN, lambda p: p.config(architectures=list(architectures)), lambda p: p.config(architectures=[advised]))


def lost_code(says: str, code: str | None) -> Case:
    """A model whose own code is missing, or cannot be loaded, and is put there."""
    sound = (
        "from transformers import LlamaConfig, LlamaForCausalLM\nclass Mine(LlamaConfig):\n    pass\n"
        "class MineLM(LlamaForCausalLM):\n    config_class = Mine\n"
    )

    def damage(place: Place) -> None:
        place.config(auto_map={"AutoConfig": "own.Mine", "AutoModelForCausalLM": "own.MineLM"}, architectures=["MineLM"])
        if code is not None:
            (place.model / "own.py").write_text(code)

    return Case(says, PLAN + " --trust-remote-code", damage, lambda p: (p.model / "own.py").write_text(sound) and None)


def own_class(place: Place) -> None:
    place.config(
        model_type="mine",
        architectures=["MineForSequenceClassification"],
        auto_map={"AutoConfig": "c.Mine", "AutoModelForCausalLM": "c.MineLM"},
    )
    (place.model / "c.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Mine(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineLM(LlamaForCausalLM):\n    config_class = Mine\n"
    )


SHARDS_AND_FILE = (
    "{}: lies beside {}, which names other files ({}); transformers loads that one, bigq the shards: remove {}, or {} and its shards, "
    "whichever is not your model"
)
BESIDE = "{}: {} {} lies beside the weights, and transformers would apply it; {}move {} to another folder to use the weights without it"
NO_HEAD = (
    "{}: tensor {} is missing from the checkpoint, so the model has no output head, like embedding models; if the head shares the weight "
    "of the input embedding, set tie_word_embeddings to true in config.json, else fetch it again"
)


def both_forms(place: Place) -> None:
    save_file(stored_tensors(place.model), place.model / "model.safetensors", metadata={"format": "pt"})


def without_shards(place: Place) -> None:
    (place.model / "model.safetensors.index.json").unlink()
    for path in place.model.glob("model-*.safetensors"):
        path.unlink()


NAMES = (
    Case("merge it first ({}, and copy the tokenizer), or ", RTN, adapter, merged),
    Case(BESIDE, RTN, adapter, lambda p: (p.model / "adapter_config.json").rename(p.tmp / "adapter_config.json")),
    Case("merge it into its base model ({}) and give the new folder", RTN, only_adapter, merged),
    Case(
        "it cannot be merged; give {}",
        RTN,
        lambda p: only_adapter(p, peft_type="PROMPT_TUNING"),
        lambda p: asked_model(p, RTN),
    ),
    Case(
        "{}: tensor {} belongs to an adapter that was not merged into the weights; merge it first: "
        "model.merge_and_unload().save_pretrained(NEW_FOLDER), with the peft model that saved it",
        RTN,
        unmerged,
        merged,
    ),
    Case(SHARDS_AND_FILE, RTN, both_forms, lambda p: (p.model / "model.safetensors").unlink()),
    Case(SHARDS_AND_FILE, RTN, both_forms, without_shards),
    damaged(
        "{}: contains shards ({}) but no {}, which says what they hold; fetch the index too",
        lambda p: (p.model / "model.safetensors.index.json").unlink(),
        RTN,
    ),
    Case(
        "{}: contains {}, but neither {} nor {}; if it is the whole model, rename it to {}",
        RTN,
        lambda p: single(p, "weights.safetensors"),
        lambda p: (p.model / "weights.safetensors").rename(p.model / "model.safetensors"),
    ),
    Case(
        "{}: transformers_weights names {} as the model's weights, but bigq reads {} or {}; rename that file and remove the entry",
        RTN,
        lambda p: (single(p, "x.safetensors"), p.config(transformers_weights="x.safetensors")),
        lambda p: ((p.model / "x.safetensors").rename(p.model / "model.safetensors"), without_entry(p, "transformers_weights")),
    ),
    Case(
        "{}: tensor {}{} from the checkpoint; fetch it again, or correct config.json",
        RTN,
        lambda p: p.config(num_hidden_layers=4),
        restored,
    ),
    Case(
        "{}: tensor {}{} from the checkpoint; fetch it again, or correct config.json",
        RTN,
        lambda p: p.config(num_hidden_layers=4),
        lambda p: p.config(num_hidden_layers=3),
    ),
    damaged(
        "{}: the names of the tensors do not match the model of config.json: it has {}, the checkpoint has {} ({} of {} are missing); "
        "give config.json and weights that were saved together",
        renamed(lambda name: name.replace("model.layers", "enc").replace("_proj", "").replace("norm", "n").replace("head", "h")),
        RTN,
    ),
    Case(NO_HEAD, RTN, headless, lambda p: p.config(tie_word_embeddings=True)),
    damaged(NO_HEAD, headless, RTN),
    Case(
        "{}: names of tensors begin with {}, as in {}, those of the model do not; save the inner model with save_pretrained ({}), or give "
        "the config.json that belongs to it",
        RTN,
        renamed(lambda name: f"inner.{name}"),
        by_the_docs("inner."),
    ),
    Case(
        "{}: tensor {}: {} is what {} adds to names; save {} with save_pretrained instead ({})",
        RTN,
        renamed(lambda name: f"_orig_mod.{name}"),
        by_the_docs("_orig_mod."),
    ),
    damaged(
        "{}: is already quantized ({}); give the original model, in fp32, fp16 or bf16 (of quantized ones, bigq reads gptq, "
        "compressed-tensors, awq and bitsandbytes)",
        lambda p: p.config(quantization_config={"quant_method": "eetq", "bits": 8}),
    ),
    damaged(
        "{}: is already quantized (bitsandbytes); of that, bigq reads 4 bits (nf4, fp4) with double quantization, stored as uint8: give "
        "such a checkpoint, or the original model",
        lambda p: p.config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
    ),
    damaged(
        "{}: is already quantized: tensor {} is one that {} stores, although config.json has no quantization_config; give the original "
        "model, in fp32, fp16 or bf16",
        lambda p: (packed(p), without_entry(p, "quantization_config")),
    ),
    damaged(
        "{}: is already quantized ({}, by its {}); give the original model, in fp32, fp16 or bf16",
        lambda p: p.config(vision_config={"quantization_config": {"quant_method": "fp8"}}),
    ),
)

CLASSES = (
    named_class("{}; {}: give MODEL one of those{}", "LlamaForSequenceClassification"),
    damaged("{}; {}: give MODEL one of those{}", lambda p: p.config(architectures=["BertForMaskedLM"])),
    damaged("{}: {}{}; {}: give MODEL one of those", lambda p: other_config(p, model_type="bert", architectures=["BertModel"])),
    named_class(
        '{}: architectures names {}, which transformers does not know; {}: if this is one, set architectures to ["{}"]', "LlamaForScoring"
    ),
    named_class(
        '{} of another model type than {}, so readers that go by one or the other run different models; set architectures to ["{}"] to '
        "quantize what transformers runs, or correct model_type",
        "OPTForCausalLM",
    ),
    lost_code("fetch {} into it", None),
    lost_code("run {}", "import no_such_package"),
    lost_code("fetch its .py files again", "def ("),
    damaged(
        "{}: architectures names {}{}, but the causal language model of the checkpoint's code is {}; {}: give MODEL one of those",
        own_class,
        PLAN + " --trust-remote-code",
    ),
    damaged(
        "{}: {} is an encoder-decoder model; {}: give MODEL one of those",
        lambda p: other_config(p, model_type="florence2", architectures=["Florence2ForConditionalGeneration"]),
    ),
    damaged(
        "{}; such models are not supported yet, and {} is only a part of it; give MODEL a text model",
        lambda p: other_config(p, model_type="whisper", architectures=["WhisperForConditionalGeneration"]),
    ),
    damaged(
        "{}: is that of a part of a diffusion model ({}); {}: give MODEL one of those",
        lambda p: other_config(p, _class_name="FluxTransformer2DModel", _diffusers_version="0.35"),
    ),
)


def asked_model(place: Place, command: str) -> list[str]:
    """The same command with the original model."""
    return line(command.replace("{model}", "{original}"), **vars(place))


CHECKPOINT_CASES = (*DAMAGED, *NAMES, *CLASSES)
