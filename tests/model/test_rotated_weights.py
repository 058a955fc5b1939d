"""Rotated weights are what the products say, whole or in pieces; a wrong one is noticed; rows can be read by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.io.index import Checkpoint
from bigq.io.reader import iter_chunks, read_rows, read_tensor
from bigq.io.writer import OutputTensor, write_shard
from bigq.model.rotation import weights
from bigq.model.rotation.checkpoint import _made
from bigq.model.rotation.matrices import Rotation
from bigq.model.rotation.weights import Neutral, Side, Turned, TurnedVector

M, N, HEAD = 48, 36, 12


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(side: Side | None, size: int) -> Tensor:
    """By its definition, fp64."""
    if side is None:
        return torch.eye(size, dtype=torch.float64)
    if not side.heads:
        return side.rotation.matrix()
    whole = torch.eye(size, dtype=torch.float64)
    for h in range(side.heads):
        lo = side.first + h * side.rotation.size
        whole[lo : lo + side.rotation.size, lo : lo + side.rotation.size] = side.rotation.matrix()
    return whole


STREAM_IN, STREAM_OUT = Side(Rotation(N, 0)), Side(Rotation(M, 0))
ALL_IN, ALL_OUT = Side(Rotation(HEAD, 1), 0, N // HEAD), Side(Rotation(HEAD, 1), 0, M // HEAD)
SOME_OUT = Side(Rotation(HEAD, 1), 18, 2)  # values behind the queries and keys of one matrix


@pytest.mark.parametrize("piece", [1, 100, 2**22])
@pytest.mark.parametrize("inputs", [None, STREAM_IN, ALL_IN])
@pytest.mark.parametrize("outputs", [None, STREAM_OUT, ALL_OUT, SOME_OUT])
def test_products(inputs: Side | None, outputs: Side | None, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PIECE", piece)
    weight, norm = random(M, N), random(N, seed=1)
    found = Turned(name="w", inputs=inputs, outputs=outputs, offset=1.0).decode([weight, norm], torch.float32)
    expected = matrix(outputs, M).T @ (weight.double() * (norm.double() + 1)) @ matrix(inputs, N)
    assert torch.allclose(found.double(), expected, rtol=0, atol=2e-5)


def test_rounded_once() -> None:
    """bf16 weights are turned in fp32, so that they lose one rounding."""
    weight = random(M, N).bfloat16()
    found = Turned(name="w", inputs=STREAM_IN).decode([weight], torch.bfloat16)
    exact = weight.double() @ matrix(STREAM_IN, N)
    half = torch.exp2(exact.abs().log2().floor()) * 2.0**-8  # half a step of bf16
    assert bool(((found.double() - exact).abs() <= half + 1e-5).all())


class Lost:
    """A rotation that forgets one sign on the way."""

    size, seed = N, 0

    def turn(self, x: Tensor, dim: int = -1) -> Tensor:
        y = Rotation(N, 0).turn(x, dim)
        y.select(dim, 3).neg_()
        return y

    def back(self, x: Tensor, dim: int = -1) -> Tensor:
        return Rotation(N, 0).back(x, dim)


def test_wrong_products_are_noticed() -> None:
    wrong = Side(Lost())  # type: ignore[arg-type]
    with pytest.raises(NumericsError, match=r"^model\.w: its rotated weight gives other products than it must"):
        Turned(name="model.w", inputs=wrong).decode([random(M, N)], torch.float32)


def test_biases_and_norms() -> None:
    bias = random(M)
    assert torch.allclose(TurnedVector(STREAM_OUT).decode([bias], torch.float32).double(), bias.double() @ matrix(STREAM_OUT, M), atol=1e-5)
    assert torch.equal(Neutral(1.0).decode([random(N)], torch.bfloat16), torch.zeros(N, dtype=torch.bfloat16))


@pytest.fixture
def stored(tmp_path: Path) -> Checkpoint:
    values = {"w": random(M, N), "n": random(N, seed=1)}
    write_shard(tmp_path / "model.safetensors", [OutputTensor.of(name, value) for name, value in values.items()])
    return Checkpoint.open(tmp_path)


def test_read_by_rows(stored: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding is read by rows and copied in pieces; only those rows of the stored tensor are read."""
    info = _made(stored["w"], Turned(name="w", inputs=STREAM_IN), stored["n"])
    whole = read_tensor(info)
    rows = torch.tensor([0, 1, 5, 47])
    assert torch.allclose(read_rows(info, rows), whole[rows], atol=1e-6)
    monkeypatch.setattr("bigq.io.reader.CHUNK_BYTES", 5 * N * 4)
    pieces = [bytes(piece) for piece in iter_chunks(info)]
    assert len(pieces) == 10 and len(b"".join(pieces)) == info.nbytes == M * N * 4
    copied = torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.float32).view(M, N)
    assert torch.allclose(copied, whole, atol=1e-6)


def test_decoded_parts_of_decoded_tensors(stored: Checkpoint) -> None:
    """A source in 8 bits is decoded first; the stored tensors are those of both."""

    class Doubled:
        by_rows = False

        def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
            return (2 * parts[0]).to(dtype)

    inner = _made(stored["w"], Doubled())  # type: ignore[arg-type]
    info = _made(inner, Turned(name="w", inputs=STREAM_IN), stored["n"])
    plain = _made(stored["w"], Turned(name="w", inputs=STREAM_IN), stored["n"])
    assert [part.name for part in info.stored] == ["w", "n"]
    assert torch.allclose(read_tensor(info), 2 * read_tensor(plain), atol=1e-5)
