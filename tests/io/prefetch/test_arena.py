"""The allocator, against a map of bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bigq.io.prefetch.arena import ALIGNMENT, Arena, Region, segments

SIZES = st.lists(st.integers(1, 40).map(lambda k: k * ALIGNMENT), min_size=1, max_size=4)
#: None releases the oldest region, -1 the newest, another number allocates this many bytes.
STEPS = st.lists(st.one_of(st.integers(1, 12_000), st.none(), st.just(-1)), max_size=80)


@given(SIZES, STEPS)
def test_regions_never_overlap_and_all_space_is_freed(sizes: list[int], steps: list[int | None]) -> None:
    arena = Arena(sizes)
    used = [bytearray(size) for size in sizes]
    out: list[Region] = []

    def mark(region: Region, value: int) -> None:
        place = used[region.segment]
        whole = slice(region.offset, region.offset + -(-region.size // ALIGNMENT) * ALIGNMENT)
        assert whole.stop <= len(place) and set(place[whole]) == {1 - value}
        place[whole] = bytes([value]) * (whole.stop - whole.start)

    for step in steps:
        if step is not None and step > 0:
            region = arena.allocate(step)
            if region is None:
                longest = max(len(run) for place in used for run in bytes(place).split(b"\1"))
                assert longest < -(-step // ALIGNMENT) * ALIGNMENT, "there was room"
            else:
                assert region.size == step and region.offset % ALIGNMENT == 0
                mark(region, 1)
                out.append(region)
        elif out:
            region = out.pop(0 if step is None else -1)
            arena.release(region)
            mark(region, 0)
        assert arena.held == sum(map(sum, used)) <= arena.capacity == sum(sizes)
    for region in out:
        arena.release(region)
    assert arena.held == 0
    assert sorted(arena.allocate(size).size for size in sorted(sizes, reverse=True)) == sorted(sizes)  # type: ignore[union-attr]
    assert arena.allocate(1) is None


@given(st.integers(0, 2**40))
def test_segments_are_powers_of_two_within_the_budget(budget: int) -> None:
    sizes = segments(min(budget, 2**34), 2**12, 2**28)
    assert all(size & (size - 1) == 0 and 2**12 <= size <= 2**28 for size in sizes)
    assert 0 <= min(budget, 2**34) - sum(sizes) < 2**12
    assert sizes == sorted(sizes, reverse=True)


def test_an_empty_arena() -> None:
    assert segments(100, 4096, 4096) == [] and Arena([]).allocate(1) is None
