"""Lines of 60 columns."""

from __future__ import annotations

import pytest

from bigq.progress.layout import WIDTH, entry, rewrapped, shortened, wrapped


def test_an_entry_that_fits_is_one_line() -> None:
    assert entry("size", "3 GiB") == ["  size:    3 GiB"]
    assert entry("time", ["a 1 s", "b 2 s"]) == ["  time:    a 1 s, b 2 s"]
    assert entry("time", []) == ["  time:"] == entry("time", "")


def test_parts_stay_whole_and_lines_go_on_under_the_text() -> None:
    lines = entry("needs", [f"something {i} of 12.00 GiB" for i in range(4)])
    assert lines == [
        "  needs:   something 0 of 12.00 GiB,",
        "           something 1 of 12.00 GiB,",
        "           something 2 of 12.00 GiB,",
        "           something 3 of 12.00 GiB",
    ]
    assert entry("a", ["x" * 20, "y" * 20, "z" * 20])[0].endswith(", " + "y" * 20 + ",")


@pytest.mark.parametrize("indent", [11, 20])
def test_no_line_is_wider_whatever_is_in_it(indent: int) -> None:
    for parts in ("word " * 40, "x" * 300, ["y" * 200, "short", "z" * 61], "a/" * 90):
        lines = entry("label", parts, indent)
        assert max(map(len, lines)) <= WIDTH and len(lines) > 1
        text = parts if isinstance(parts, str) else ",".join(parts)
        assert "".join("".join(lines).replace("label:", "").split()) == text.replace(" ", "")


def test_a_label_must_fit() -> None:
    with pytest.raises(ValueError, match="too long a label"):
        entry("a label of many columns", "x")


def test_long_names_lose_their_middle() -> None:
    assert shortened("model.layers.0.q_proj", 30) == "model.layers.0.q_proj"
    short = shortened("model.language_model.layers.117.mlp.experts.gate_up_proj", 30)
    assert len(short) == 30 and short.startswith("model.") and short.endswith("gate_up_proj") and "…" in short
    assert wrapped("", 10) == []


def test_labelled_lines_are_wrapped_under_their_text() -> None:
    lines = [
        "/folder: failed (it ended with an error; see to that and run the same command again)",
        "  said      " + "word " * 20,
        "  left      1:00",
    ]
    found = rewrapped(lines, 12)
    assert max(map(len, found)) <= WIDTH and found[-1] == "  left      1:00"
    assert "".join("".join(found).split()) == "".join("".join(lines).split())
    assert found[1].startswith("  ") and found[2].startswith("  said      word") and found[3].startswith(" " * 12 + "word")
