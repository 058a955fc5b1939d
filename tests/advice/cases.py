"""Messages with advice, and how each is made and followed. One entry a message.

A case names the message by a piece of its text in the source, with ``{}`` for what is filled in, makes it by a command line, and
follows it: the options that it advises (``follow`` None), or whatever it says to do (a function). The next run must not be refused, or
only for the reason in ``then``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from follow import line
from models import rewrite, shard_of, stored_tensors, word_tokenizer

from bigq.cli.main import main
from bigq.io.checksum import save_record


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
EVAL = "eval {model} --data {ids} --seqlen 16 --device cpu --quiet"


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


def bf16(place: Place) -> None:
    place.config(dtype="bfloat16")
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
    Case("give a command: {}", "", follow=lambda p: ["plan", p.model, "--group-size", "32"]),
    Case(
        "{} and {}: contradict each other; give one of them",
        PLAN + " --sym --asym",
        follow=lambda p: ["plan", p.model, "--group-size", "32", "--asym"],
    ),
    Case("; did you mean {}?", PLAN + " --bitz 4"),
    Case("; did you mean {}?", PLAN + " --method gptk"),
    Case("{}: no effect {}; add that, or leave out {}", PLAN + " --mse-power 2"),
    Case("{}: no effect {}; add that, or leave out {}", PLAN + " --alpha 0.3"),
    Case("--seqlen {}: the model has {} positions; use --seqlen {} or less", PLAN + " --seqlen 4096"),
    Case(
        "which holds {} significant bits; use --scale-bits {}, or leave it out",
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
        "eval {model} --data {ids} --seqlen 1 --device cpu --quiet",
    ),
    Case(
        "--seqlen {}: the model has {} positions; use --seqlen {} or less",
        "eval {model} --data {ids} --seqlen 4096 --device cpu --quiet",
        then="rows",
    ),
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
    Case(
        "{}: matches only the output head {}, which is quantized with --lm-head; add --lm-head or leave out this rule",
        PLAN + " --rule lm_head:bits=8",
    ),
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
    Case(
        "{}: OUT and MODEL ({}) must be separate folders, neither inside the other; choose another OUT",
        RTN.replace("{out}", "{model}"),
        None,
        lambda p: line(RTN, model=p.model, out=p.out),
    ),
    Case("{}: holds no job of bigq; name the output folder of bigq quantize or bigq convert", "verify {model}", None, packed),
    Case("{}: holds no job of bigq; name the output folder of bigq quantize or bigq convert", "status {model}", None, packed),
    Case("{}: is not quantized; convert takes a packed checkpoint", CONVERT + " --to gptq", None, packed, then="zero points of 0"),
    Case(
        "{}: has zero points of 0, which the {} format cannot hold; use --to gptq_v2", CONVERT + " --to gptq", packed, None, then="already"
    ),
    Case(
        "{}: exists and is not empty; choose another folder, or empty it",
        CONVERT + " --to compressed-tensors",
        lambda p: (packed(p), p.out.mkdir(), (p.out / "x").touch()),
        elsewhere,
    ),
    Case(
        "{}: exists already; name a file that does not",
        CONVERT + " --to gguf",
        lambda p: (packed(p), p.out.touch()),
        elsewhere,
        then="GGUF|minimums|fp16",
    ),
    Case(
        "{}: no such folder; convert takes the folder of a quantized model",
        CONVERT + " --to gptq",
        lambda p: shutil.rmtree(p.model),
        lambda p: shutil.copytree(p.done, p.model),
        then="zero points of 0",
    ),
    Case("{}: is already quantized; give the original model", PLAN, packed, restored),
)

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
        RTN,
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

GENERATE = "generate {model} --prompt w5 --max-new-tokens 2 --device cpu --quiet"


def tokenizer(place: Place) -> None:
    word_tokenizer().save_pretrained(place.model)


def tokens(place: Place, **changes: int) -> None:
    """A tokenizer whose words have other numbers."""
    tokenizer(place)
    path = place.model / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["vocab"] |= changes
    path.write_text(json.dumps(value))


def asked(case: str, **changes: str) -> Callable[[Place], list[str]]:
    """The same command with other options."""

    def follow(place: Place) -> list[str]:
        words = line(case, **vars(place))
        for flag, value in changes.items():
            words[words.index(f"--{flag.replace('_', '-')}") + 1] = value
        return words

    return follow


def huge(place: Place) -> None:
    """A weight whose groups need a scale above the maximum of fp16."""
    name = place.tensor("0.mlp.down_proj.weight")
    weight = stored_tensors(place.model)[name].clone()
    weight[0] = 1e11
    rewrite(place.model, name, weight)


def unfinished(place: Place) -> None:
    packed(place)
    (place.model / "config.json").unlink()


def own_code(place: Place) -> None:
    place.config(model_type="mine", auto_map={"AutoConfig": "c.Mine", "AutoModelForCausalLM": "c.MineLM"})
    (place.model / "c.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Mine(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineLM(LlamaForCausalLM):\n    config_class = Mine\n"
    )


MORE = (
    Case(
        "quantize the original model with --format gguf {}",
        "convert {model} {tmp}/x.gguf --to gguf --quiet",
        lambda p: quantized(p, "--bits 3"),
        lambda p: [*line(RTN.replace("{model}", "{original}"), **vars(p)), "--bits", "4", "--format", "gguf"],
    ),
    Case("use --scale-bits {}, or leave out --scale-bits", PLAN + " --format gguf --asym --scale-bits 11"),
    Case(
        "{}: it or MODEL is a link that leads to itself; name a folder",
        CONVERT + " --to compressed-tensors",
        lambda p: (packed(p), p.out.symlink_to(p.out.name)),
        lambda p: p.out.unlink(),
    ),
    Case("--prompt: is empty; give some text", GENERATE.replace("w5", "''"), tokenizer, asked(GENERATE)),
    Case("--chat: the tokenizer of {} has no chat template; leave --chat out", GENERATE + " --chat", tokenizer),
    Case(
        "but the model has {} positions; give a shorter one",
        GENERATE.replace("w5", f"'{'w5 ' * 200}'"),
        tokenizer,
        asked(GENERATE),
    ),
    Case("{}; generating needs a tokenizer: add its files to the folder", GENERATE, None, tokenizer),
    Case("but the model has {}; fetch the tokenizer of this model", GENERATE, lambda p: tokens(p, w5=4000), tokenizer),
    Case("{}give {} {} or more", PLAN + " --ram 1KiB"),
    Case("{}give {} {} or more", PLAN + " --disk 1KiB"),
    Case("free as much, or ", PLAN + " --on a100 --samples 100000000".replace("--device cpu", ""), None, asked(PLAN, samples="4")),
    Case(
        "its weights need a scale above 65504, the maximum of fp16; leave this Linear unquantized with --skip",
        RTN,
        huge,
        lambda p: [*line(RTN.replace("{out}", "{tmp}/other"), **vars(p)), "--skip", ".*down_proj"],
    ),
    Case(
        "{}: is missing because the bigq job in this folder is not finished; run its command again to resume it",
        EVAL,
        unfinished,
        packed,
    ),
    Case("{}: model type {} needs the checkpoint's own code; pass --trust-remote-code to run it", PLAN, own_code),
    Case(
        "{}: tensor {}{} is missing from the checkpoint; fetch it again, or correct config.json",
        RTN,
        lambda p: p.config(num_hidden_layers=4),
        restored,
    ),
    Case(
        "{}: tensor {} is also in {}; fetch the model again",
        RTN,
        lambda p: twice(p),
        restored,
    ),
    Case("{}: __metadata__ is {}, not an object of strings; fetch the file again", PLAN, lambda p: metadata(p), restored),
    Case(
        "{}: contains pickle checkpoints (.bin, .pt), which bigq never loads since they can run code; convert them",
        RTN,
        lambda p: pickled(p),
        restored,
    ),
    Case("{}; Linears are called {}{}", PLAN + " --skip '.*router'", None, lambda p: [*line(PLAN, **vars(p)), "--skip", ".*o_proj"]),
    Case("is too long or repeats too much to be matched in bounded time; use at most", PLAN + " --skip '(a*)*b'", None, asked(PLAN)),
    Case("{}: OUT holds a converted model, in which no job can run; choose another folder", RTN, lambda p: converted(p), elsewhere),
    Case(
        "{}: bigq writes no GGUF files of model type {}, only of {}; use --format gptq or compressed-tensors",
        PLAN + " --format gguf",
        family="bloom",
    ),
    Case("which llama.cpp computes differently; use --format gptq", PLAN + " --format gguf", lambda p: p.config(hidden_act="gelu")),
    Case(
        "{}: {}; the file is damaged or from another version of bigq; start the job again in another folder",
        RTN.replace("{model}", "{original}"),
        lambda p: (begun(p), versioned(p)),
        elsewhere,
    ),
    Case(
        "{}: is the current folder, which cannot be replaced; name another one",
        "convert {model} . --to compressed-tensors --quiet",
        packed,
        lambda p: line(CONVERT + " --to compressed-tensors", **vars(p)),
    ),
    Case(
        "{}: is the root of the file system; name another folder",
        "convert {model} / --to compressed-tensors --quiet",
        packed,
        lambda p: line(CONVERT + " --to compressed-tensors", **vars(p)),
    ),
    Case(
        "{}: is a folder, or its folder does not exist; name a file in an existing folder",
        "convert {model} {tmp}/no/x.gguf --to gguf --quiet",
        packed,
        lambda p: line("convert {model} {tmp}/x.gguf --to gguf", **vars(p)),
        then="fp16 numbers",
    ),
    Case(
        "quantize the model with --format gguf",
        "convert {model} {tmp}/x.gguf --to gguf --quiet",
        packed,
        lambda p: [*line(RTN.replace("{model}", "{original}"), **vars(p)), "--asym", "--format", "gguf"],
    ),
    Case("use {}", "convert {model} {out} --to compressed-tensors --quiet", lambda p: quantized(p, "--format gptq"), None, family="gpt2"),
    Case(
        "{}: its scales are not exact in {}, the dtype of scales in {}; quantize the original model",
        CONVERT + " --to compressed-tensors",
        lambda p: (bf16(p), quantized(p, "--scale-bits 11 --format gptq")),
        lambda p: (restored(p), bf16(p), quantized(p, "--scale-bits 8 --format gptq")),
    ),
)


def twice(place: Place) -> None:
    """A shard lies there under a second name, and the index names both."""
    shard = shard_of(place.model, place.tensor("0.mlp.down_proj.weight"))
    shutil.copy(shard, place.model / "twice.safetensors")
    weights(place, x="twice.safetensors")


def metadata(place: Place) -> None:
    path = shard_of(place.model, place.tensor("0.mlp.down_proj.weight"))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]) | {"__metadata__": 3}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def pickled(place: Place) -> None:
    for path in [*place.model.glob("*.safetensors"), place.model / "model.safetensors.index.json"]:
        path.unlink()
    torch.save({}, place.model / "pytorch_model.bin")


def converted(place: Place) -> None:
    assert main(line("convert {done} {out} --to compressed-tensors --quiet", **vars(place))) == 0


def quantized(place: Place, flags: str) -> None:
    """The model becomes its own quantized version."""
    made = place.tmp / "made"
    shutil.rmtree(made, ignore_errors=True)
    assert (
        main(line(f"quantize {{model}} {{made}} --method rtn --device cpu --group-size 32 --quiet {flags}", model=place.model, made=made))
        == 0
    )
    shutil.rmtree(place.model)
    made.rename(place.model)


def versioned(place: Place) -> None:
    """A record that no version of bigq writes."""
    path = place.out / ".bigq/job.json"
    value = json.loads(path.read_text())
    value.pop("check", None)
    value["settings"]["unheard_of"] = 1
    save_record(path, value)


CASES = (*MORE, *OPTIONS, *RULES, *FOLDERS, *DAMAGED)
