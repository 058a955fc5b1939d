"""Which programs load bigq's output: one table, from runs of these programs and from their source code.

The plan, the final summary, the model card and docs/formats.md use this table. Versions that were run: transformers 5.22
and 5.23, optimum with GPTQModel 7.7, compressed-tensors 0.18 and 0.20, llama.cpp by llama-cpp-python 0.3.36, vLLM 0.32 on a CPU
(engine and loader; its choice of kernels on CUDA was read in its source code).

Act-order changes nothing for readers: groups stay in natural order ("static groups").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bigq.scheme import QuantScheme

#: Formats that vLLM reads, and whether it looks a fused Linear's rule up by the fused name (``dynamic``) or by the names of the parts.
BY_FUSED_NAME: Mapping[str, bool] = {
    "gptq": True,
    "gptq_v2": True,
    **dict.fromkeys(("compressed-tensors", "w8a8-int8", "fp8", "fp8-block", "nvfp4", "nvfp4-w4a4", "mxfp4", "awq"), False),
}

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
class Row:
    """A reader loads Linears of these kinds in these formats.

    group_sizes: None means any. mixed: whether Linears of one checkpoint may differ in bits and group size. head: whether the output head
    may be packed. fuses: whether the reader fuses Linears. not_families: model types that fail. not_base: the symmetry that
    must not be the config's default. needs: packages to install; kernel: the kernel on CUDA.
    experts: whether it loads packed experts of these kinds; "alike": only if all experts of the model are packed, with one scheme.
    experts_fail: what it does with them if not.
    whole: whether it loads packed experts where the source holds one tensor for all of them.
    static: whether scales of inputs must be static, or must not be; None for formats without such scales.
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
    experts_fail: str = "it leaves them random"
    whole: bool = True
    static: bool | None = None
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
_NVFP4, _W4A4, _MXFP4, _FP8, _FP8_BLOCK = ("nvfp4",), ("nvfp4-w4a4",), ("mxfp4",), ("fp8",), ("fp8-block",)
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
    *(
        Row(
            reader="transformers",
            formats=formats,
            bits=(8,),
            symmetric=(True,),
            group_sizes=(size,),
            experts="alike",
            whole=False,
            static=static,
            not_families=families,
            needs="compressed-tensors",
        )
        for formats, size, static, families in (
            (_W8A8, -1, False, ("opt",)),
            (_W8A8, -1, True, ()),
            (_FP8, -1, False, ("opt",)),
            (_FP8, -1, True, ()),
            (_FP8_BLOCK, 128, False, ()),
        )
    ),
    Row(
        reader="transformers",
        formats=_NVFP4,
        bits=(4,),
        symmetric=(True,),
        group_sizes=(16,),
        experts=False,
        experts_fail="it takes no notice of their global scale",
        needs="compressed-tensors",
    ),
    Row(
        reader="transformers",
        formats=_W4A4,
        bits=(4,),
        symmetric=(True,),
        group_sizes=(16,),
        experts=False,
        needs="compressed-tensors",
    ),
    Row(
        reader="transformers",
        formats=_MXFP4,
        bits=(4,),
        symmetric=(True,),
        group_sizes=(32,),
        experts="alike",
        whole=False,
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
    *(
        Row(
            reader="vLLM",
            formats=formats,
            bits=(bits,),
            symmetric=(True,),
            group_sizes=(size,),
            head=formats != _FP8_BLOCK,
            fuses=True,
            not_families=("bloom", *_LLAMA4),
            kernel=kernel,
        )
        for formats, bits, size, kernel in (
            (_W8A8, 8, -1, "Cutlass"),
            (_FP8, 8, -1, "Cutlass or Marlin"),
            (_FP8_BLOCK, 8, 128, "DeepGEMM, Cutlass, Marlin or Triton"),
            (_NVFP4, 4, 16, "Marlin"),
            (_W4A4, 4, 16, "FlashInfer or Cutlass, else Marlin"),
            (_MXFP4, 4, 32, "Marlin"),
        )
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


def markdown_table() -> str:
    """The table for docs/formats.md."""
    lines = ["| format | reader | bits | zero points | group sizes | limits and needs |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        zeros = "both" if len(row.symmetric) > 1 else "symmetric" if row.symmetric[0] else "asymmetric"
        limits = [f"needs {row.needs}"] * bool(row.needs) + [f"CUDA kernel: {row.kernel}"] * bool(row.kernel)
        limits = ([] if row.static is None else [f"{'static' if row.static else 'dynamic'} scales of inputs"]) + limits
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
