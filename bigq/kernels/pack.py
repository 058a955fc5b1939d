"""Packing codes into 32-bit words, and unpacking them.

The b-bit codes along the first dimension form a bit stream, least significant bits first: code i occupies bits
``[i·b, (i+1)·b)``. With 2, 4 and 8 bits no code crosses a word boundary. With 3 bits, 32 codes fill 3 words, and codes 10 and 21
cross a boundary (``10 | 1 | 10 | 1 | 10``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigq.kernels.pick import use_triton


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [k, ...] below ``2**bits`` → int32 words [k·bits/32, ...]. With 3 bits, k must be a multiple of 32."""
    assert codes.shape[0] % _cycle(bits)[0] == 0, f"{codes.shape[0]} codes of {bits} bits do not fill whole words"
    if use_triton(codes) and codes.ndim == 2:
        from bigq.kernels.gpu.pack import pack_triton

        return pack_triton(codes, bits)
    return pack_reference(codes, bits)


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 words [k·bits/32, ...] → uint8 codes [k, ...]; the inverse of ``pack``."""
    if use_triton(words) and words.ndim == 2:
        from bigq.kernels.gpu.pack import unpack_triton

        return unpack_triton(words, bits)
    return unpack_reference(words, bits)


def pack_any(codes: Tensor, bits: int) -> Tensor:
    """``pack`` for any number of codes: int32 [⌈k·bits/32⌉, ...]; the unused bits of the last word are 0."""
    k, short = codes.shape[0], -codes.shape[0] % _cycle(bits)[0]
    whole = torch.cat([codes, codes.new_zeros(short, *codes.shape[1:])]) if short else codes
    return pack(whole, bits)[: words_for(k, bits)]


def unpack_any(words: Tensor, bits: int, k: int) -> Tensor:
    """The k codes in int32 words [⌈k·bits/32⌉, ...]: uint8 [k, ...]; the inverse of ``pack_any``."""
    short = -words.shape[0] % _cycle(bits)[1]
    whole = torch.cat([words, words.new_zeros(short, *words.shape[1:])]) if short else words
    return unpack(whole, bits)[:k]


def words_for(k: int, bits: int) -> int:
    """The number of words that hold k codes."""
    return -(-k * bits // 32)


def whole_words(bits: int) -> int:
    """The number of codes of which a multiple fills whole words."""
    return _cycle(bits)[0]


def pack_reference(codes: Tensor, bits: int) -> Tensor:
    """``pack`` in plain torch."""
    per_cycle, words_per_cycle = _cycle(bits)
    k = codes.shape[0]
    cycles = codes.reshape(k // per_cycle, per_cycle, *codes.shape[1:])
    words = torch.zeros(k // per_cycle, words_per_cycle, *codes.shape[1:], dtype=torch.int32, device=codes.device)
    for i in range(per_cycle):
        code = cycles[:, i].to(torch.int32)
        word, shift = divmod(i * bits, 32)
        words[:, word] |= code << shift
        if shift + bits > 32:
            words[:, word + 1] |= code >> (32 - shift)
    return words.reshape(-1, *codes.shape[1:])


def unpack_reference(words: Tensor, bits: int) -> Tensor:
    """``unpack`` in plain torch."""
    per_cycle, words_per_cycle = _cycle(bits)
    cycles = words.reshape(-1, words_per_cycle, *words.shape[1:])
    codes = torch.empty(cycles.shape[0], per_cycle, *words.shape[1:], dtype=torch.uint8, device=words.device)
    for i in range(per_cycle):
        word, shift = divmod(i * bits, 32)
        code = (cycles[:, word] >> shift) & ((1 << min(bits, 32 - shift)) - 1)
        if shift + bits > 32:
            code = code | ((cycles[:, word + 1] & ((1 << (shift + bits - 32)) - 1)) << (32 - shift))
        codes[:, i] = code.to(torch.uint8)
    return codes.reshape(-1, *words.shape[1:])


def _cycle(bits: int) -> tuple[int, int]:
    """The smallest number of codes that fills whole words: (codes, words)."""
    words = bits // math.gcd(bits, 32)
    return words * 32 // bits, words
