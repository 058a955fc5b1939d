"""Which programs load bigq's output: one table, from runs of these programs and from their source code.

The plan, the final summary, the model card and docs/formats.md use this table. Versions that were run: transformers 5.22
and 5.23, optimum with GPTQModel 7.7, compressed-tensors 0.18 and 0.20, llama.cpp by llama-cpp-python 0.3.36, vLLM 0.32 on a CPU
(engine and loader; its choice of kernels on CUDA was read in its source code).

Act-order changes nothing for readers: groups stay in natural order ("static groups").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from bigq.scheme import QuantScheme

#: Formats that vLLM reads, and whether it looks a fused Linear's rule up by the fused name (``dynamic``) or by the names of the parts.
BY_FUSED_NAME: Mapping[str, bool] = {"gptq": True, "gptq_v2": True, "compressed-tensors": False, "w8a8-int8": False, "awq": False}

ALL_BITS = (2, 3, 4, 8)
#: Group sizes that vLLM was run with or whose kernels name them; -1 is the whole row.
VLLM_GROUPS = (-1, 32, 64, 128)
#: Model types with experts whose packed checkpoints readers were run with.
WITH_EXPERTS = ("qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3")
#: Llama 4: vLLM brings the rows of queries and keys into another order on loading, but of packed ones only those of symmetric
#: compressed-tensors; in other formats the zero points or the whole matrix keep the old order, without an error.
_LLAMA4 = ("llama4", "llama4_text")
#: Model types for whose activations transformers expects scales in awq (AWQ_SCALES_MAPPINGS), which only AWQ's own method makes.
_SCALED = ("bloom", "falcon", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "starcoder2")
#: Model types whose packed checkpoints readers were run with.
RUN_FAMILIES: Mapping[str, tuple[str, ...]] = {
    "transformers": ("llama", "qwen2", "opt", "bloom", *WITH_EXPERTS),
    "GPTQModel": ("llama", "qwen2", "opt", "bloom", "qwen3_moe", "deepseek_v3"),
    "compressed-tensors": ("llama", "qwen2", "opt", "bloom", *WITH_EXPERTS),
    "vLLM": ("llama", "qwen2", "opt", *WITH_EXPERTS, "gpt_oss", "granitemoe", "llama4_text"),
    "llama.cpp": ("llama", "mistral", "qwen2", "qwen3"),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """The properties of packed Linears that matter to readers. group_size: -1 is the whole row."""

    bits: int
    group_size: int
    symmetric: bool

    @classmethod
    def of(cls, scheme: QuantScheme) -> Kind:
        return cls(scheme.bits, scheme.group_size, scheme.symmetric)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The properties of a job's output that matter to readers.

    format: the value of ``--format``. base: the default kind in the config; kinds: those of the packed Linears. family: the model type,
    None where it is not known. head: whether the output head is packed. transposed: whether Linears are stored transposed (GPT-2), which
    compressed-tensors cannot hold. split: whether parts of a fused Linear differ.
    experts: the kinds of experts' matrices among them, None for banks of experts that stay unquantized; empty for models without experts.
    whole: whether the source holds one tensor for all experts of a packed bank.
    """

    format: str
    base: Kind
    kinds: frozenset[Kind]
    family: str | None = None
    head: bool = False
    transposed: bool = False
    split: bool = False
    experts: frozenset[Kind | None] = frozenset()
    whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A reader loads Linears of these kinds in these formats.

    group_sizes: None means any. mixed: whether Linears of one checkpoint may differ in bits and group size. head: whether the output head
    may be packed. fuses: whether the reader fuses Linears. not_families: model types that fail. not_base: the symmetry that
    must not be the config's default. needs: packages to install; kernel: the kernel on CUDA.
    experts: whether it loads packed experts of these kinds; "alike": only if all experts of the model are packed, with one scheme.
    whole: whether it loads packed experts where the source holds one tensor for all of them.
    """

    reader: str
    formats: tuple[str, ...]
    bits: tuple[int, ...] = ALL_BITS
    symmetric: tuple[bool, ...] = (True, False)
    group_sizes: tuple[int, ...] | None = None
    mixed: bool = True
    head: bool = True
    fuses: bool = False
    not_families: tuple[str, ...] = ()
    not_base: bool | None = None
    experts: bool | Literal["alike"] = True
    whole: bool = True
    needs: str = ""
    kernel: str = ""

    def has(self, kind: Kind) -> bool:
        return (
            kind.bits in self.bits
            and kind.symmetric in self.symmetric
            and (self.group_sizes is None or kind.group_size in self.group_sizes)
        )


_CT = ("compressed-tensors",)
_GPTQ = ("gptq", "gptq_v2")
_AWQ = ("awq",)
_W8A8 = ("w8a8-int8",)
_BNB, _BNB_NEEDS = ("bnb-nf4", "bnb-fp4"), "accelerate, bitsandbytes"
ROWS: tuple[Row, ...] = (
    Row(reader="transformers", formats=_GPTQ, mixed=False, head=False, experts=False, needs="optimum, gptqmodel"),
    Row(reader="transformers", formats=_CT, bits=(2, 4, 8), symmetric=(True,), experts="alike", whole=False, needs="compressed-tensors"),
    Row(reader="transformers", formats=_CT, bits=(3,), symmetric=(True,), experts="alike", whole=False, needs="compressed-tensors>=0.18"),
    Row(reader="transformers", formats=_CT, bits=(2, 4, 8), symmetric=(False,), experts=False, needs="transformers<5.23"),
    Row(
        reader="transformers",
        formats=_CT,
        bits=(3,),
        symmetric=(False,),
        experts=False,
        needs="transformers<5.23, compressed-tensors>=0.18",
    ),
    Row(reader="transformers", formats=_AWQ, bits=(4,), mixed=False, head=False, experts=False, not_families=_SCALED, needs="gptqmodel"),
    Row(
        reader="transformers",
        formats=_W8A8,
        bits=(8,),
        symmetric=(True,),
        group_sizes=(-1,),
        experts=False,
        not_families=("opt",),
        needs="compressed-tensors",
    ),
    Row(reader="GPTQModel", formats=("gptq",), not_families=("glm4_moe", "mixtral"), not_base=False),
    Row(reader="GPTQModel", formats=("gptq_v2",), not_families=("glm4_moe", "mixtral")),
    Row(reader="GPTQModel", formats=_AWQ, bits=(4,), mixed=False, not_families=("glm4_moe", "mixtral")),
    Row(reader="compressed-tensors", formats=_CT, bits=(2, 4, 8)),
    Row(reader="compressed-tensors", formats=_CT, bits=(3,), needs="compressed-tensors>=0.18"),
    Row(
        reader="vLLM",
        formats=_GPTQ,
        bits=(4, 8),
        symmetric=(True,),
        group_sizes=VLLM_GROUPS,
        fuses=True,
        not_families=("bloom", *_LLAMA4),
    ),
    Row(
        reader="vLLM",
        formats=_CT,
        bits=(4, 8),
        symmetric=(True,),
        group_sizes=VLLM_GROUPS,
        fuses=True,
        not_families=("bloom",),
        kernel="Marlin",
    ),
    Row(
        reader="vLLM",
        formats=_CT,
        bits=(4,),
        symmetric=(False,),
        group_sizes=VLLM_GROUPS,
        fuses=True,
        not_families=("bloom", "gpt_oss", *_LLAMA4),
        kernel="Marlin",
    ),
    Row(
        reader="vLLM",
        formats=_CT,
        bits=(8,),
        symmetric=(False,),
        group_sizes=VLLM_GROUPS,
        fuses=True,
        not_families=("bloom", "gpt_oss", *_LLAMA4),
        experts=False,
        kernel="Machete or Conch",
    ),
    Row(
        reader="vLLM",
        formats=_CT,
        bits=(2, 3),
        symmetric=(True,),
        group_sizes=VLLM_GROUPS,
        fuses=True,
        not_families=("bloom",),
        needs="humming",
    ),
    Row(
        reader="vLLM",
        formats=_CT,
        bits=(2, 3),
        symmetric=(False,),
        group_sizes=VLLM_GROUPS,
        fuses=True,
        not_families=("bloom", "gpt_oss", *_LLAMA4),
        needs="humming",
    ),
    Row(
        reader="vLLM",
        formats=_W8A8,
        bits=(8,),
        symmetric=(True,),
        group_sizes=(-1,),
        fuses=True,
        not_families=("bloom", *_LLAMA4),
        kernel="Cutlass",
    ),
    Row(
        reader="vLLM",
        formats=_AWQ,
        bits=(4,),
        mixed=False,
        group_sizes=VLLM_GROUPS,
        fuses=True,
        not_families=("bloom", *_LLAMA4),
        kernel="Marlin",
    ),
    Row(reader="transformers", formats=_BNB, bits=(4,), symmetric=(True,), group_sizes=(64,), head=False, experts=False, needs=_BNB_NEEDS),
    Row(reader="llama.cpp", formats=("gguf",), bits=(4, 8)),
)
#: The format of the safetensors shards that a job of format gguf writes beside its GGUF file.
GGUF_SHARDS = "gptq_v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a reader loads the output.

    note: if it does, its requirements and its kernel on CUDA; otherwise a sentence with the reason and what to do instead.
    """

    reader: str
    loads: bool
    note: str = ""

    @property
    def named(self) -> str:
        """The reader with its note, for a list."""
        return f"{self.reader} ({self.note})" if self.note else self.reader


