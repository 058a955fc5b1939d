"""docs/families.md: its tables are what the result files hold."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
from conftest import ROOT
from test_docs import table_rows

FILES = ("families.json", "families_transformers-5.17.json")
PAGE = (ROOT / "docs/families.md").read_text(encoding="utf-8")
#: Words of the page → a pattern of the messages that they stand for.
REFUSED: Mapping[str, str] = {
    "hidden states that are not vectors of each token: another layout, a prompt of its own": (
        r"not vectors for each token|embeds tokens that are not in its input"
    ),
    "blocks share weights": r"are one shared parameter",
    "blocks are called in another order, or their input is changed in between": r"called out of order|is not the output of block",
    "the checkpoint stores Linears or experts in another form than the model": r"which is not supported$",
    "blocks do not take hidden states first": r"own forward fails with this config\.json: TypeError: .*multiple values",
    "an encoder-decoder model": r"is an encoder-decoder model",
    "its own forward needs images, audio or actions": r"own forward fails on text alone",
    "no output head, or no plain input embedding": r"has no output head|its input embedding is a",
}


def result(file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "docs/results" / file).read_text())
    return found


@pytest.mark.parametrize("file", FILES)
def test_counts(file: str) -> None:
    found = result(file)
    version = found["versions"]["transformers"]
    for table, families in found["families"].items():
        counts, ends = found["counts"][table], [one["result"] for one in families.values()]
        assert counts["types"] == len(ends) and counts["equal"] == ends.count("equal")
        row = [version, table, *(str(ends.count(end)) for end in ("equal", "refused", "not built", "different", "crashed"))]
        outputs = [one["rtn"]["result"] for one in families.values() if one["result"] == "equal"]
        assert [*row[:2], str(len(ends)), *row[2:], str(outputs.count("right"))] in table_rows(PAGE), row
        assert not {"different", "crashed"} & {*ends, *outputs}


def test_the_types_that_are_refused() -> None:
    """Each type has the row of its reason, and each row the types that it is the reason for."""
    found = result(FILES[0])["families"]
    rows = {row[0]: row[1:] for row in table_rows(PAGE)}
    for table, column in (("causal", 0), ("multimodal", 1)):
        left = {kind: one["reason"] for kind, one in found[table].items() if one["result"] == "refused"}
        for words, pattern in REFUSED.items():
            kinds = sorted(kind for kind, reason in left.items() if re.search(pattern, reason))
            assert rows[words][column] == ", ".join(f"`{kind}`" for kind in kinds), words
            left = {kind: reason for kind, reason in left.items() if kind not in kinds}
        assert left == {}


def test_the_types_that_are_not_built() -> None:
    found = result(FILES[0])["families"]
    for table, families in found.items():
        kinds = sorted(kind for kind, one in families.items() if one["result"] == "not built")
        assert f"Not built, {table}: {', '.join(f'`{kind}`' for kind in kinds)}." in " ".join(PAGE.split())


@pytest.mark.parametrize("file", FILES)
def test_what_transformers_cannot_run_is_refused(file: str) -> None:
    for families in result(file)["families"].values():
        assert all(one["result"] == "refused" for one in families.values() if "own_forward" in one)
