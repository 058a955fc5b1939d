"""compressed-tensors 0.18, the first version that packs 3-bit codes as one stream."""

from __future__ import annotations

import dataclasses

from client_compressed_tensors import CLIENT as NEWEST

CLIENT = dataclasses.replace(NEWEST, name="compressed-tensors-0.18")