def verdicts(written: Written) -> tuple[Verdict, ...]:
    """The verdict of every reader of the format, in the table's order. For GGUF: the file's reader, then the readers of the shards."""
    if written.format == "gguf":
        return (*_verdicts(written, written.format), *_verdicts(written, GGUF_SHARDS))
    return tuple(_verdicts(written, written.format))


def readers_of(format: str) -> tuple[str, ...]:
    """Programs with a row for the format of safetensors shards, in the table's order; none for a format that no program was run with."""
    return tuple(dict.fromkeys(row.reader for row in ROWS if format in row.formats))


def read_by(found: Iterable[Verdict]) -> list[str]:
    """Names of the readers that load the output, each with its requirements."""
    return [verdict.named for verdict in found if verdict.loads]


def refused_by(found: Iterable[Verdict]) -> list[str]:
    """A sentence for each reader that does not load the output."""
    return [verdict.note for verdict in found if not verdict.loads]


def not_run_with(found: Iterable[Verdict], family: str | None) -> str | None:
    """A sentence if no reader was run with this model type; None if one was, or if the type is unknown."""
    named = [verdict.reader for verdict in found if verdict.loads]
    if family is None or not named or any(family in RUN_FAMILIES[reader] for reader in named):
        return None
    families = dict.fromkeys(each for reader in named for each in RUN_FAMILIES[reader])
    return f"readers were run with {', '.join(families)}, not with {family}"


