from __future__ import annotations

import pytest

from bigq.errors import UsageError
from bigq.progress.sizes import parse_size, show_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1000000B", 10**6),
        ("80GB", 80 * 10**9),
        ("72GiB", 72 * 2**30),
        ("3g", 3 * 10**9),
        ("1.5 MiB", 3 * 2**19),
        ("2kib", 2048),
        ("7b", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_size(text, f"--ram {text}") == count


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "3 apples", "3,5GB", "1e9", "3GBB", "7bb", "3i"])
def test_anything_else_is_refused_by_the_flag_s_name(text: str) -> None:
    with pytest.raises(UsageError, match=r"--vram .*is not a size"):
        parse_size(text, f"--vram {text}")


@pytest.mark.parametrize("text", ["72", " 72 ", "1.5"])
def test_a_number_needs_a_unit(text: str) -> None:
    with pytest.raises(UsageError, match=rf"^--vram 72: give a unit, such as {text.strip()}GiB$"):
        parse_size(text, "--vram 72")


def test_sizes_are_shown_in_the_unit_that_suits() -> None:
    assert [show_size(n) for n in (2**19, 2**30, 3 * 2**39)] == ["0.5 MiB", "1.00 GiB", "1.50 TiB"]
