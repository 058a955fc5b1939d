"""The names that options, records and code share: methods, formats, tiers, dtypes, and reactions to values that are not finite."""

from __future__ import annotations

from typing import Literal, get_args

#: Methods; each has a file in ``bigq.methods``.
MethodName = Literal["gptq", "gptaq", "awq", "rtn"]
#: Rules by which scales of inputs are chosen that the module before divides by.
FoldName = Literal["none", "awq", "smoothquant"]
#: The orders in which columns are quantized.
OrderName = Literal["natural", "activation", "group"]
#: How scales are found: from the range of a group's weights, or by a search for the least error.
ScalesName = Literal["minmax", "search"]
#: How attention is computed that a model writes step by step: as its own code does, or fused.
AttentionName = Literal["model", "fused"]
#: Presets of options.
QualityName = Literal["fast", "balanced", "best"]
#: Output formats. "gguf": shards in gptq_v2, from which a stopped job resumes, and one GGUF file made from them.
FormatName = Literal[
    "gptq",
    "gptq_v2",
    "compressed-tensors",
    "w8a8-int8",
    "fp8",
    "fp8-block",
    "nvfp4",
    "nvfp4-w4a4",
    "mxfp4",
    "awq",
    "bnb-nf4",
    "bnb-fp4",
    "gguf",
]
#: Scales of the inputs of Linears, where readers round these: a reader finds one for each token, or calibration one for each Linear.
InputScalesName = Literal["dynamic", "static"]
#: Where the calibration rows' hidden states are kept between blocks.
Tier = Literal["gpu", "host", "disk"]
#: The same, as asked for: "auto" is the first tier that has room.
TierChoice = Literal["auto", "gpu", "host", "disk"]
#: How the shards of a model on the hub get here: "stream" leaves them there, and "auto" does so where the disk cannot hold them.
FetchChoice = Literal["auto", "download", "stream"]
#: What a job does when it meets NaN or Inf.
OnNonfinite = Literal["stop", "skip"]
#: The precision of forward passes; "auto" is the checkpoint's own.
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

METHODS: tuple[MethodName, ...] = get_args(MethodName)
FOLDS: tuple[FoldName, ...] = get_args(FoldName)
ORDERS: tuple[OrderName, ...] = get_args(OrderName)
ATTENTIONS: tuple[AttentionName, ...] = get_args(AttentionName)
FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)
INPUT_SCALES: tuple[InputScalesName, ...] = get_args(InputScalesName)
TIERS: tuple[Tier, ...] = get_args(Tier)
TIER_CHOICES: tuple[TierChoice, ...] = get_args(TierChoice)
FETCH_CHOICES: tuple[FetchChoice, ...] = get_args(FetchChoice)
ON_NONFINITE: tuple[OnNonfinite, ...] = get_args(OnNonfinite)
DTYPES: tuple[DtypeName, ...] = get_args(DtypeName)
#: Methods that look at weights alone, so options about calibration have no effect: those of ``bigq.methods`` that are not calibrated.
DATA_FREE_METHODS: tuple[MethodName, ...] = ("rtn",)
