"""Writing GGUF files for llama.cpp: packed Linears as blocks of 32 weights, and the container.

Codes are copied into blocks exactly; nothing is quantized again:

    Q4_0   fp16 d, 16 bytes          w = d · (q − 8)      byte j of the 16 holds weight j (low half) and weight j + 16 (high half)
    Q4_1   fp16 d, fp16 m, 16 bytes  w = d · q + m
    Q8_0   fp16 d, 32 × int8         w = d · q

This is the only module that uses the ``gguf`` package, which is imported when it is needed. Knows nothing of models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bigq import faults
from bigq.errors import CheckpointError, ResourceError
from bigq.io.atomic import atomic_file
from bigq.io.formats import PackedWeight
from bigq.io.formats.base import Misfit
from bigq.io.reader import as_bytes
from bigq.kernels.pack import unpack
from bigq.scheme import QuantScheme

#: Weights per block, which share a scale, in every block type used here.
BLOCK = 32
#: Alignment of tensors in the data section, in bytes.
ALIGNMENT = 32
#: Codes that are converted to blocks at a time.
CODES_AT_ONCE = 2**24

#: Block type → bytes per block.
BLOCK_BYTES: Mapping[str, int] = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
#: Unquantized type → its torch dtype.
PLAIN: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

#: A value in the metadata. Integers are written as uint32, lists of integers as int32.
Value = bool | int | float | str | Sequence[str] | Sequence[bytes] | Sequence[int] | Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """A tensor to be written. type: a name in ``BLOCK_BYTES`` or ``PLAIN``. shape: as in torch, rows first.

    chunks: called when the tensor is written; yields its bytes in order.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[memoryview]]

    @property
    def nbytes(self) -> int:
        weights = torch.Size(self.shape).numel()
        return weights // BLOCK * BLOCK_BYTES[self.type] if self.type in BLOCK_BYTES else weights * PLAIN[self.type].itemsize


def require_gguf() -> Any:
    """The ``gguf`` package. Raises ResourceError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ResourceError("GGUF files need the gguf package, which is not installed: pip install 'bigq[gguf]'") from None
    # Its warnings are false alarms, or repeat what bigq reports itself.
    logging.getLogger("gguf").setLevel(logging.CRITICAL)
    return gguf


def block_type(bits: int, symmetric: bool) -> str | None:
    """The block type that represents such codes exactly, or None."""
    return {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}.get((bits, symmetric))


def gguf_misfit(inputs: int, scheme: QuantScheme) -> Misfit | None:
    """Why no block type holds a Linear exactly; None if one does."""
    if block_type(scheme.bits, scheme.symmetric) is None:
        kind = "symmetric" if scheme.symmetric else "asymmetric"
        return Misfit("bits", f": GGUF has no blocks for {scheme.bits} bits {kind}, only for --bits 4 and for --bits 8 --sym")
    if inputs % BLOCK:
        return Misfit("shape", f"has {inputs} inputs, but blocks of GGUF hold {BLOCK}")
    if scheme.group_size != -1 and scheme.group_size % BLOCK:
        return Misfit("group_size", f"has groups of {scheme.group_size}, but a block of GGUF holds {BLOCK} weights with one scale")
    return None


def minimums(stored: PackedWeight) -> Tensor | None:
    """The minimums of Q4_1, ``−zero · scale``, fp16 [m, G]. None if a minimum or a scale is not exact in fp16."""
    wanted = -stored.zeros.float() * stored.scales.float()
    rounded = wanted.half()
    exact = torch.equal(rounded.float(), wanted) and torch.equal(stored.scales.half().float(), stored.scales.float())
    return rounded if exact else None


def blocks(stored: PackedWeight, type: str, bits: int, order: Tensor | None = None) -> Iterator[memoryview]:
    """The blocks of a packed Linear, row by row, in pieces of some rows. Each piece is valid until the next.

    stored: m outputs and n inputs, with group widths that are multiples of 32. For Q4_0 and Q8_0 all zero points must be
        ``2**(bits-1)``.
    order: int64 [m], the order in which rows are written; the natural order unless given.
    """
    m = stored.scales.shape[0]
    n = stored.words.shape[0] * 32 // bits
    rows = torch.arange(m) if order is None else order
    mins = minimums(stored) if type == "Q4_1" else None
    assert type != "Q4_1" or mins is not None
    for part in rows.split(max(1, CODES_AT_ONCE // n)):
        codes = unpack(stored.words[:, part], bits).T.reshape(len(part), n // BLOCK, BLOCK)
        repeat = n // BLOCK // stored.scales.shape[1]
        halves = [stored.scales[part]] if mins is None else [stored.scales[part], mins[part]]
        heads = [half.half().repeat_interleave(repeat, dim=1).unsqueeze(-1).view(torch.uint8) for half in halves]
        # 8 bits: subtract 128, as two's complement.
        body = codes ^ 0x80 if type == "Q8_0" else codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)
        yield as_bytes(torch.cat([*heads, body], dim=-1))


def write_gguf_file(
    path: Path, arch: str, metadata: Mapping[str, Value], tensors: Sequence[GgufTensor], written: Callable[[GgufTensor], None]
) -> None:
    """Write a file atomically and durably, tensor by tensor. ``written`` is called after each tensor.

    Metadata keys that begin with a dot are prefixed with ``arch``. Raises ResourceError if writing fails.
    """
    gguf = require_gguf()
    writer = gguf.GGUFWriter(None, arch)
    for key, value in metadata.items():
        _add(gguf, writer, arch + key if key.startswith(".") else key, value)
    for tensor in tensors:
        type = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.nbytes, raw_dtype=type)
    with atomic_file(path) as file:
        # GGUFWriter would open the file itself. It gets this one instead, so that the write is atomic.
        writer.fout, writer.state = [file], gguf.gguf_writer.WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _pad(file)
        for tensor in tensors:
            start = file.tell()
            for piece in tensor.chunks():
                faults.point("gguf.piece")
                file.write(piece)
            size = file.tell() - start
            assert size == tensor.nbytes, f"{tensor.name}: wrote {size} bytes instead of {tensor.nbytes}"
            _pad(file)
            written(tensor)


def size_label(parameters: int) -> str:
    """A model's size in GGUF's notation, such as "8.0B"."""
    return str(require_gguf().size_label(parameters, 0, 0, 0))


def special_tokens(folder: Path, size: int) -> tuple[dict[str, int], dict[str, bool], str | None]:
    """Special tokens from a model folder's tokenizer files: (id by kind, whether it is added to a text by kind, chat template).

    Kinds are "bos", "eos", "unk", "pad" and so on. size: ids not below it are left out. Raises CheckpointError if the files are
    invalid.
    """
    gguf = require_gguf()
    try:
        found = gguf.SpecialVocab(folder, load_merges=False, n_vocab=size)
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:  # gguf does not validate the JSON
        raise CheckpointError(f"{folder}: its tokenizer files are invalid ({type(error).__name__}); fetch them again") from error
    template = found.chat_template
    if isinstance(template, list):
        template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None)
    return dict(found.special_token_ids), dict(found.add_special_token), template if isinstance(template, str) else None


def _add(gguf: Any, writer: Any, key: str, value: Value) -> None:
    kinds = gguf.GGUFValueType
    if isinstance(value, (list, tuple)):
        writer.add_key_value(key, value, kinds.ARRAY)
        return
    kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value)]
    writer.add_key_value(key, value, kind)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))
