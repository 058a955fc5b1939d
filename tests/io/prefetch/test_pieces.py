"""Cutting tensors into pieces, reading them in threads, and dropping pages from the page cache."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from bigq.io.index import Checkpoint, TensorInfo
from bigq.io.prefetch import pieces
from bigq.io.prefetch.pieces import cut, merge_spans
from bigq.io.prefetch.to_host import HostPrefetch
from bigq.io.reader import fill, read_tensor, tensor_file


@given(
    st.integers(0, 5000),
    st.integers(0, 5000),
    st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([8, 64, 512, 4096]),
)
def test_pieces_are_the_tensor_in_order_and_bounded(start: int, elements: int, dtype: torch.dtype, chunk: int) -> None:
    stop = start + elements * dtype.itemsize
    info = TensorInfo(name="w", dtype=dtype, shape=(elements,), file=Path("f"), start=start, stop=stop)
    ranges = cut(info, chunk)
    assert [begin for begin, _ in ranges] + [stop] == [start, *(end for _, end in ranges)]
    assert all(0 < end - begin <= chunk and (begin - start) % dtype.itemsize == 0 for begin, end in ranges)
    assert all(begin % chunk == 0 or start % dtype.itemsize for begin, _ in ranges[1:])


def test_spans_that_touch_or_almost_touch_are_merged() -> None:
    assert merge_spans([(5.0, 6.0), (0.0, 1.0), (0.5, 3.0), (1.0, 2.0), (3.05, 4.0)], 0.1) == [(0.0, 4.0), (5.0, 6.0)]
    assert merge_spans([], 1) == []


def cached_share(path: Path) -> float:
    """The share of a file's pages that the page cache holds."""
    size = path.stat().st_size
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        pages = -(-size // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        first = ctypes.c_char.from_buffer(mapped)
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), found) == 0
        del first
        return sum(page & 1 for page in found) / pages


@pytest.fixture
def large(tmp_path: Path) -> Checkpoint:
    """48 MB in tensors of odd sizes, none of them in the page cache. Skips if the file system does not drop pages."""
    tensors = {f"w{i}": torch.full((600_003 + 100 * i,), float(i), dtype=torch.bfloat16) for i in range(40)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share(path) > 0.01:
        pytest.skip("this file system does not let go of cached pages")
    return Checkpoint.open(tmp_path)


def take_all(checkpoint: Checkpoint) -> None:
    reader = HostPrefetch(10**7)
    reader.announce(sorted(checkpoint.tensors.values(), key=lambda info: info.start))
    for i in range(40):
        assert bool((reader.take(checkpoint[f"w{i}"]) == i).all())
    reader.close()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="pages cannot be dropped here")
def test_pages_that_were_read_leave_the_cache(large: Checkpoint) -> None:
    path = large["w0"].file
    with tensor_file(large["w0"]) as file:
        for info in sorted(large.tensors.values(), key=lambda info: info.start):
            fill(file, info, torch.empty(info.shape, dtype=info.dtype), info.start)
            file.drop_cached(info.start, info.stop)
    assert cached_share(path) < 0.1, "folios that two tensors share leave too"
    for info in large.tensors.values():
        read_tensor(info, keep_cached=False)
    assert cached_share(path) < 0.1
    read_tensor(large["w3"])
    assert cached_share(path) > 0.02, "cached pages are counted"
    take_all(large)
    assert cached_share(path) < 0.5, "readahead may load some pages again that another thread has dropped"


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="pages cannot be dropped here")
def test_reading_works_without_posix_fadvise_and_if_it_fails(large: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: int) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "posix_fadvise", fails)
    take_all(large)
    monkeypatch.delattr(os, "posix_fadvise")
    take_all(large)
    assert cached_share(large["w0"].file) > 0.9


def test_a_large_tensor_is_read_by_several_threads_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CHUNK_BYTES", 1000)
    save_file({"w": torch.arange(4000.0)}, tmp_path / "model.safetensors")
    info = Checkpoint.open(tmp_path)["w"]
    together = threading.Barrier(pieces.THREADS, timeout=20)
    preadv: Callable[..., int] = os.preadv
    turns = itertools.count()

    def meets(*args: object) -> int:
        if next(turns) < pieces.THREADS:
            together.wait()
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", meets)
    reader = HostPrefetch(0)
    assert torch.equal(reader.take(info), torch.arange(4000.0))
    reader.close()


def test_files_are_closed(tmp_path: Path) -> None:
    save_file({f"w{i}": torch.zeros(1000) for i in range(20)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    reader = HostPrefetch(20_000)
    reader.announce(checkpoint.tensors.values())
    for info in checkpoint.tensors.values():
        reader.take(info)
    assert len(os.listdir("/proc/self/fd")) == before
    reader.close()