def _verdicts(written: Written, format: str) -> Iterator[Verdict]:
    for reader in dict.fromkeys(row.reader for row in ROWS if format in row.formats):
        rows = [row for row in ROWS if row.reader == reader and format in row.formats]
        used = {kind: next((row for row in rows if row.has(kind)), None) for kind in written.kinds or {written.base}}
        reason = _refusal(written, format, rows[0], used)
        if reason is not None:
            yield Verdict(reader=reader, loads=False, note=f"{reader} does not load {reason}")
            continue
        found = [row for row in rows if row in used.values()]
        kernels = dict.fromkeys(row.kernel for row in found if row.kernel)
        needs = dict.fromkeys(need for row in found if row.needs for need in row.needs.split(", "))
        if any(need.startswith("compressed-tensors>") for need in needs):
            needs.pop("compressed-tensors", None)
        notes = [f"with {', '.join(needs)}"] * bool(needs) + [f"CUDA: {', '.join(kernels)}"] * bool(kernels)
        yield Verdict(reader=reader, loads=True, note="; ".join(notes))


def _refusal(written: Written, format: str, row: Row, used: Mapping[Kind, Row | None]) -> str | None:
    """What a reader cannot load, and what to do about it; None if it loads the output. row: the reader's first row."""
    shards = " shards" if written.format == "gguf" else ""
    here = f"{format}{shards}"
    if (reason := _refused_family(written, format, here, row, used)) is not None:
        return reason
    if written.split and row.fuses:
        return f"{here} whose fused Linears have parts that differ"
    other = _advice(written, "compressed-tensors")
    if (reason := _refused_experts(written, here, row, used)) is not None:
        return reason
    if row.not_base is not None and written.base.symmetric == row.not_base:
        what = "symmetric" if row.not_base else "asymmetric"
        return f"{what} {here}{_advice(written, 'gptq_v2')}"
    if not row.mixed and len({(kind.bits, kind.group_size) for kind in written.kinds}) > 1:
        return f"{here} with several bits or group sizes{other}"
    if not row.head and written.head:
        return f"{here} with a packed output head{other}"
    for kind in sorted((kind for kind, found in used.items() if found is None), key=lambda k: (k.bits, k.group_size, k.symmetric)):
        rows = [each for each in ROWS if each.reader == row.reader and format in each.formats]
        if not any(kind.symmetric in each.symmetric for each in rows):
            return f"{'symmetric' if kind.symmetric else 'asymmetric'} {here}{other if format in _GPTQ else ''}"
        if not any(kind.bits in each.bits for each in rows):
            return f"{here} of {kind.bits} bits{other if format in _GPTQ else ''}"
        if not any(-1 in (each.group_sizes or ()) for each in rows):
            return f"{here} in groups of {kind.group_size}"
        taken = sorted({size for each in rows for size in each.group_sizes or () if size != -1})
        sizes = f"{', '.join(map(str, taken))} or -1" if taken else "-1"
        return f"{here} in groups of {kind.group_size}; use --group-size {sizes}"
    return None


