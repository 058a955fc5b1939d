"""The GGUF container that llama.cpp reads: packed Linears as its blocks of 32 weights, and the file around them.

The only owner of the ``gguf`` package, which is imported when a file is written. What bigq stores is put into blocks code for code;
nothing is quantized again:

    Q4_0   fp16 d, 16 bytes          w = d · (q − 8)      byte j of the 16 holds weight j (low half) and weight j + 16 (high half)
    Q4_1   fp16 d, fp16 m, 16 bytes  w = d · q + m
    Q8_0   fp16 d, 32 × int8         w = d · q

Knows nothing of models.
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
from bigq.io.formats import Stored
from bigq.io.reader import as_bytes
from bigq.kernels.pack import unpack

#: Weights of a row that share a scale in every block type used here.
BLOCK = 32
#: Where a tensor may begin in the data section, in bytes.
ALIGNMENT = 32
#: Codes that are put into blocks at a time.
CODES_AT_ONCE = 2**24

#: Block type → bytes per block.
BLOCK_BYTES: Mapping[str, int] = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
#: Plain type → its torch dtype.
PLAIN: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

#: What a key of the metadata may have for a value. Whole numbers are written as uint32, lists of them as int32.
Value = bool | int | float | str | Sequence[str] | Sequence[bytes] | Sequence[int] | Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """A tensor to be written. type: a name in ``BLOCK_BYTES`` or ``PLAIN``. shape: as in torch, rows first.

    chunks: yields its bytes, in order, when its turn comes.
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
    """The ``gguf`` package. Raises ResourceError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ResourceError("GGUF files are written with the gguf package, which is not installed: pip install bigq[gguf]") from None
    # It warns of things that bigq tells in its own words, or that are none.
    logging.getLogger("gguf").setLevel(logging.CRITICAL)
    return gguf


def block_type(bits: int, symmetric: bool) -> str | None:
    """The block type that holds such codes exactly, if there is one."""
    return {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}.get((bits, symmetric))


def minimums(stored: Stored) -> Tensor | None:
    """fp16 [m, G], what Q4_1 adds to ``d · q``: −zero · scale. None where one of them, or a scale, is no fp16 number."""
    wanted = -stored.zeros.float() * stored.scales.float()
    rounded = wanted.half()
    exact = torch.equal(rounded.float(), wanted) and torch.equal(stored.scales.half().float(), stored.scales.float())
    return rounded if exact else None


def blocks(stored: Stored, type: str, bits: int, order: Tensor | None = None) -> Iterator[memoryview]:
    """The blocks of a packed Linear, row by row, some rows at a time.

    stored: m outputs, n inputs, the width of a group a multiple of 32; for Q4_0 and Q8_0 all zero points in the middle.
    order: int64 [m], which row comes where, if not as they are. Each piece is valid until the next.
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
        # 8 bits: 128 less, in two's complement.
        body = codes ^ 0x80 if type == "Q8_0" else codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)
        yield as_bytes(torch.cat([*heads, body], dim=-1))


def write_gguf_file(
    path: Path, arch: str, metadata: Mapping[str, Value], tensors: Sequence[GgufTensor], written: Callable[[GgufTensor], None]
) -> None:
    """Write a file atomically and durably, tensor by tensor; ``written`` hears of each.

    Keys of the metadata that begin with a dot belong to the architecture. Raises ResourceError where the disk refuses.
    """
    gguf = require_gguf()
    writer = gguf.GGUFWriter(None, arch)
    for key, value in metadata.items():
        _add(gguf, writer, arch + key if key.startswith(".") else key, value)
    for tensor in tensors:
        type = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.nbytes, raw_dtype=type)
    with atomic_file(path) as file:
        # The writer is handed the file that it would open, so that this is an atomic one.
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
    """A model's size as people say it: 8.0B."""
    return str(require_gguf().size_label(parameters, 0, 0, 0))


def special_tokens(folder: Path, size: int) -> tuple[dict[str, int], dict[str, bool], str | None]:
    """(ids of special tokens, whether they are added to a text, the chat template), as a model folder's tokenizer files say.

    ids and additions by "bos", "eos", "unk", "pad" and the like. size: ids of so much and more are left out.
    Raises CheckpointError where the files cannot be understood.
    """
    gguf = require_gguf()
    try:
        found = gguf.SpecialVocab(folder, load_merges=False, n_vocab=size)
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:  # it takes JSON to be as it should
        raise CheckpointError(f"{folder}: its tokenizer files cannot be understood ({type(error).__name__}); fetch them again") from error
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
