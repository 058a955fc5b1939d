"""vLLM's loader (``reader_vllm_numbers.py``) with the fp8-block format."""

from __future__ import annotations

import dataclasses

from client_fp8_block import FAMILIES, make_cases
from client_vllm import DENSE
from client_vllm_fp8_block import HEAD
from client_vllm_numbers import CLIENT as NUMBERS

CASES = make_cases(("loader",), tuple(family for family in FAMILIES if family != "bloom"))
CLIENT = dataclasses.replace(
    NUMBERS,
    name="vllm-fp8-block-loader",
    cases=tuple(dataclasses.replace(case, model={**DENSE.get(case.family, {}), **case.model}) for case in CASES),
    limits=HEAD,
)