def _refused_family(written: Written, format: str, here: str, row: Row, used: Mapping[Kind, Row | None]) -> str | None:
    """What is said of models of a type that a reader does not load in the format, or not asymmetric. row: the reader's first row."""
    rows = [each for each in ROWS if each.reader == row.reader]
    if all(written.family in each.not_families for each in rows if format in each.formats):
        elsewhere = any(written.family not in each.not_families and _CT[0] in each.formats for each in rows)
        return f"{here} of {written.family} models{_advice(written, _CT[0]) if elsewhere else ''}"
    if any(found is not None and written.family in found.not_families for found in used.values()):
        return f"asymmetric {here} of {written.family} models; use --sym"
    return None


def _refused_experts(written: Written, here: str, row: Row, used: Mapping[Kind, Row | None]) -> str | None:
    """What is said of packed experts that a reader cannot load, or loads wrongly. row: the reader's first row."""
    packed = sorted((kind for kind in written.experts if kind is not None), key=lambda k: (k.bits, k.group_size, k.symmetric))
    if packed and row.experts is False:
        return f"experts in {here}: it leaves them random{_advice(written, 'compressed-tensors')}"
    if packed and written.whole and not row.whole:
        return f"experts in {here} that the source holds in one tensor for all: it leaves them random"
    for kind in packed:
        found = used[kind]
        if found is not None and found.experts is False:
            return f"asymmetric experts of {kind.bits} bits in {here}; use --sym"
    if row.experts == "alike" and None in written.experts:
        return f"unquantized experts beside packed Linears in {here}"
    if row.experts == "alike" and len(packed) > 1:
        return f"experts of several schemes in {here}: it unpacks all of them by one"
    return None


def _advice(written: Written, format: str) -> str:
    """Advice, if it works: a GGUF job cannot follow it, and compressed-tensors cannot hold transposed Linears."""
    if written.format == "gguf" or (format == "compressed-tensors" and written.transposed):
        return ""
    return f"; use --format {format}"


def markdown_table() -> str:
    """The table for docs/formats.md."""
    lines = ["| format | reader | bits | zero points | group sizes | limits and needs |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        zeros = "both" if len(row.symmetric) > 1 else "symmetric" if row.symmetric[0] else "asymmetric"
        limits = [f"needs {row.needs}"] * bool(row.needs) + [f"CUDA kernel: {row.kernel}"] * bool(row.kernel)
        limits += ["one bit width and group size for all"] * (not row.mixed) + ["no packed output head"] * (not row.head)
        limits += ["no packed experts"] * (row.experts is False)
        limits += (
            ["all experts packed, with one scheme"] * (row.experts == "alike")
            + ["not with --asym"] * (row.not_base is False)
            + [f"not {', '.join(row.not_families)}"] * bool(row.not_families)
        )
        sizes = "any" if row.group_sizes is None else ", ".join("whole row" if size == -1 else str(size) for size in row.group_sizes)
        if row.formats == ("gguf",):
            sizes, limits = "multiples of 32, whole row", ["8 bits: symmetric"]
        formats = ", ".join(f"`{format}`" for format in row.formats)
        lines.append(f"| {formats} | {row.reader} | {', '.join(map(str, row.bits))} | {zeros} | {sizes} | {'; '.join(limits)} |")
    return "\n".join(lines)
