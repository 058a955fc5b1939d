"""transformers with compressed-tensors, and the formats fp8, nvfp4 and mxfp4."""

from __future__ import annotations

import dataclasses
from typing import Any

from cases import Case
from client_compressed_tensors import fails as fails_in_compressed_tensors
from client_vllm_w8a8 import SKIP, STATIC
from client_w8a8 import CLIENT as W8A8
from client_w8a8 import LIMITS, NOT_ROUNDED

FORMATS = ("fp8", "nvfp4", "mxfp4")
#: Of logits in bf16, against fp32, relative to what the quantization itself changes. A token may go to another expert.
IN_BF16 = 0.3


def make_cases() -> tuple[Case, ...]:
    return (
        *(_case(family, format) for family in ("llama", "qwen2", "opt", "bloom") for format in FORMATS),
        *(_case(family, "nvfp4-w4a4") for family in ("llama", "qwen2", "opt", "bloom")),
        _case("llama", "nvfp4-w4a4", "-head-skip", "--lm-head", *SKIP),
        *(_case("llama", format, "-rtn", "--method", "rtn") for format in FORMATS),
        *(_case("llama", format, "-skip", *SKIP) for format in FORMATS),
        *(_case("llama", format, "-head", "--lm-head") for format in FORMATS),
        *(_case(family, "fp8", *STATIC) for family in ("llama", "qwen2", "opt", "bloom")),
        _case("llama", "fp8", "-head-skip" + STATIC[0], "--lm-head", *SKIP, *STATIC[1:]),
        *(_case(family, format) for family in ("qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3") for format in FORMATS),
    )


def _case(family: str, format: str, name: str = "", *more: str) -> Case:
    routes = ["transformers"] if format == "fp8" else ["unpacked" if format == "nvfp4-w4a4" else "transformers", "dequantize"]
    return Case(name=f"{family}-{format}{name}", family=family, flags=("--format", format, *more), reader={"routes": routes})


def fails(row: dict[str, Any]) -> str | None:
    """The reason why a row is wrong; None if it is right."""
    if "error" not in row and row["of_experts_equal"] != row["of_experts"]:
        return f"{row['of_experts_equal']} of {row['of_experts']} matrices of experts are right"
    if "error" not in row and (row["dtype"] == "bfloat16" or (row["of_experts"] and "mxfp4" in row["case"])):  # its experts are in bf16
        found, largest = row["logits_rel_diff"], IN_BF16 * row["original_rel_diff"]
        if not found < largest:
            return f"logits differ by {found:.2g}"
        row = {**row, "logits_rel_diff": 0.0}
    return fails_in_compressed_tensors(row)


_FAMILIES = "/(qwen3_moe|mixtral|glm4_moe|deepseek_v3)"
W4A4 = {"dequantize/.*-w4a4": "transformers rounds no inputs if it is asked to unpack the weights at once"}
EXPERTS = {f"{_FAMILIES}-nvfp4": "compressed-tensors takes no notice of the global scale of experts", f"{_FAMILIES}-fp8": NOT_ROUNDED}
CLIENT = dataclasses.replace(W8A8, name="floats", cases=make_cases(), fails=fails, limits={**LIMITS, **W4A4, **EXPERTS})
