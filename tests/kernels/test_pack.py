"""Packed codes, against a decoder that reads one long Python integer bit by bit."""

from __future__ import annotations

import pytest
import torch
from checks import ORDERS, VERSIONS, kernel, same_bytes, stored, untouched
from torch import Tensor

from bigq.kernels.pack import pack, unpack

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

BITS = [2, 3, 4, 8]


def decode(words: list[int], bits: int) -> list[int]:
    """Code i is bits [i·b, (i+1)·b) of the stream; word 0 contains bits 0 to 31."""
    stream = 0
    for i, word in enumerate(words):
        stream |= (word & 0xFFFFFFFF) << (32 * i)
    return [sum(((stream >> (i * bits + j)) & 1) << j for j in range(bits)) for i in range(32 * len(words) // bits)]


def random_codes(bits: int, *shape: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


def word(value: int) -> int:
    """As torch shows it: signed."""
    return value - 2**32 if value >= 2**31 else value


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(32,), (32, 1), (96, 7), (256, 3), (64, 2, 5)], ids=str)
def test_the_decoder_reads_packed_codes(shape: tuple[int, ...], bits: int) -> None:
    codes = random_codes(bits, *shape)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (shape[0] * bits // 32, *shape[1:])
    flat = words.reshape(len(words), -1)
    decoded = torch.tensor([decode(flat[:, i].tolist(), bits) for i in range(flat.shape[1])], dtype=torch.uint8).T
    assert torch.equal(decoded.reshape(shape), codes)


@pytest.mark.parametrize("bits", BITS)
def test_unpack_equals_the_decoder(bits: int) -> None:
    words = torch.randint(-(2**31), 2**31, (3 * bits, 6), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    codes = unpack(words, bits)
    assert codes.dtype == torch.uint8 and codes.shape == (96, 6)
    assert codes.T.tolist() == [decode(words[:, i].tolist(), bits) for i in range(6)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(32,), (96, 7), (64, 2, 5)], ids=str)
def test_unpack_inverts_pack(shape: tuple[int, ...], bits: int) -> None:
    codes = random_codes(bits, *shape)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_codes_that_are_not_contiguous(bits: int) -> None:
    codes = random_codes(bits, 5, 64).T
    assert torch.equal(pack(codes, bits), pack(codes.contiguous(), bits))


@pytest.mark.parametrize(
    ("bits", "code", "words"),
    [
        (4, 7, [0x77777777]),
        (4, 15, [0xFFFFFFFF]),
        (8, 127, [0x7F7F7F7F]),
        (8, 128, [0x80808080]),
        (2, 1, [0x55555555]),
        (2, 3, [0xFFFFFFFF]),
        (3, 7, [0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF]),
        (3, 1, [0x49249249, 0x92492492, 0x24924924]),
    ],
)
def test_constants(bits: int, code: int, words: list[int]) -> None:
    packed = pack(torch.full((32 * len(words) // bits,), code, dtype=torch.uint8), bits)
    assert packed.tolist() == [word(w) for w in words]


@pytest.mark.parametrize(
    ("index", "code", "words"),
    [
        (9, 0b111, [0x38000000, 0, 0]),
        (10, 0b001, [0x40000000, 0, 0]),
        (10, 0b010, [0x80000000, 0, 0]),
        (10, 0b100, [0, 1, 0]),
        (10, 0b111, [0xC0000000, 1, 0]),
        (21, 0b001, [0, 0x80000000, 0]),
        (21, 0b110, [0, 0, 3]),
        (21, 0b111, [0, 0x80000000, 3]),
        (31, 0b111, [0, 0, 0xE0000000]),
    ],
)
def test_three_bit_codes_cross_words(index: int, code: int, words: list[int]) -> None:
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[index] = code
    assert pack(codes, 3).tolist() == [word(w) for w in words]
    assert torch.equal(unpack(torch.tensor([word(w) for w in words], dtype=torch.int32), 3), codes)


def tensor_of_codes(words: Tensor, bits: int) -> Tensor:
    return torch.tensor([decode(stream, bits) for stream in words.T.tolist()], dtype=torch.uint8, device=words.device).T


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("cycles", "m"), [(1, 1), (1, 65), (3, 64), (5, 63), (4, 5), (9, 2)])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_decoder_reads_what_every_version_packs(version: str, bits: int, cycles: int, m: int, order: str, device: torch.device) -> None:
    """Cycles and rows around the tile sizes. The memory around the codes is 255."""
    codes = random_codes(bits, cycles * (32 if bits == 3 else 32 // bits), m).to(device)
    given = stored(codes, order)
    words, again = (kernel("pack", version)(given, bits) for _ in range(2))
    assert words.dtype == torch.int32 and words.shape == (len(codes) * bits // 32, m)
    assert torch.equal(tensor_of_codes(words, bits), codes) and same_bytes(words, again)
    assert order != "within a larger one" or untouched(given)
    codes[-1, -1] ^= 1
    assert not torch.equal(kernel("pack", version)(codes, bits), words), "the last code makes no difference"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("cycles", "m"), [(1, 1), (1, 65), (3, 64), (5, 63), (9, 2)])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_unpacks_like_the_decoder(version: str, bits: int, cycles: int, m: int, order: str, device: torch.device) -> None:
    """All bits of the words are random, including the sign."""
    gen = torch.Generator().manual_seed(cycles)
    words = torch.randint(-(2**31), 2**31, (cycles * (3 if bits == 3 else 1), m), generator=gen).to(torch.int32).to(device)
    given = stored(words, order)
    codes, again = (kernel("unpack", version)(given, bits) for _ in range(2))
    assert codes.dtype == torch.uint8 and codes.shape == (len(words) * 32 // bits, m)
    assert torch.equal(codes, tensor_of_codes(words, bits)) and same_bytes(codes, again)
    assert order != "within a larger one" or untouched(given)
    words[-1, -1] ^= 1 << 31
    assert not torch.equal(kernel("unpack", version)(words, bits), codes), "the last bit makes no difference"


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("shape", [(96,), (96, 5), (32, 2, 3)], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_on_triton_any_number_of_dimensions(bits: int, shape: tuple[int, ...], device: torch.device) -> None:
    codes = random_codes(bits, *shape).to(device)
    words = pack(codes, bits)
    assert torch.equal(words.cpu(), kernel("pack", "reference")(codes.cpu(), bits)) and torch.equal(unpack(words, bits), codes)


@pytest.mark.parametrize(("bits", "k"), [(2, 15), (3, 31), (3, 48), (4, 12), (8, 6)])
def test_codes_that_do_not_fill_words_are_refused(bits: int, k: int) -> None:
    with pytest.raises(AssertionError, match=f"{k} codes of {bits} bits"):
        pack(random_codes(bits, k, 2), bits)
