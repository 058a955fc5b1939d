"""Messages about calibration text, and how each is made and followed. The text lies at ``{tmp}/t``, with a tokenizer in the model."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from models import save_ids
from place import EVAL, JOB, PLAN, Act, Case, Place, asked
from texts import ids_of, save_lines, tokenizer_folder, words

import bigq
from bigq import JobConfig, QuantScheme

TEXT = PLAN + " --calibration {tmp}/t"
BEGIN = JOB.replace(" --calibration {ids}", "") + " --calibration"
SOUND = words(ids_of(300))
RECORDS = [{"text": words(ids_of(40, 50 * i))} for i in range(8)]
CHAT = [{"messages": [{"role": "user", "content": words(ids_of(20, 30 * i))}], "body": words(ids_of(40, i))} for i in range(8)]


def put(contents: object, *, chat: bool = False, name: str = "t") -> Act:
    """The text is written, and the model gets a tokenizer."""

    def act(place: Place) -> None:
        tokenizer_folder(place.model, bos=True, chat=chat)
        path = place.tmp / name
        if callable(contents):
            contents(path)
        elif isinstance(contents, bytes):
            path.write_bytes(contents)
        elif isinstance(contents, str):
            path.write_text(contents)
        else:
            save_lines(path, contents)  # type: ignore[arg-type]

    return act


def text(
    says: str, bad: object, good: object | None = None, made: str = TEXT, *, chat: bool = False, follow: Act | None = None, **limits: object
) -> Case:
    """A text that is refused, and what it becomes, or else what is done about it. limits: of text_files."""
    lowered = tuple((f"bigq.io.text_files.{name}", value) for name, value in limits.items())
    return Case(says, made, put(bad, chat=chat), put(good, chat=chat) if good is not None else follow, limits=lowered)


def both(first: object, second: object) -> Act:
    """Two texts, ``a`` and ``b``."""

    def act(place: Place) -> None:
        put(first, name="a")(place)
        put(second, name="b")(place)

    return act


def mix(says: str, bad: str, *good: str, made: str = PLAN + " --calibration", then: str | None = None) -> Case:
    """A mix of two texts that is refused, and those that are advised."""
    option = made.rpartition(" --")[2].strip()
    return Case(
        says,
        f"{made} '{bad}'",
        both(SOUND, RECORDS),
        lambda p: [asked(f"{made} '{bad}'", **{option: each})(p) for each in good],
        then=then,
    )


def converted(encoding: str) -> Act:
    """The iconv command, which Python's codecs stand in for."""
    return lambda place: (place.tmp / "t").write_text((place.tmp / "t").read_bytes().decode(encoding))


def ids(*shape: int) -> Callable[[Path], object]:
    return lambda path: save_ids(path, torch.arange(5, 5 + torch.Size(shape).numel()).remainder(100).add(3).view(shape))


def parquet(records: list[dict[str, Any]]) -> Callable[[Path], object]:
    def save(path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)

    return save


def at(place: Place, command: str, path: str) -> list[str]:
    return asked(command, calibration=path)(place)


