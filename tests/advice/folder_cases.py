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
from checkpoint_cases import headless, single
from follow import line
from models import VOCABULARY, rewrite, shard_of, stored_tensors
from place import (
    CONVERT,
    EVAL,
    GENERATE,
    JOB,
    PLAN,
    RTN,
    Act,
    Case,
    Place,
    asked,
    begun,
    converted,
    damaged,
    elsewhere,
    packed,
    quantized,
    restored,
    tokenizer,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers_for_gguf import byte_fallback, sentencepiece_bytes

from bigq.cli.main import main
from bigq.errors import UsageError
from bigq.inspect.verify import verify
from bigq.io.checksum import save_record
from bigq.io.gguf_file import special_tokens
from bigq.io.gguf_vocab import read_vocabulary
from bigq.io.index import Checkpoint
from bigq.io.reader import open_file, read_rows
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


def finer(place: Place) -> None:
    """A checkpoint in compressed-tensors whose scales have more bits than fp16."""
    compressed(place)
    name = place.tensor("0.mlp.down_proj.weight_scale")
    rewrite(place.model, name, stored_tensors(place.model)[name].float() * 1.0001)


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
    Case(
        "{}: holds points of {}, which GGUF does not; keep the model in its present format",
        CONVERT + " --to gguf",
        lambda p: quantized(p, "--format bnb-nf4 --group-size 64"),
        evaluated,
    ),
    Case(
        "{}: its scales are not exact in fp16, the dtype of scales in {}; keep the model in its present format",
        CONVERT + " --to gptq",
        finer,
        evaluated,
    ),
    Case(
        "{}: llama.cpp's {} has no place for tensor {}; use --format gptq",
        PLAN + " --format gguf --trust-remote-code",
        another_module,
    ),
    Case(
        "; use --format {}",
        noted(PLAN + " --format gptq --asym", r"vLLM[^.]*?; use --format \S+"),  # type: ignore[arg-type]
        None,
        lambda p: lambda: noted(PLAN + " --format compressed-tensors --asym", r"vLLM[^.]*?; use --format \S+")(p),
    ),
    Case(
        "{} in groups of {}; use --group-size {}",
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
    Case(
        "choose another --format", "plan " + ODD, None, lambda p: line(f"plan {ODD} --format compressed-tensors", **vars(p)), family="odd"
    ),
    Case(
        "give {} the same bits, group_size and sym, or skip all of them",
        PLAN + " --rule '.*q_proj:bits=8' --rule '.*gate_proj:bits=8'",
        None,
        lambda p: [
            line(PLAN + " --rule '.*(q|k|v|qkv)_proj:bits=8' --rule '.*(gate|up|gate_up)_proj:bits=8'", **vars(p)),
            line(PLAN + " --skip '.*(q|k|v|qkv)_proj' --skip '.*(gate|up|gate_up)_proj'", **vars(p)),
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
        CONVERT + " --to compressed-tensors",
        lambda p: settled(p, sym=True),
        lambda p: settled(p, sym=False),
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
    damaged(
        "the model's dtype is {}; bigq computes in float32, bfloat16 or float16 (choose one with --dtype)",
        lambda p: p.config(dtype="float64"),
        RTN,
    ),
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


GGUF_ROWS = 300


def byte_tokenizer(place: Place, **changes: Any) -> None:
    """A tokenizer of bytes, as GGUF holds it; changes: of tokenizer.json, or of its model where the name begins with an underscore."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate([*alphabet, "ab"])}, merges=[("a", "b")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    value = json.loads(made.to_str())
    for name, change in changes.items():
        if name.startswith("_"):
            value["model"][name[1:]] = change
        else:
            value[name] = change
    (place.model / "tokenizer.json").write_text(json.dumps(value))


def vocabulary(says: str, *, follow: Act = byte_tokenizer, **changes: Any) -> Case:
    """A tokenizer that GGUF cannot hold; fetched again it is the sound one."""
    return Case(says, lambda p: read_vocabulary(p.model, GGUF_ROWS), lambda p: byte_tokenizer(p, **changes), follow, family="small")


def without_tokenizer(place: Place) -> None:
    for path in place.model.glob("*token*"):
        path.unlink()


NO_GGUF = (
    "{}: llama.cpp does not support this tokenizer ({}); use --format gptq, or remove the tokenizer's files from the folder to write a "
    "GGUF file that accepts only token ids"
)
NO_JSON = (
    "{}: has a tokenizer, but no tokenizer.json or tokenizer.model, which GGUF needs; write one with "
    "AutoTokenizer.from_pretrained(…).save_pretrained(…) of transformers, or use --format gptq"
)
GGUF = RTN + " --format gguf"


def deaf(place: Place) -> None:
    """A tokenizer that leaves out every x."""
    tokenizer(place)
    path = place.model / "tokenizer.json"
    normalizer = {"type": "Replace", "pattern": {"String": "x"}, "content": ""}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": normalizer}))


def invalid_template(place: Place) -> None:
    tokenizer(place)
    (place.model / "chat_template.jinja").write_text("{{ raise_exception('no') }}")


TOKENIZERS = (
    Case(NO_GGUF, GGUF, tokenizer, lambda p: line(RTN + " --format gptq", **vars(p)), family="small"),
    Case(NO_GGUF, GGUF, tokenizer, without_tokenizer, family="small"),
    vocabulary("{}: {} is {}, not an object; fetch it again", model=3),
    vocabulary("{}: {} with id {} is not a valid token; fetch it again", _vocab={"a": -1}),
    vocabulary(
        "{}: token {} has id {}, but the model's embedding has {} rows; fetch the tokenizer of this model", _vocab={"a": 0, "b": GGUF_ROWS}
    ),
    vocabulary("{}: {} is not a merge of two tokens; fetch it again", _merges=["a b c"]),
    vocabulary("{}: {} in added_tokens is not a valid token; fetch it again", added_tokens=[{"id": "x"}]),
    Case(
        "{}: not a valid SentencePiece model; fetch it again",
        lambda p: read_vocabulary(p.model, 10 * GGUF_ROWS),
        lambda p: (p.model / "tokenizer.model").write_bytes(b"junk"),
        lambda p: (p.model / "tokenizer.model").write_bytes(sentencepiece_bytes(byte_fallback(size=GGUF_ROWS))),
        family="small",
    ),
    Case(
        NO_JSON,
        GGUF,
        lambda p: (p.model / "vocab.json").write_text("{}"),
        lambda p: line(RTN + " --format gptq", **vars(p)),
        family="small",
    ),
    Case(
        NO_JSON,
        lambda p: read_vocabulary(p.model, GGUF_ROWS),
        lambda p: (p.model / "vocab.json").write_text("{}"),
        byte_tokenizer,
        family="small",
    ),
    Case(
        "{}: its tokenizer files are invalid ({}); fetch them again",
        lambda p: special_tokens(p.model, GGUF_ROWS),
        lambda p: (p.model / "tokenizer.json").write_text("[]"),
        restored,
        family="small",
    ),
    Case(
        "--prompt: the tokenizer turns it into no tokens; give some text for the model to continue",
        GENERATE.replace("w5", "x"),
        deaf,
        asked(GENERATE),
        family="small",
    ),
    Case(
        "{}: its tokenizer fails on the prompt ({}: {}); fetch it again",
        GENERATE + " --chat",
        invalid_template,
        lambda p: (p.model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}"),
        family="small",
    ),
)

VERIFIED = "quantize {source} {out} --method rtn --device cpu --group-size 32 --asym --format gptq_v2 --quiet"


def made_again(place: Place) -> None:
    """The command that made the folder, again."""
    assert main(line(VERIFIED, source=place.done.parent / "model", out=place.out)) == 0


def problems(place: Place) -> None:
    """What verify finds, as an error."""
    found = verify(place.out)
    if found:
        raise UsageError(" | ".join(found))


def appended(name: str) -> Act:
    """A file of the finished job is damaged."""

    def act(place: Place) -> None:
        begun(place)
        with next(place.out.glob(name)).open("ab") as file:
            file.write(b"12345678")

    return act


def verified(says: str, damage: Act, follow: Act = made_again) -> Case:
    return Case(says, problems, damage, lambda p: (follow(p), lambda: problems(p))[1])


def converted_and_damaged(place: Place) -> None:
    converted(place)
    (place.out / ".bigq/conversion.json").write_text("{}")


def converted_again(place: Place) -> Callable[[], None]:
    shutil.rmtree(place.out)
    converted(place)
    return lambda: problems(place)


def resealed(place: Place, **changes: Any) -> None:
    """The request of the job in OUT says something else."""
    begun(place)
    path = place.out / ".bigq/job.json"
    value = json.loads(path.read_text())
    value.pop("check", None)
    save_record(path, value | changes)


def resumed(place: Place) -> list[str]:
    return line(VERIFIED, source=place.done.parent / "model", out=place.out)


def in_another(place: Place) -> list[str]:
    return line(VERIFIED, source=place.done.parent / "model", out=place.tmp / "other")


SAME = "quantize {done}/../model {out} --device cpu --quiet"
RECORDS = (
    Case(
        "{}: has {}; run the command that made it again, or choose another folder",
        "verify {out}",
        appended("model-*"),
        made_again,
    ),
    verified("run the job's command again to rewrite it", appended(".bigq/manifest.json")),
    Case("run the command that made the folder again", "report {out} --model-card", appended(".bigq/manifest.json"), made_again),
    verified(
        "no record lists it: it is left over from a killed run or was put there by hand; remove it",
        lambda p: (begun(p), (p.out / "stray.txt").touch()),
        lambda p: (p.out / "stray.txt").unlink(),
    ),
    verified(
        "run the same command again to resume it",
        lambda p: (begun(p), [(p.out / name).unlink() for name in (".bigq/manifest.json", "config.json", "model.safetensors.index.json")]),
    ),
    Case("convert the model again, into another folder", problems, converted_and_damaged, converted_again),
    Case("restore it from a copy, or begin the job again in an empty folder", SAME, appended(".bigq/job.json"), in_another),
    Case(
        "restore it from a copy, or begin the job again in an empty folder",
        SAME,
        appended(".bigq/job.json"),
        lambda p: shutil.copy(p.done / ".bigq/job.json", p.out / ".bigq/job.json"),
    ),
    Case(
        "was {} when the job in {} was begun, is {} now; give the source that it was begun with, or choose another folder",
        "quantize {model} {out} --device cpu --quiet",
        lambda p: (begun(p), p.config(rope_theta=5000.0)),
        resumed,
    ),
    Case("{}: its job.json: {}; {}: begin the job again in another folder", SAME, lambda p: resealed(p, code=3), in_another),
    Case(
        "{}: its shard {} was made from another source than {} (the weights differ); give the model that the job was started with, or "
        "choose another folder",
        "quantize {model} {out} --device cpu --quiet",
        lambda p: (begun(p), sorted(p.out.glob("model-*"))[-1].unlink()),
        resumed,
    ),
    Case(
        "no job was begun here; run bigq quantize",
        lambda p: state_of(p),
        lambda p: p.out.mkdir(),
        lambda p: (made_again(p), lambda: state_of(p))[1],
    ),
)


def state_of(place: Place) -> None:
    """What status says of a job that is not finished, as an error."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        main(["status", str(place.out)])
    said = " ".join(told.getvalue().split())
    if "finished" not in said:
        raise UsageError(said)


TEXTS = (
    Case(
        "{}: is no JSON array; give one JSON object per line, or one array of them",
        lambda p: ((p.tmp / "t").write_text("{}"), list(json_array(p.tmp / "t"))),
        None,
        lambda p: lambda: ((p.tmp / "t").write_text("[{}]"), list(json_array(p.tmp / "t"))),
    ),
)

FOLDER_CASES = (*ADVISED_ELSEWHERE, *PACKED, *ODD_FILES, *CONFIGS, *DISKS, *TOKENIZERS, *RECORDS, *TEXTS)


def finite_never(_: object) -> bool:
    return False


def overflowing(place: Place) -> None:
    """The first MLP overflows in fp16."""
    for end in ("0.mlp.gate_proj.weight", "0.mlp.up_proj.weight"):
        name = place.tensor(end)
        rewrite(place.model, name, stored_tensors(place.model)[name] * 2000)


def elsewhere_with(*flags: str) -> Act:
    """The job in another folder, with options."""
    return lambda place: [*line(JOB.replace("{out}", "{tmp}/other"), **vars(place)), *flags]


def numbers(says: str, broken: str, made: str = JOB, family: str = "small") -> Case:
    """A check of numbers that fails once."""
    flags = (["--dtype", "bfloat16"], ["--on-nonfinite", "skip"], ["--skip", ".*q_proj", "--skip", ".*k_proj", "--skip", ".*v_proj"])
    if "damping" in says:
        flags = (["--damping", "0.1"], *flags)
    follow: Act = lambda p: [[*line(made.replace("{out}", "{tmp}/other" + str(i)), **vars(p)), *each] for i, each in enumerate(flags)]  # noqa: E731
    return Case(says, made, None, follow, family=family, faults=((broken, finite_never),))


LEAVE = "leave this Linear unquantized with --skip or --on-nonfinite skip"
NUMBERS = (
    Case(
        "use another --dtype (bfloat16 has more range than float16)",
        JOB + " --dtype float16",
        overflowing,
        elsewhere_with("--dtype", "bfloat16"),
        family="small",
    ),
    Case(
        LEAVE,
        JOB,
        None,
        elsewhere_with("--on-nonfinite", "skip"),
        family="small",
        limits=(("bigq.solver.hessian.upper_cholesky_", finite_never),),
    ),
    numbers("{}: the solve produced NaN or Inf; use a higher --damping, or {}", "bigq.solver.gptq.is_finite"),
    Case(
        "{}: its Hessian is not positive definite even with damping {}; use more calibration samples, or {}",
        JOB,
        None,
        elsewhere_with("--samples", "8"),
        family="small",
        faults=(("bigq.solver.hessian.upper_cholesky_", finite_never),),
    ),
    numbers(
        "{}: its outputs are not finite (NaN or Inf) for {}, beginning with {}; {}; when quantizing, "
        "--on-nonfinite skip leaves such tokens out",
        "bigq.sched.solve.propagate.is_finite",
        JOB + " --on-nonfinite stop",
        "llama",
    ),
    numbers(
        "{}: its inputs in the original model contain NaN or Inf, or are too large (NaN or Inf in the cross matrix); {}"
        ", or leave out such tokens with --on-nonfinite skip",
        "bigq.solver.upstream_error.is_finite",
        JOB + " --method gptaq",
    ),
    Case(
        "{}: the calibration inputs contain NaN or Inf, or their squares overflow (NaN or Inf in the Hessian); {}, or l"
        "eave out such tokens with --on-nonfinite skip",
        JOB + " --dtype float16",
        overflowing,
        elsewhere_with("--dtype", "bfloat16"),
        family="small",
    ),
)


def removed_meanwhile(place: Place) -> None:
    """A shard is gone when its tensors are read."""
    info = Checkpoint.open(place.model)["lm_head.weight"]
    shutil.rmtree(place.model)
    open_file(info)


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


REST = (
    Case(
        "{}: cannot be written: {}; free some space, then run the same command again",
        RTN,
        None,
        again,
        family="small",
        faults=(("bigq.job.journal.sync_folder", failing(errno.ENOSPC)),),
    ),
    Case(
        "{}: cannot store activations there: {}; free some space, or use --activations host",
        JOB + " --activations disk",
        None,
        again,
        faults=(("os.pwritev", failing(errno.ENOSPC)),),
    ),
    Case(
        "{}: cannot store activations there: {}; free some space, or use --activations host",
        JOB + " --activations disk",
        faults=(("os.pwritev", failing(errno.ENOSPC)),),
    ),
    Case(
        "{}: larger than {} bytes, so bigq did not write it; choose another folder",
        SAME,
        lambda p: (begun(p), os.truncate(p.out / ".bigq/journal.jsonl", 2**40)),
        in_another,
    ),
    Case(
        "{}: config.json says that {} is symmetric, but Q4_0 and Q8_0 cannot hold its zero points or scales; quantize it again",
        "convert {model} {tmp}/x.gguf --to gguf --quiet",
        lambda p: settled(p, sym=True),
        lambda p: line(RTN.replace("{model}", "{original}") + " --format gguf", **vars(p)),
    ),
    Case(
        "--device {}: PyTorch finds {} CUDA devices here; use --device cpu, or check the NVIDIA driver",
        PLAN.replace("--device cpu", "--device cuda:99"),
    ),
    Case("be above 0; leave it out to get the most likely tokens", GENERATE + " --temperature 0", tokenizer),
    Case(
        "{}: cannot be opened to read tensor {}: {}; check that it exists and is readable",
        removed_meanwhile,
        None,
        lambda p: (shutil.copytree(p.original, p.model), lambda: open_file(Checkpoint.open(p.model)["lm_head.weight"]).close())[1],
        family="small",
    ),
    Case(
        "{}: out of memory while generating; use fewer --max-new-tokens, or --device cpu",
        GENERATE,
        tokenizer,
        lambda p: [asked(GENERATE, max_new_tokens="1")(p), line(GENERATE, **vars(p))],
        family="small",
        faults=(("transformers.GenerationMixin.generate", no_memory),),
    ),
    Case(
        "{}: no such folder, and the hub cannot be reached to fetch it; download it first or check the network",
        "plan owner/absent --device cpu --group-size 32",
        None,
        lambda p: line(PLAN, **vars(p)),
    ),
    Case(
        "the {} {}/{} cannot be fetched ({}); give your own text with {} FILE, or use {} builtin",
        JOB.replace("{ids}", "c4"),
        tokenizer,
        lambda p: [line(JOB, **vars(p)), line(JOB.replace("{out}", "{tmp}/other").replace("{ids}", "builtin"), **vars(p))],
        family="small",
    ),
    Case(
        "{}: tensor {} is missing; fetch the model again",
        lambda p: Checkpoint.open(p.model)["lm_head.weight"],
        headless,
        restored,
        family="small",
    ),
    Case(
        "{}: tensor {} has {} rows, but row {} is needed; fetch the model again",
        lambda p: read_rows(Checkpoint.open(p.model)["model.embed_tokens.weight"], torch.tensor([VOCABULARY - 1])),
        lambda p: single(p, "model.safetensors", **{"model.embed_tokens.weight": torch.zeros(5, 64)}),
        restored,
        family="small",
    ),
)

FOLDER_CASES = (*FOLDER_CASES, *NUMBERS, *REST)
