"""Messages about files in folders, packed checkpoints, disks that fail, formats and tokenizers, and how each is made and followed."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from follow import line
from models import rewrite, shard_of, stored_tensors
from place import CONVERT, EVAL, GENERATE, PLAN, RTN, Act, Case, Place, asked, bf16, damaged, elsewhere, packed, quantized, restored
from checkpoint_cases import single

from bigq.cli.main import main
from bigq.errors import UsageError
from bigq.io.index import Checkpoint
from bigq.io.text_files import json_array

ODD = "{model} --samples 4 --seqlen 16 --device cpu --group-size -1"


def original(command: str, **changes: str) -> Callable[[Place], list[str]]:
    """The command with the original model."""
    return lambda place: asked(command.replace("{model}", "{original}"), **changes)(place)


def again(place: Place) -> None:
    """What was wrong is over: the same command is run again."""


def settled(place: Place, **values: Any) -> None:
    """The model is the finished job, with other values in its quantization_config."""
    packed(place)
    path = place.model / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= values
    path.write_text(json.dumps(config))


def compressed(place: Place, flags: str = "", **values: Any) -> None:
    quantized(place, f"--format compressed-tensors {flags}")
    path = place.model / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= values
    path.write_text(json.dumps(config))


def sound(place: Place) -> None:
    """The packed checkpoint is fetched again."""
    packed(place)


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def noted(command: str, note: str) -> Act:
    """A plan whose note takes the part of an error."""

    def act(place: Place) -> None:
        told = io.StringIO()
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            assert main(line(command, **vars(place))) == 0
        found = re.search(note, " ".join(told.getvalue().split()))
        if found:
            raise UsageError(found[0])

    return act


def stop(*_: Any) -> Any:
    raise UsageError("the demo begins")


def own_llama(body: str) -> Callable[[Place], None]:
    """A llama with code of its own."""

    def act(place: Place) -> None:
        place.config(auto_map={"AutoConfig": "c.Mine", "AutoModelForCausalLM": "c.MineLM"}, architectures=["MineLM"])
        (place.model / "c.py").write_text(
            "import torch\nfrom transformers import LlamaConfig, LlamaForCausalLM\nfrom transformers.pytorch_utils import Conv1D\n"
            "class Mine(LlamaConfig):\n    pass\n"
            "class MineLM(LlamaForCausalLM):\n    config_class = Mine\n"
            f"    def __init__(self, config):\n        super().__init__(config)\n        {body}\n"
        )

    return act


def another_head(place: Place) -> None:
    own_llama("self.lm_head = Conv1D(config.vocab_size, config.hidden_size)")(place)
    head = stored_tensors(place.model)["lm_head.weight"]
    single(place, "model.safetensors", **{"lm_head.weight": head.T.contiguous(), "lm_head.bias": torch.zeros(len(head))})


def another_module(place: Place) -> None:
    own_llama("self.extra = torch.nn.Linear(4, 4, bias=False)")(place)
    single(place, "model.safetensors", **{"extra.weight": torch.ones(4, 4)})


def tiny(place: Place) -> None:
    """A bf16 model whose scales are below those of fp16, packed as compressed-tensors."""
    bf16(place)
    name = place.tensor("0.mlp.down_proj.weight")
    rewrite(place.model, name, (stored_tensors(place.model)[name].float() * 1e-9).bfloat16())
    compressed(place)


def evaluated(place: Place) -> list[str]:
    """The model is kept as it is, and used."""
    return line(EVAL, **vars(place))


ADVISED_ELSEWHERE = (
    Case(
        "{}: holds files that are not the demo's; choose another folder with --out",
        "demo --out {tmp}",
        lambda p: (p.tmp / "x").touch(),
        lambda p: line("demo --out {out}", **vars(p)),
        then="the demo begins",
        limits=(("bigq.cli.demo._run", stop),),
    ),
    Case(
        "keep the model in its present format",
        CONVERT + " --to gptq",
        lambda p: quantized(p, "--format compressed-tensors --group-size -1"),
        evaluated,
        family="odd",
    ),
    Case("{}: its scales are not exact in fp16, the dtype of scales in {}; keep the model in its present format", CONVERT + " --to gptq", tiny, evaluated),
    Case(
        "{}: llama.cpp's {} has no place for tensor {}; use --format gptq",
        PLAN + " --format gguf --trust-remote-code",
        another_module,
    ),
    Case(
        "; use --format {}",
        noted(PLAN + " --format gptq --asym", r"vLLM[^.]*?; use --format \S+"),  # type: ignore[arg-type]
        None,
        lambda p: lambda: noted(PLAN + " --format gptq_v2 --asym", r"vLLM[^.]*?; use --format \S+")(p),
    ),
    Case(
        "{} in groups of {}; use --group-size {} or -1",
        noted(PLAN.replace("32", "16"), r"\S+ in groups of 16; use --group-size .* or -1"),
        None,
        lambda p: lambda: noted(PLAN, r"\S+ in groups of \d+; use --group-size .* or -1")(p),
    ),
    Case(
        "{}: no such folder; give MODEL as a folder or a hub id",
        lambda p: Checkpoint.open(p.tmp / "no"),
        None,
        lambda p: lambda: Checkpoint.open(p.model),
    ),
    Case("choose another --format", "plan " + ODD, None, lambda p: line(f"plan {ODD} --format compressed-tensors", **vars(p)), family="odd"),
    Case(
        "give {} the same bits, group_size and sym, or skip all of them",
        PLAN + " --rule '.*0.*q_proj:bits=8' --rule '.*k_proj:bits=3'",
        None,
        lambda p: [
            line(PLAN + " --rule '.*[qkv]_proj:bits=8'", **vars(p)),
            line(PLAN + " --skip '.*[qkv]_proj'", **vars(p)),
        ],
    ),
    Case("--lm-head: {} is a {}, not a Linear; leave out --lm-head", PLAN + " --lm-head --trust-remote-code", another_head),
)

PACKED = (
    Case(
        "{}: quantization_config: checkpoint_format is {}; bigq reads {}, so convert the checkpoint to one of these first",
        EVAL,
        lambda p: settled(p, checkpoint_format="marlin"),
        sound,
    ),
    Case("{}: quantization_config: {}; fetch it again", EVAL, lambda p: settled(p, bits="four"), sound),
    Case(
        "{}: {} is packed, but the quantization config skips it; fetch the model again",
        EVAL,
        lambda p: settled(p, dynamic={"-:.*down_proj": {}}),
        sound,
    ),
    Case(
        "{}: {} is packed, but the quantization config ignores it; fetch the model again",
        EVAL,
        lambda p: compressed(p, ignore=["re:.*down_proj"]),
        lambda p: (restored(p), compressed(p)),
    ),
    Case(
        "{}: {} is packed, but no group of the quantization config contains it; fetch the model again",
        EVAL,
        lambda p: (compressed(p), targets(p, "re:.*up_proj")),
        lambda p: (restored(p), compressed(p)),
    ),
    Case(
        "{}: quantization_config: {}; fetch it again, or give the unquantized model as MODEL",
        EVAL,
        lambda p: compressed(p, quantization_status="frozen?"),
        lambda p: (restored(p), compressed(p)),
    ),
    Case(
        "{}: quantization_config: {}; fetch it again, or give the unquantized model as MODEL",
        EVAL,
        lambda p: compressed(p, transform_config={"x": 1}),
        restored,
    ),
    Case("transform_config is set; bigq does not read transformed weights", EVAL, lambda p: compressed(p, transform_config={"x": 1}), restored),
    Case(
        "bigq reads only natural order; use a checkpoint that was quantized with actorder=static or without actorder",
        EVAL,
        lambda p: (compressed(p), actorder(p)),
        lambda p: (restored(p), compressed(p)),
    ),
    Case("{}: {}; fetch it again", EVAL, lambda p: (packed(p), torn(p)), sound),
    Case(
        "{}: tensor {} holds zero points other than {}, although the quantization_config of {} does not say {}: false; "
        "add that if the zero points are right, or download the checkpoint again",
        CONVERT + " --to gptq_v2",
        lambda p: settled(p, sym=True, checkpoint_format="gptq_v2"),
        lambda p: settled(p, sym=False),
        then="already in format",
    ),
)


def targets(place: Place, *names: str) -> None:
    path = place.model / "config.json"
    config = json.loads(path.read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["targets"] = list(names)
    path.write_text(json.dumps(config))


def actorder(place: Place) -> None:
    path = place.model / "config.json"
    config = json.loads(path.read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["actorder"] = "group"
    path.write_text(json.dumps(config))


def torn(place: Place) -> None:
    name = place.tensor("0.mlp.down_proj.scales")
    rewrite(place.model, name, stored_tensors(place.model)[name][:, :-8].contiguous())


ODD_FILES = (
    Case(
        "{}: is not a staging folder of bigq convert, but has its name; remove it, or choose another OUT",
        CONVERT + " --to compressed-tensors",
        lambda p: (packed(p), (p.tmp / "out.partial").mkdir(), (p.tmp / "out.partial/x").touch()),
        lambda p: shutil.rmtree(p.tmp / "out.partial"),
    ),
    Case(
        "{}: is not a staging folder of bigq convert, but has its name; remove it, or choose another OUT",
        CONVERT + " --to compressed-tensors",
        lambda p: (packed(p), (p.tmp / "out.partial").mkdir(), (p.tmp / "out.partial/x").touch()),
        lambda p: line(CONVERT.replace("{out}", "{tmp}/other") + " --to compressed-tensors", **vars(p)),
    ),
    Case(
        "{}: a link out of the model folder, to {}; replace it by a copy of the file, or give the folder with the original files as MODEL",
        RTN,
        lambda p: linked(p),
        lambda p: (os.unlink(p.model / "notes.txt"), shutil.copy(p.tmp / "notes.txt", p.model / "notes.txt")),
    ),
    Case(
        "{}: a link out of the model folder, to {}; replace it by a copy of the file, or give the folder with the original files as MODEL",
        RTN,
        lambda p: linked(p),
        original(RTN),
    ),
    Case(
        "{}: a link to something that is neither a file nor a folder; remove it",
        RTN,
        lambda p: ((p.model / ".hidden").mkdir(), os.mkfifo(p.model / ".hidden/pipe"), (p.model / "link").symlink_to(".hidden/pipe")),
        lambda p: (p.model / "link").unlink(),
    ),
    Case(
        "{}: neither a file nor a folder; remove it from the model folder",
        RTN,
        lambda p: os.mkfifo(p.model / "pipe"),
        lambda p: (p.model / "pipe").unlink(),
    ),
    Case(
        "{}: more than {} files; give the folder of a single model as MODEL",
        RTN,
        lambda p: ((p.model / "many").mkdir(), [(p.model / f"many/{i}.txt").touch() for i in range(100)]),
        original(RTN),
        limits=(("bigq.io.containment.MAX_ENTRIES", 100),),
    ),
)


def linked(place: Place) -> None:
    (place.tmp / "notes.txt").write_text("notes")
    (place.model / "notes.txt").symlink_to(place.tmp / "notes.txt")


def swapped(place: Place) -> None:
    """A shard's header says that a tensor overlaps another."""
    path = shard_of(place.model, place.tensor("0.mlp.down_proj.weight"))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    shape = header[name]["shape"]
    size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
    header["twin"] = {"dtype": header[name]["dtype"], "shape": shape, "data_offsets": [0, size]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


CONFIGS = (
    damaged("{}: tensor {} {}; the file is damaged, fetch it again", swapped, RTN),
    Case(
        "{}: ends at byte {}, before the end of tensor {} in its header; fetch it again",
        RTN,
        None,
        again,
        faults=(("os.preadv", lambda *_: 0),),
    ),
    Case(
        "{}: {} needs the checkpoint's own code (auto_map); pass --trust-remote-code to run it",
        PLAN,
        lambda p: p.config(inner={"auto_map": {"AutoConfig": "c.Mine"}}),
    ),
    damaged("the model's dtype is {}; bigq computes in float32, bfloat16 or float16 (choose one with --dtype)", lambda p: p.config(dtype="float64"), RTN),
    Case(
        "the model's dtype is {}; bigq computes in float32, bfloat16 or float16 (choose one with --dtype)",
        RTN,
        lambda p: p.config(dtype="float64"),
        lambda p: [[*line(RTN, **vars(p)), "--dtype", name] for name in ("float32", "bfloat16", "float16")],
    ),
    damaged(
        "config.json describes a model of more than {} tensors, which the checkpoint does not hold; correct it",
        lambda p: p.config(num_hidden_layers=3000),
        RTN,
    ),
)

DISKS = (
    Case(
        "{}: needs about {} of disk space, but only {} are free; free some space",
        CONVERT + " --to compressed-tensors",
        packed,
        again,
        faults=(("shutil.disk_usage", lambda _: SimpleNamespace(free=10)),),
    ),
    Case(
        "{}: reading at byte {} (tensor {}) failed: {}; check the disk, then run the same command again",
        RTN,
        None,
        again,
        faults=(("os.preadv", failing(errno.EIO)),),
    ),
    Case("check the disk, then run the same command again", RTN, None, again, faults=(("os.fsync", failing(errno.EIO)),)),
    Case("free some space or choose another folder", RTN, None, again, faults=(("os.fsync", failing(errno.ENOSPC)),)),
    Case("free some space or choose another folder", RTN, None, elsewhere, faults=(("os.fsync", failing(errno.ENOSPC)),)),
    Case(
        "choose a folder with write permission",
        RTN,
        None,
        lambda p: line(RTN.replace("{out}", "{tmp}/other"), **vars(p)),
        faults=(("os.fsync", failing(errno.EACCES)),),
    ),
)


def tokenizer_with(change: Callable[[dict[str, Any]], object]) -> Act:
    """A tokenizer of bytes, as GGUF holds it, whose tokenizer.json is changed."""

    def act(place: Place) -> None:
        gguf_tokenizer(place)
        path = place.model / "tokenizer.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return act


def gguf_tokenizer(place: Place) -> None:
    from tokenizers_for_gguf import TOKENIZERS

    del TOKENIZERS, place


TEXTS = (
    Case(
        "{}: is no JSON array; give one JSON object per line, or one array of them",
        lambda p: ((p.tmp / "t").write_text("{}"), list(json_array(p.tmp / "t"))),
        None,
        lambda p: lambda: ((p.tmp / "t").write_text("[{}]"), list(json_array(p.tmp / "t"))),
    ),
)

FOLDER_CASES = (*ADVISED_ELSEWHERE, *PACKED, *ODD_FILES, *CONFIGS, *DISKS, *TEXTS)