BLANKS = "\n\n" + " " * 5000 + "\n"
SHORT = (
    text("{}: has {} rows of {} tokens{}, {} were asked for{}: {} tokens are missing; give more text", words(ids_of(40)), SOUND),
    text("{}, or use --samples {}", words(ids_of(40))),
    text("{}, or use --seqlen {}", words(ids_of(9))),
    text("{}, or use --samples 1 --seqlen {}", words(ids_of(3))),
    text("give more text, or use --seqlen {}", words(ids_of(9)), made=EVAL.replace("{ids}", "{tmp}/t")),
    text("give more text, or use --seqlen {}", ids(1, 9)),
    text("give more text, or use --samples 1 --seqlen {}", ids(1, 5)),
    text("give more text", ids(1, 1), ids(4, 16)),
    text("give more data", ids(4, 0), ids(4, 16)),
    text("use --seqlen {}", ids(4, 10)),
    Case(
        "{}: holds more than {} token ids, which is more than bigq reads; give fewer rows",
        TEXT,
        put(ids(9, 16)),
        put(ids(4, 16)),
        limits=(("bigq.data.token_ids.MAX_IDS", 100),),
    ),
    mix(
        "--calibration: {} gets none of the {} rows; {}, or leave it out",
        "{tmp}/a:1,{tmp}/b:1e-9",
        "{tmp}/a",
        "{tmp}/a:1,{tmp}/b:0.5",
    ),
    mix("give it a larger weight", "{tmp}/a:1,{tmp}/b:1e-9", "{tmp}/a:1,{tmp}/b:1"),
    mix("use --samples {}, give it a larger weight", "{tmp}/a:1,{tmp}/b:0.05", "{tmp}/a", "{tmp}/a:1,{tmp}/b:0.5"),
    Case(
        "use --samples {}, give it a larger weight",
        PLAN.replace("--seqlen 16", "--seqlen 8") + " --calibration '{tmp}/a:1,{tmp}/b:0.05'",
        both(SOUND, RECORDS),
    ),
)

NAMED = (
    Case(
        "--data {}: takes no weights, since all rows count equally; leave them out",
        EVAL.replace("{ids}", "'{tmp}/a:0.5,{tmp}/b:0.5'"),
        both(SOUND, RECORDS),
        asked(EVAL, data="{tmp}/a,{tmp}/b"),
    ),
    mix("{}: matches files of {}; name them apart, with a comma between", "{tmp}/[ab]", "{tmp}/a,{tmp}/b"),
    mix("{} {}: has an empty name; remove the comma, or give a name", "{tmp}/a,", "{tmp}/a", "{tmp}/a,{tmp}/b"),
    mix(
        "{} {}: gives weights to some texts only; give one to each, as in c4:0.7,builtin:0.3, or to none",
        "{tmp}/a:0.7,{tmp}/b",
        "{tmp}/a:0.7,{tmp}/b:0.3",
        "{tmp}/a,{tmp}/b",
    ),
    mix("{} {}: names {} twice; name it once, with a larger weight", "{tmp}/a,{tmp}/b,{tmp}/a", "{tmp}/a:2,{tmp}/b:1"),
    mix("{} {}: {} is the name of data of another job; leave it out", "{tmp}/a,(given in Python)", "{tmp}/a"),
    mix("{}; give a text, JSONL, parquet or safetensors file, or one of {}{}", "{tmp}/absent", "{tmp}/b", "builtin", "{ids}", made=BEGIN),
    mix("; did you mean {}?", "biultin", "builtin", made=BEGIN),
    Case(
        "{} (it is a folder); name files in it, or a pattern in quotes that matches them",
        BEGIN + " {tmp}/d",
        lambda p: ((p.tmp / "d").mkdir(), put(RECORDS, name="d/a.jsonl")(p), put(RECORDS, name="d/b.jsonl")(p)),
        lambda p: [at(p, PLAN + " --calibration x", "{tmp}/d/a.jsonl"), at(p, PLAN + " --calibration x", "{tmp}/d/*.jsonl")],
    ),
    Case(
        "{}: names more than {} texts; use a pattern such as 'folder/*.jsonl'",
        PLAN + " --calibration " + ",".join(f"{{tmp}}/d/{i}.jsonl" for i in range(101)),
        lambda p: ((p.tmp / "d").mkdir(), [put(RECORDS[:1], name=f"d/{i}.jsonl")(p) for i in range(101)]),
        lambda p: at(p, PLAN + " --calibration x", "{tmp}/d/*.jsonl"),
    ),
)

