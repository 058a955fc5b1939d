"""What a case of a message with advice is, and what cases do to the model, the text and the folders of a run.

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
    """says: a piece of the message's template. made: the command whose error it is, or a call. damage: done before it.

    follow: does what is advised; returns another command or call, or several, where it is no longer the same one.
    family: of the model. then: a pattern of the error that the next run may end with. limits: of bigq, lowered for both runs, so that
    the case stays small. faults: functions that are replaced in the first run only.
    """

    says: str
    made: str | Act
    damage: Act | None = None
    follow: Act | None = None
    family: str = "llama"
    then: str | None = None
    limits: tuple[tuple[str, object], ...] = ()
    faults: tuple[tuple[str, object], ...] = ()


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


def widened(place: Place) -> None:
    """Only a config is left, with feed-forward layers of 200 units, which are no multiple of 32."""
    for path in place.model.glob("*.safetensors*"):
        path.unlink()
    place.config(intermediate_size=200)


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
            words[words.index(f"--{flag.replace('_', '-')}") + 1] = value.format(**vars(place))
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
