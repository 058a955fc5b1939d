"""compressed-tensors 0.17: its zero points go through transformers; codes of 3 bits it packs otherwise."""

from __future__ import annotations

import dataclasses

from client_compressed_tensors import CLIENT as NEWEST

CASES = tuple(case for case in NEWEST.cases if not any("3" in flag for flag in case.flags if flag == "3" or "bits=3" in flag))
CLIENT = dataclasses.replace(NEWEST, name="compressed-tensors-0.17", limits={}, cases=CASES)
