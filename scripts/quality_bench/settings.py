"""What is compared: subjects, settings, contestants, and the runs that follow from them. To add a contestant, add a line to CONTESTANTS."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Draws of calibration rows, without a row in common.
DRAWS = 4

#: Packages whose versions results name, beside those of this environment.
PROGRAMS = ("gptqmodel", "llmcompressor", "compressed-tensors", "auto-round", "autoawq")

CHOOSING, JUDGING = "choosing", "judging"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model with its text. half: whether settings are chosen or judged with it; a model whose figures chose a default judges no more.

    rows, seqlen: of calibration. windows, window: held-out rows and their tokens. groups: the group sizes that divide its Linears.
    """

    name: str
    model: str
    corpus: str
    half: str
    rows: int = 64
    seqlen: int = 256
    windows: int = 64
    window: int = 256
    groups: tuple[int, ...] = (64, 128)


SUBJECTS = (
    Subject(name="smollm2-docs", model="smollm2", corpus="documentation", half=CHOOSING, rows=32, window=128, groups=(64,)),
    Subject(name="smollm2-prose", model="smollm2", corpus="prose", half=JUDGING, rows=32, window=128, groups=(64,)),
    Subject(name="tiny-llama", model="tiny-llama", corpus="source-choosing", half=CHOOSING),
    Subject(name="outliers", model="outliers", corpus="source-choosing", half=CHOOSING),
    Subject(name="opt", model="opt", corpus="source-judging", half=JUDGING),
    Subject(name="moe", model="moe", corpus="source-judging", half=JUDGING, groups=(64,)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    bits: int
    group_size: int
    symmetric: bool

    @property
    def name(self) -> str:
        return f"{self.bits}g{self.group_size}-{'sym' if self.symmetric else 'asym'}"


def settings_of(subject: Subject) -> list[Setting]:
    """The most telling first; groups of 128 at 4 bits only."""
    shapes = [(bits, 64) for bits in (4, 3, 2)] + [(4, 128)] * (128 in subject.groups)
    return [Setting(bits=bits, group_size=group, symmetric=symmetric) for bits, group in shapes for symmetric in (True, False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A program with its settings. Of bigq: ``flags`` of ``bigq quantize``. Of others: ``told``, fields beside bits, groups and symmetry.

    kind: "default" (as the program is without options), "best" (the best known settings of it), "preset" (bigq's), "awq" (AWQ in each
    program), or "" for any other.
    """

    name: str
    tool: str = "bigq"
    flags: str = ""
    told: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.flags)


CONTESTANTS: tuple[Contestant, ...] = (
    Contestant(name="bigq", kind="default"),
    *(Contestant(name=f"bigq {quality}", flags=f"--quality {quality}", kind="preset") for quality in ("fast", "best")),
    Contestant(name="bigq, no sweeps", flags="--sweeps 0"),
    Contestant(name="bigq, activation order", flags="--order activation"),
    Contestant(name="bigq, ranges", flags="--scales minmax"),
    Contestant(name="bigq rotated", flags="--rotate"),
    Contestant(name="bigq best, rotated", flags="--quality best --rotate"),
    Contestant(name="bigq best, tuned", flags="--quality best --tune-steps 64"),
    # Less than 3 bits in groups of 64 take in gptq_v2, which is 3.297.
    Contestant(name="bigq, 3.25 bits per weight, groups of 192", flags="--bits-per-weight 3.25 --group-size 192"),
    Contestant(name="bigq, groups of 192", flags="--group-size 192"),
    # Rotation is compared where groups are large: 576 inputs of SmolLM2 make three groups of 192, and none of 128.
    *(
        Contestant(name=f"bigq best{more}, {shape}", flags=f"--quality best{flag} --group-size {size}")
        for shape, size in (("by row", -1), ("groups of 192", 192), ("groups of 128", 128))
        for more, flag in (("", ""), (", rotated", " --rotate"))
    ),
    Contestant(name="bigq, folded", flags="--fold awq"),
    Contestant(name="bigq best, folded", flags="--quality best --fold awq"),
    Contestant(name="bigq awq", flags="--method awq", kind="awq"),
    Contestant(name="bigq rtn", flags="--method rtn"),
    Contestant(name="GPTQModel", tool="gptqmodel", kind="default"),
    Contestant(name="GPTQModel, mse", tool="gptqmodel", told={"mse": 2.4}),
    Contestant(name="GPTQModel, gptaq", tool="gptqmodel", told={"gptaq": {"alpha": 0.25}}),
    Contestant(name="GPTQModel, gptaq, mse", tool="gptqmodel", told={"gptaq": {"alpha": 0.25}, "mse": 2.4}, kind="best"),
    Contestant(name="llm-compressor", tool="llmc", kind="default"),
    Contestant(name="llm-compressor, mse", tool="llmc", told={"weights": {"observer": "memoryless_mse"}}),
    Contestant(name="llm-compressor, imatrix", tool="llmc", told={"weights": {"observer": "imatrix_mse"}}, kind="best"),
    Contestant(name="llm-compressor, awq", tool="llmc", told={"awq": {}}, kind="awq"),
    Contestant(name="AutoAWQ", tool="autoawq", kind="awq"),
    Contestant(name="auto-round", tool="auto_round", kind="default"),
    Contestant(name="auto-round, 1000 steps", tool="auto_round", told={"iters": 1000}, kind="best"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    subject: Subject
    contestant: Contestant
    setting: Setting
    draw: int

    @property
    def name(self) -> str:
        slug = "-".join(re.findall(r"[\w.]+", self.contestant.name.lower()))
        return f"{self.subject.name}.{self.setting.name}.{slug}.{self.draw}"


def gptqmodel(run: Run) -> dict[str, Any]:
    """Fields of its QuantizeConfig."""
    s = run.setting
    return {"bits": s.bits, "group_size": s.group_size, "sym": s.symmetric, **run.contestant.told}


def llmc(run: Run) -> dict[str, Any]:
    """As quantize_llmc.py takes them."""
    s, told = run.setting, run.contestant.told
    shape = {"num_bits": s.bits, "symmetric": s.symmetric, "strategy": "group", "group_size": s.group_size}
    return {**told, "weights": shape | told.get("weights", {})}


def auto_round(run: Run) -> dict[str, Any]:
    """Arguments of its AutoRound."""
    s = run.setting
    return {"bits": s.bits, "group_size": s.group_size, "sym": s.symmetric, **run.contestant.told}


def autoawq(run: Run) -> dict[str, Any]:
    """Fields of its quant_config."""
    s = run.setting
    return {"w_bit": s.bits, "q_group_size": s.group_size, "zero_point": not s.symmetric, **run.contestant.told}


#: What a program is told for a run.
PEERS: Mapping[str, Callable[[Run], dict[str, Any]]] = {"gptqmodel": gptqmodel, "llmc": llmc, "auto_round": auto_round, "autoawq": autoawq}


def all_runs(draws: Iterable[int], contestants: Iterable[Contestant] = CONTESTANTS) -> list[Run]:
    """Every run, draw by draw."""
    order = itertools.product(draws, SUBJECTS, contestants)
    return [Run(subject=s, contestant=c, setting=setting, draw=d) for d, s, c in order for setting in settings_of(s)]