RECORD = (
    text(
        "{}: is no JSON object; give records with a field {}",
        lambda p: [save_lines(p, [*RECORDS, 3]), p.rename(f"{p}.jsonl")],
        None,
        TEXT + ".jsonl",
        follow=put(RECORDS, name="t.jsonl"),
    ),
    text("give records with a field 'text'", [{"x": i} for i in range(9)], RECORDS),
    text("name the field that holds the text, such as --text-field {}", [{"x": i, "body": each["text"]} for i, each in enumerate(RECORDS)]),
    text("name the field that holds the messages, such as --text-field {}", [{"chosen": each["messages"]} for each in CHAT], chat=True),
    text(
        "{}: has a part that is no text ({}); remove such parts, or the record",
        [{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]}, *CHAT],
        CHAT,
        chat=True,
    ),
    text("{}: message {} has no role; give messages with role and content", [{"messages": [{"content": "w5"}]}], CHAT, chat=True),
    text(
        "{}: the content of message {} is neither a string nor a list; correct it",
        [{"messages": [{"role": "user", "content": 3}]}],
        CHAT,
        chat=True,
    ),
    text("{}: its conversation has no messages; remove the record", [*CHAT, {"messages": []}], CHAT, chat=True),
    text("{}: its text holds half of a surrogate pair, which is no character; correct it", [{"text": "\ud800 w5"}], RECORDS),
    text("take one field of the records as text: --text-field {}", CHAT),
    text(
        "give other text, such as --calibration builtin, or the text of each conversation in a field 'text'",
        [{"messages": each["messages"]} for each in CHAT],
        RECORDS,
    ),
    text(
        "give other text, such as --calibration builtin, or the text of each conversation in a field 'text'",
        [{"messages": each["messages"]} for each in CHAT],
        follow=lambda p: at(p, TEXT, "builtin"),
    ),
    text(
        "{}: the model's chat template refuses the conversation ({}); correct or remove it, or {}",
        [*CHAT, {**CHAT[0], "messages": [{"role": "judge", "content": "w5"}]}],
        chat=True,
    ),
    text(
        "{}: the model's chat template refuses the conversation ({}); correct or remove it, or {}",
        [*CHAT, {"messages": [{"role": "judge", "content": "w5"}]}],
        CHAT,
        chat=True,
    ),
    Case(
        "{}: its documents are too long to draw {} of them; cut them, or give fewer",
        TEXT,
        put(RECORDS),
        put(RECORDS[:4]),
        limits=(("bigq.data.rows.MAX_KEPT_CHARS", 1000),),
    ),
)

