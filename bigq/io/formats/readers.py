"""Which readers load a job's output, by the table of ``readers_table``; and what is said of the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bigq.io.formats.readers_table import ROWS, RUN_FAMILIES, Kind, Row

_CT, _GPTQ = "compressed-tensors", ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The properties of a job's output that matter to readers.

    format: the value of ``--format``. base: the default kind in the config; kinds: those of the packed Linears. family: the model type,
    None where it is not known. head: whether the output head is packed. transposed: whether Linears are stored transposed (GPT-2), which
    compressed-tensors cannot hold. split: whether parts of a fused Linear differ.
    experts: the kinds of experts' matrices among them, None for banks of experts that stay unquantized; empty for models without experts.
    whole: whether the source holds one tensor for all experts of a packed bank. static: whether scales of inputs are static.
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
    static: bool = False


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
    those = [row for row in ROWS if format in row.formats and row.static in (None, written.static)]
    for reader in dict.fromkeys(row.reader for row in those):
        rows = [row for row in those if row.reader == reader]
        used = {kind: next((row for row in rows if row.has(kind)), None) for kind in written.kinds or {written.base}}
        reason = _refusal(written, format, rows, used)
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


def _refusal(written: Written, format: str, rows: Sequence[Row], used: Mapping[Kind, Row | None]) -> str | None:
    """What a reader cannot load, and what to do about it; None if it loads the output. rows: the reader's for the format."""
    row = rows[0]
    shards = " shards" if written.format == "gguf" else ""
    here = f"{format}{shards}"
    if (reason := _refused_family(written, here, rows, used)) is not None:
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


def _refused_family(written: Written, here: str, rows: Sequence[Row], used: Mapping[Kind, Row | None]) -> str | None:
    """What is said of models of a type that a reader does not load in the format, or not asymmetric. rows: the reader's for the format."""
    if all(written.family in each.not_families for each in rows):
        others = (each for each in ROWS if each.reader == rows[0].reader and _CT in each.formats)
        elsewhere = any(written.family not in each.not_families for each in others)
        return f"{here} of {written.family} models{_advice(written, _CT) if elsewhere else ''}"
    if any(found is not None and written.family in found.not_families for found in used.values()):
        return f"asymmetric {here} of {written.family} models; use --sym"
    return None


def _refused_experts(written: Written, here: str, row: Row, used: Mapping[Kind, Row | None]) -> str | None:
    """What is said of packed experts that a reader cannot load, or loads wrongly. row: the reader's first row."""
    packed = sorted((kind for kind in written.experts if kind is not None), key=lambda k: (k.bits, k.group_size, k.symmetric))
    if packed and row.experts is False:
        return f"experts in {here}: {row.experts_fail}{_advice(written, 'compressed-tensors')}"
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
