"""Messages with advice, and how each is made and followed. One entry a message.

A case names the message by a piece of its text in the source, with ``{}`` for what is filled in, makes it by a command line, and
follows it: the options that it advises (``follow`` None), or whatever it says to do (a function). The next run must not be refused, or
only for the reason in ``then``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import random_ids, rewrite, save_ids, shard_of, stored_tensors, word_tokenizer


@dataclass
class Place:
    """Folders of one case. original: what model was copied from; done: a finished job, gptq_v2, asymmetric, to be copied."""

    model: Path
    out: Path
    tmp: Path
    ids: Path
    original: Path
    done: Path

    def config(self, **values: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def restore(self) -> None:
        shutil.rmtree(self.model, ignore_errors=True)
        self.model.unlink(missing_ok=True)
        shutil.copytree(self.original, self.model)

    def tensor(self, end: str) -> str:
        return next(name for name in stored_tensors(self.model) if name.endswith(end))


Act = Callable[[Place], object]


@dataclass(frozen=True)
class Case:
    """says: a piece of the message's template. made: the command, whose error it is. damage: done before it. family: of the model.

    then: a pattern of the error that the next run may end with. again: whether only a function follows the advice.
    """

    says: str
    made: str
    damage: Act | None = None
    follow: Act | None = None
    family: str = "llama"
    then: str | None = None


#: A plan asks all that a job does before it reads text or weights.
PLAN = "plan {model} --samples 4 --seqlen 16 --device cpu --group-size 32"
JOB = "quantize {model} {out} --calibration {ids} --samples 4 --seqlen 16 --device cpu --group-size 32 --quiet"
RTN = "quantize {model} {out} --method rtn --device cpu --group-size 32 --quiet"
CONVERT = "convert {model} {out} --quiet"
EVAL = "eval {model} --calibration {ids} --seqlen 16 --device cpu --quiet"


def restored(place: Place) -> None:
    place.restore()


def elsewhere(place: Place) -> None:
    """Another OUT: what was in the way is put aside."""
    place.out.rename(place.tmp / "aside")


def packed(place: Place) -> None:
    """The model is the finished job."""
    shutil.rmtree(place.model)
    shutil.copytree(place.done, place.model)


def cut(place: Place, by: int = 8) -> None:
    path = shard_of(place.model, place.tensor("0.mlp.down_proj.weight"))
    path.write_bytes(path.read_bytes()[:-by])


def index(place: Place, change: Callable[[dict[str, Any]], object]) -> None:
    path = place.model / "model.safetensors.index.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def weights(place: Place, **values: str) -> None:
    index(place, lambda value: value["weight_map"].update(values))


def damaged(says: str, damage: Act, made: str = PLAN) -> Case:
    """A file that is damaged, and fetched again."""
    return Case(says, made, damage, restored)


def wide(place: Place) -> None:
    """A model whose positions are as few as a row is long."""
    place.config(max_position_embeddings=16)


def bf16(place: Place) -> None:
    for name, tensor in stored_tensors(place.model).items():
        rewrite(place.model, name, tensor.bfloat16())


def nan(place: Place) -> None:
    name = place.tensor("0.mlp.down_proj.weight")
    weight = stored_tensors(place.model)[name].clone()
    weight[0, 0] = torch.nan
    rewrite(place.model, name, weight)


def begun(place: Place) -> None:
    """OUT is the finished job, of 4 bits in groups of 32."""
    shutil.copytree(place.done, place.out)


def no_tokenizer_place(place: Place) -> None:
    (place.out).write_text("")


OPTIONS = (
    Case("give a command: {}", "", follow=None, then="required"),
    Case("{} and {}: contradict each other; give one of them", PLAN + " --sym --asym", follow=lambda place: None, then="contradict"),
    Case("; did you mean {}?", PLAN + " --bitz 4"),
    Case("; did you mean {}?", PLAN + " --method gptk"),
    Case("{}: no effect {}; add that, or leave out {}", PLAN + " --mse-power 2"),
    Case("{}: no effect {}; add that, or leave out {}", PLAN + " --alpha 0.3"),
    Case("--format {}: {} writes {}; use --format {}", PLAN + " --method rtn --format gguf", then=None),
    Case("--seqlen {}: the model has {} positions; use --seqlen {} or less", PLAN + " --seqlen 4096"),
    Case(
        "--scale-bits {}: {} is bf16, so --format {} stores scales in bf16, which holds {} significant bits; use --scale-bits {}, or leave it out",
        PLAN + " --format compressed-tensors --scale-bits 11",
        bf16,
    ),
    Case("--lm-head: {} has the input embedding's weight", PLAN + " --lm-head", family="tied"),
    Case("use {}", PLAN + " --group-size 64"),
    Case("use {}", PLAN + " --format gguf --bits 3"),
    Case("use {}", PLAN + " --format compressed-tensors --group-size 128", family="gpt2"),
    Case("--activations gpu: the job runs on a CPU; use host, disk or auto", PLAN + " --activations gpu"),
    Case("--device {}: not a device; use auto, cpu or cuda:0", PLAN.replace("--device cpu", "--device toaster"), then="CUDA"),
    Case("--device {}: bigq supports only CPUs", PLAN.replace("--device cpu", "--device mps"), then="CUDA"),
    Case(
        "--trace {}: its folder does not exist; make it first",
        RTN + " --trace {tmp}/traces/t.json",
        follow=lambda place: (place.tmp / "traces").mkdir(),
    ),
    Case(
        "--seqlen 1: a row of one token predicts nothing; use 2 or more",
        "eval {model} --text {ids} --seqlen 1 --device cpu --quiet",
    ),
    Case("--seqlen {}: the model has {} positions; use --seqlen {} or less", "eval {model} --text {ids} --seqlen 4096 --device cpu --quiet", then="rows"),
)

RULES = (
    Case("{}; use '{}'", PLAN + " --skip o_proj"),
    Case("{}; did you mean '{}'?", PLAN + " --skip '.*oproj'"),
    Case("{}; '{}' would match, but readers load {} as one Linear: use '{}'", PLAN + " --rule q_proj:bits=8"),
    Case("{}; did you mean '{}'? Readers load {} as one Linear", PLAN + " --rule '.*qproj:bits=8'"),
    Case("use '{}'", PLAN + " --rule '.*q_proj:bits=8'"),
    Case("use '{}'", PLAN + r" --skip '.*\.up_proj$'"),
    Case("{}; give it first, or leave it out", PLAN + " --rule '.*:bits=8' --rule '.*down_proj:bits=3'"),
    Case("{}; leave it out", PLAN + " --skip '.*mlp' --skip '.*down_proj'"),
    Case("{}: matches only the output head {}, which is quantized with --lm-head; add --lm-head or leave out this rule", PLAN + " --rule lm_head:bits=8"),
    Case("{}: the output head {} stays unquantized unless --lm-head is given; leave out this --skip", PLAN + " --skip lm_head"),
    Case(
        "--skip: no Linear would be quantized; give narrower patterns",
        PLAN + " --skip '.*'",
        follow=lambda place: None,
        then="no Linear",
    ),
)

FOLDERS = (
    Case("{}: OUT is a file; give a folder", RTN, no_tokenizer_place, elsewhere),
    Case(
        "{}: OUT is not empty and holds no bigq job; choose another folder, or empty it",
        RTN,
        lambda place: (place.out.mkdir(), (place.out / "x").write_text("")),
        elsewhere,
    ),
    Case(
        "{}: the job in {} was begun with {}; resume it with that (options that are not given keep their values), or choose another folder",
        RTN.replace("{model}", "{original}") + " --format gptq_v2 --asym --bits 3",
        begun,
        elsewhere,
    ),
    Case("{}: OUT and MODEL ({}) must be separate folders, neither inside the other; choose another OUT", RTN.replace("{out}", "{model}"), None, None),
    Case("{}: holds no job of bigq; name the output folder of bigq quantize or bigq convert", "verify {model} --quiet", None, packed),
    Case("{}: holds no job of bigq; name the output folder of bigq quantize or bigq convert", "status {model}", None, packed),
    Case("{}: is not quantized; convert takes a packed checkpoint", CONVERT + " --to gptq", None, packed, then="zero points of 0"),
    Case("{}: has zero points of 0, which the {} format cannot hold; use --to gptq_v2", CONVERT + " --to gptq", packed, None, then="already"),
    Case("{}: exists and is not empty; choose another folder, or empty it", CONVERT + " --to compressed-tensors", lambda p: (packed(p), p.out.mkdir(), (p.out / "x").touch()), elsewhere),
    Case("{}: exists already; name a file that does not", CONVERT + " --to gguf", lambda p: (packed(p), p.out.touch()), elsewhere, then="GGUF|minimums|fp16"),
    Case("{}: no such folder; convert takes the folder of a quantized model", CONVERT + " --to gptq", lambda p: shutil.rmtree(p.model), lambda p: shutil.copytree(p.done, p.model), then="zero points of 0"),
    Case("{}: is already quantized; give the original model", PLAN, packed, restored),
    Case("{}: no such folder; give MODEL as a folder or a hub id", "generate {model} --prompt w5 --device cpu", lambda p: shutil.rmtree(p.model), restored, then="tokenizer"),
)

DAMAGED = (
    damaged("{}: has no weight_map; fetch the index again", lambda p: index(p, lambda value: value.pop("weight_map"))),
    damaged("{}: the shard of {} is {}, which is not a file name; fetch the index again", lambda p: weights(p, x="../y")),
    damaged("{}: missing, but the index names it; fetch it again", lambda p: weights(p, x="y.safetensors")),
    damaged(
        "{}: tensor {} is missing, but the index names it; fetch the shard again",
        lambda p: weights(p, x=shard_of(p.model, p.tensor("0.mlp.down_proj.weight")).name),
    ),
    damaged("the file is truncated, fetch it again", cut),
    damaged("{}: too short for a safetensors file; fetch it again", lambda p: shard_of(p.model, p.tensor("0.mlp.down_proj.weight")).write_bytes(b"123")),
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
    damaged("{}: has a quantization_config, but no tensor is packed; fetch the checkpoint again", lambda p: p.config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32}), RTN),
    damaged("{}: {} is {}, above the limit of {}; correct it", lambda p: p.config(num_hidden_layers=10**9)),
    damaged("{}: {} is {}, which is not a probability; correct it", lambda p: p.config(attention_dropout=5)),
    damaged("(choose one with --dtype)", lambda p: p.config(dtype="float64"), RTN),
    damaged("{}: missing; MODEL must be a folder with config.json and safetensors shards, or a hub id", lambda p: (p.model / "config.json").unlink()),
    damaged("{}: a link to itself; remove it", lambda p: (p.model / "loop").symlink_to("loop"), RTN),
    damaged(
        "{}: is a file; MODEL must be a folder of safetensors shards or a hub id",
        lambda p: (shutil.rmtree(p.model), p.model.write_text("")),
    ),
)

CASES = (*OPTIONS, *RULES, *FOLDERS, *DAMAGED)
