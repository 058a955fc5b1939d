"""compressed-tensors with transformers 5.23, which no longer loads zero points of any program."""

from __future__ import annotations

import dataclasses

from client_compressed_tensors import CLIENT as BASE

ASYMMETRIC = (
    "transformers 5.23 prepares zero points of another shape than the format has; llm-compressor's own outputs fail in the same way"
)
CLIENT = dataclasses.replace(
    BASE, name="compressed-tensors-transformers-5.23", limits={**BASE.limits, r"^transformers/.*-asym": ASYMMETRIC}
)