FILES = (
    text("{}: is not JSON ({}); give one JSON object per line, or one array of them", '{"text": "w5"}\n{"text"\n', RECORDS),
    text("{}: is not JSON ({}); give one JSON object per line, or one array of them", '{"text": "w5"}\n{"text"\n', json.dumps(RECORDS)),
    text(
        "{}: text follows the end of the array; remove it, or give one JSON object per line",
        json.dumps(RECORDS) + "more",
        json.dumps(RECORDS),
    ),
    text("{}: text follows the end of the array; remove it, or give one JSON object per line", json.dumps(RECORDS) + "more", RECORDS),
    text("{}: longer than {} characters; split it into several documents", [*RECORDS, {"text": SOUND}], RECORDS, LONGEST_DOCUMENT=1000),
    text(
        "longer than {} characters; split it into several documents",
        json.dumps([*RECORDS, {"text": SOUND}]),
        json.dumps(RECORDS),
        LONGEST_DOCUMENT=1000,
    ),
    text(
        "is no JSON, or longer than {} characters; split it into several documents",
        json.dumps([*RECORDS, {"text": SOUND * 99}]),
        json.dumps(RECORDS),
        LONGEST_DOCUMENT=1000,
    ),
    text("{}{}: is not the {} text that its byte order mark promises; fetch it again", b"\xff\xfe\x00\xd8\x00\xd8w", SOUND),
    text(
        "{}{}: is not UTF-8 text (byte 0x{}); if it is text, convert it: iconv -f ENCODING -t UTF-8 FILE",
        f"{SOUND} é".encode("latin-1"),
        follow=converted("latin-1"),
    ),
    text(
        "{}: looks like {} without a byte order mark; convert it: iconv -f {} -t UTF-8 FILE",
        SOUND.encode("utf-16-le"),
        follow=converted("utf-16-le"),
    ),
    text(
        "{}: looks like {} without a byte order mark; convert it: iconv -f {} -t UTF-8 FILE",
        SOUND.encode("utf-16-be"),
        follow=converted("utf-16-be"),
    ),
    text("{}{}: cannot be read ({}); fetch it again", gzip.compress(SOUND.encode())[:-9], SOUND),
    text(
        "{}: expands to more than {} times its size, which text does not; give the decompressed file",
        gzip.compress((SOUND * 200).encode()),
        SOUND * 200,
        FREE_EXPANSION=0,
        MOST_EXPANSION=2,
    ),
    text("decompress it first: zstd -d FILE", b"\x28\xb5\x2f\xfd" + SOUND.encode(), SOUND),
    text("decompress it first: unxz FILE", lzma.compress(SOUND.encode()), SOUND),
    text("decompress it first: bunzip2 FILE", bz2.compress(SOUND.encode()), SOUND),
    text("unpack it first: unzip FILE", b"PK\x03\x04" + SOUND.encode(), SOUND),
    text("save it as parquet or JSONL", b"ARROW1\x00\x00" + SOUND.encode(), parquet(RECORDS)),
    text("give its text", b"%PDF-1.7\n" + SOUND.encode(), SOUND),
    text("export its text", b"SQLite format 3\x00" + SOUND.encode(), SOUND),
    text("{}: cannot be read as parquet ({}); fetch it again", b"PAR1" + SOUND.encode(), parquet(RECORDS)),
    Case(
        "{}: expands to more than {} times its size, which text does not; give JSONL",
        TEXT,
        put(parquet([{"text": words(ids_of(40)) * 50}] * 200)),
        put(RECORDS),
        limits=(("bigq.io.parquet_file.FREE_EXPANSION", 0), ("bigq.io.parquet_file.MOST_EXPANSION", 1)),
    ),
    Case(
        "{}: reading parquet needs the package pyarrow: pip install pyarrow; or give the text as JSONL",
        TEXT,
        put(parquet(RECORDS)),
        put(RECORDS),
        limits=(("bigq.io.parquet_file.importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))),),
    ),
)


def tokenizer_config(**values: object) -> Act:
    def act(place: Place) -> None:
        put(SOUND)(place)
        path = place.model / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return act


def with_ids(place: Place) -> list[str]:
    return asked(TEXT, calibration="{ids}")(place)


def no_vocabulary(place: Place) -> None:
    """A tokenizer that loads, and fails on every word."""
    put(SOUND)(place)
    path = place.model / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["vocab"], value["model"]["unk_token"] = {"<s>": 1}, "<none>"
    path.write_text(json.dumps(value))


def outside(place: Place) -> None:
    (place.tmp / "secret").write_text("w5")
    tokenizer_config(chat_template_file=str(place.tmp / "secret"))(place)


TOKENIZERS = (
    Case(
        "{}: its tokenizer cannot be loaded ({}); add the tokenizer files, or give token ids in a safetensors file",
        EVAL.replace("{ids}", "{tmp}/t"),
        lambda p: (p.tmp / "t").write_text(SOUND),
        put(SOUND),
    ),
    Case(
        "{}: its tokenizer cannot be loaded ({}); add the tokenizer files, or give token ids in a safetensors file",
        EVAL.replace("{ids}", "{tmp}/t"),
        lambda p: (p.tmp / "t").write_text(SOUND),
        asked(EVAL),
    ),
    Case("the model's tokenizer fails on the text ({}); give token ids in a safetensors file", TEXT, no_vocabulary, with_ids),
    Case(
        "{}: tokenizer_class {} is not the name of a class; correct it",
        EVAL.replace("{ids}", "{tmp}/t"),
        tokenizer_config(tokenizer_class=3),
        put(SOUND),
    ),
    Case(
        "{}: tokenizer_class {} is not a tokenizer; correct it, or give token ids",
        EVAL.replace("{ids}", "{tmp}/t"),
        tokenizer_config(tokenizer_class="LlamaConfig"),
        put(SOUND),
    ),
    Case(
        "{}: tokenizer_class {} is not a tokenizer; correct it, or give token ids",
        EVAL.replace("{ids}", "{tmp}/t"),
        tokenizer_config(tokenizer_class="LlamaConfig"),
        asked(EVAL),
    ),
    Case("{}: names a file outside the model's folder, {}; remove the entry", EVAL.replace("{ids}", "{tmp}/t"), outside, put(SOUND)),
)


class Endless:
    """An iterable that can be read more than once."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def python(value: Any) -> Act:
    """A plan with data that is given in Python."""

    def act(place: Place) -> None:
        tokenizer_folder(place.model, bos=True)
        config = JobConfig(calibration=value, samples=4, seqlen=16, device="cpu", scheme=QuantScheme(group_size=32))
        bigq.plan(str(place.model), place.tmp / "never", config)

    return act


def given(says: str, bad: Callable[[], Any], good: Any, **limits: object) -> Case:
    """Data that is refused, and what is given instead."""
    lowered = tuple((f"bigq.data.given.{name}", value) for name, value in limits.items())
    return Case(says, lambda place: python(bad())(place), None, lambda place: lambda: python(good)(place), limits=lowered)


def begun_in_python(place: Place) -> None:
    """A job of data that was given in Python, which lacks a shard."""
    resumed(place)
    sorted(place.out.glob("model-*"))[-1].unlink()


def resumed(place: Place) -> None:
    config = JobConfig(calibration=ROWS, samples=4, seqlen=16, device="cpu", scheme=QuantScheme(group_size=32), quiet=True)
    bigq.quantize(str(place.original), place.out, config)


ROWS = [ids_of(16, 20 * i) for i in range(4)]
TEXTS = [each["text"] for each in RECORDS]
GIVEN = (
    given("{}: a mapping needs a field input_ids; give {}", lambda: {"x": ROWS}, {"input_ids": ROWS}),
    given("{}: {} is not calibration data; give {}", lambda: 3, TEXTS),
    given("{}: is empty; give {}", list, ROWS),
    given("{} holds token ids, but the first item holds text; give items of one kind", lambda: [*TEXTS, ROWS[0]], TEXTS),
    given("calibration: item {} is a text, but the first item holds token ids; give items of one kind", lambda: [ROWS[0], *TEXTS], ROWS),
    given("{}: item {} is {}; give {}", lambda: [*TEXTS, 3.5], TEXTS),
    given("{}: are no token ids ({}); give integers of 64 bits at most", lambda: [[2**70] * 16] * 4, ROWS),
    given(
        "{}: the iterator yields more than {} characters or {} items; give fewer, or an iterable that can be read more than once, such as "
        "a list or a Dataset",
        lambda: iter(TEXTS),
        Endless(TEXTS),
        MAX_COPIED_CHARS=100,
    ),
    given(
        "{}: holds more than {} token ids, which is more than bigq reads; give fewer rows",
        lambda: torch.tensor(ROWS * 2),
        torch.tensor(ROWS),
        MAX_IDS=100,
    ),
    given("{}: holds no token ids; give more data", lambda: Endless([]), ROWS),
    Case(
        "{}: the data of this job was given in Python, and no file holds it; resume it in Python, by bigq.quantize with the settings and "
        "the calibration data that it was begun with",
        "quantize {original} {out} --device cpu --quiet",
        begun_in_python,
        lambda place: lambda: resumed(place),
    ),
)

TEXT_CASES = tuple(replace(case, family="small") for case in (*SHORT, *NAMED, *RECORD, *FILES, *TOKENIZERS, *GIVEN))
