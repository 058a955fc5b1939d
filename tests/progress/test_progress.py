"""How far a job is and how that is shown: estimates by a clock that the test moves, lines, a pseudo-terminal, events."""

from __future__ import annotations

import io
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from screen import Screen, Terminal

from bigq.progress.display import DONE_FIELDS, HEARTBEAT, Display, Events, Finished, Lines, Moment, to_json
from bigq.progress.live_line import Live, bar, display_for, live_line
from bigq.progress.progress import SOLVING, WINDOW, Pace, Progress, Rate

CPU = torch.device("cpu")
MOMENT = Moment(
    blocks=80,
    block=12,
    phase="solve",
    seconds=61.4,
    steps={"rows": (64, 128), "Linears": (3, 7)},
    fraction=0.146,
    eta=7985.0,
    rate=2.61e9,
    bytes_read=10**9,
    host=3 * 2**30,
    device=41 * 2**30,
)


class Hands:
    """A clock whose hands the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    clock = Hands()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal(100)
    yield made
    made.close()


# Time left, and the rate of reading.


def test_time_left_follows_the_blocks_that_were_timed(hands: Hands) -> None:
    """Blocks that an earlier run committed take no time and must not make the rest look quick."""
    stream = io.StringIO()
    with Progress(100, CPU, stream=stream) as progress:
        progress.start(50)
        for _ in range(50):
            hands.now += 1000
            progress.block_skipped()
        for index in (50, 51):
            hands.now += 90
            progress.block_done(index, 90.0, None)
        hands.now += 180
        progress.block_done(52, 180.0, None)
    assert [line.split("eta ")[1] for line in stream.getvalue().splitlines()] == ["1:13:30", "1:12:00", "1:34:00"]


def test_time_left_runs_down_within_a_block(hands: Hands) -> None:
    progress = Progress(4, CPU, quiet=True)
    progress.phase("load", 0)
    hands.now += 40
    progress.block_done(0, 40.0, None)
    progress.phase("load", 1)
    assert progress.moment().eta == 120 and progress.facts()["eta_seconds"] == 120
    hands.now += 30
    assert progress.moment().eta == 90 and progress.moment().fraction == pytest.approx((1 + 0.75) / 4)
    hands.now += 30
    assert progress.moment().eta == 80, "a block that takes longer than the others leaves those behind it"
    assert pytest.approx(progress.moment().fraction) == (1 + 0.99) / 4


def test_the_first_block_is_told_from_its_linears(hands: Hands) -> None:
    """What came before it (copying, embedding) counts for nothing; blocks to replay have no part in it either."""
    progress = Progress(10, CPU, quiet=True)
    progress.start(2)
    hands.now += 500
    progress.phase("calibration rows")
    for block in (0, 1):
        progress.phase("load", block)
        progress.phase("replay", block)
        hands.now += 7
        progress.step("rows", 8, 8)
        assert progress.moment().eta is None
        progress.block_skipped()
    progress.phase("load", 2)
    progress.phase("solve", 2)
    hands.now += 20
    assert progress.moment().eta is None and progress.moment().fraction == 0.2
    progress.solved(3, 7, 0.25)
    part = SOLVING * 0.25
    assert progress.moment().eta == pytest.approx(20 / part * 8 - 20)
    assert progress.moment().fraction == pytest.approx((2 + part) / 10)
    hands.now += 60
    progress.solved(7, 7, 1.0)
    progress.phase("replay", 2)
    progress.step("rows", 2, 4)
    assert progress.moment().eta == pytest.approx(80 / (SOLVING + (1 - SOLVING) / 2) * 8 - 80)
    assert progress.moment().steps == {"rows": (2, 4)}


def test_what_an_earlier_run_left_is_not_counted_as_left(hands: Hands) -> None:
    progress = Progress(8, CPU, quiet=True)
    progress.start(6)
    progress.phase("load", 3)
    hands.now += 10
    progress.block_done(3, 10.0, None, left=1)
    assert progress.facts() == {"blocks": 8, "phase": "block 4 load", "block": 7, "eta_seconds": 10.0}
    progress.phase("load", 7)
    hands.now += 10
    progress.block_done(7, 10.0, None)
    assert progress.moment().eta == 0 and progress.moment().fraction == 1


@given(st.lists(st.sampled_from(["begin", "skip", "done", "wait", "part"]), max_size=30))
def test_estimates_are_sane_whatever_happens(events: list[str]) -> None:
    pace, now, left = Pace(9, 0.0), 0.0, 9
    for event in events:
        now += 3.0
        if event == "begin":
            pace.begin(now)
        elif event == "skip":
            pace.skip(now)
        elif event == "done":
            left = max(0, left - 1)
            pace.done(left, now)
        elif event == "part":
            pace.part = 0.5
        eta = pace.eta(now)
        assert 0 <= pace.fraction(now) <= 0.99 and (eta is None or eta >= 0)


def test_the_rate_is_that_of_the_last_minute_or_of_the_last_block() -> None:
    rate = Rate(0.0)
    assert rate.at(5.0) is None
    rate.add(500, 5.0)
    assert rate.at(10.0) == 50
    rate.add(700, 20.0)
    assert rate.at(20.0) == 60
    assert rate.at(5.0 + WINDOW) == 700 / WINDOW, "what was read at the beginning of the window is not counted"
    assert rate.at(5.0 + 10 * WINDOW) == 700 / (10 * WINDOW), "but one block always is"
    for i in range(1000):
        rate.add(10, 1000.0 + i)
    assert rate.at(1999.0) == pytest.approx(10) and len(rate._reads) < WINDOW + 5 and rate.total == 11200


# Plain lines.


def run_blocks(stream: io.StringIO, **how: Any) -> None:
    with Progress(4, CPU, stream=stream, **how) as progress:
        progress.block_skipped()
        for index in (1, 2, 3):
            progress.phase("solve", index)
            progress.read(10**9)
            progress.block_done(index, 12.34, ("mlp.down_proj", 0.0123) if index < 3 else None)
        progress.say("all done")


def test_without_a_terminal_each_block_is_one_plain_line(capfd: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    run_blocks(stream)
    text = stream.getvalue()
    lines = text.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["block 2/4", "block 3/4", "block 4/4", "all done"]
    assert all("12.3 s" in line and "host " in line and "B/s" in line and "eta 0:00" in line for line in lines[:3])
    assert ["worst mlp.down_proj 1.23e-02" in line for line in lines[:3]] == [True, True, False]
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    assert capfd.readouterr() == ("", "")


def test_quiet_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    run_blocks(stream, quiet=True)
    assert stream.getvalue() == "" and capfd.readouterr() == ("", "")


def test_the_usual_stream_is_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress(1, CPU) as progress:
        progress.block_done(0, 1.0, None)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("block 1/1") and err.count("\n") == 1


def test_a_block_that_takes_long_gives_a_sign_of_life_a_minute(hands: Hands) -> None:
    stream = io.StringIO()
    display = Lines(stream)
    progress = Progress(4, CPU, display=display)
    display.open(progress.moment())
    progress.phase("solve", 1)
    progress.solved(3, 7, 0.5)
    for _ in range(150):
        hands.now += 1
        progress.tick()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and all(line.startswith("block 2/4 solve  3/7 Linears  ") for line in lines)
    assert " 60 s " in lines[0] and " 120 s " in lines[1] and "eta " in lines[1]
    progress.block_done(1, 150.0, None)
    for _ in range(int(HEARTBEAT) - 1):
        hands.now += 1
        progress.tick()
    assert len(stream.getvalue().splitlines()) == 3, "a block's line is a sign of life too"


def test_messages_cannot_act_upon_a_terminal() -> None:
    stream = io.StringIO()
    with Progress(1, CPU, stream=stream) as progress:
        progress.say("two\nlines \x1b[2J\x07\r")
    assert stream.getvalue() == "two\nlines \\x1b[2J\\x07\\r\n"


class Broken(io.StringIO):
    def write(self, _: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("display", [Lines, Live, Events])
@pytest.mark.parametrize("closed", [False, True])
def test_a_stream_that_cannot_be_written_does_not_end_the_job(display: Callable[..., Display], closed: bool) -> None:
    stream = Broken()
    shown = display(stream)
    shown.period = 0.001
    with Progress(2, CPU, display=shown) as progress:
        progress.phase("load", 0)
        if closed:
            stream.close()
        progress.say("x")
        progress.block_done(0, 1.0, None)
        time.sleep(0.05)
        assert progress._thread is not None and progress._thread.is_alive()


# The live line.


def test_the_live_line_says_all_there_is() -> None:
    line = live_line(MOMENT, 140)
    memory = ["host 3.00 GiB", "gpu 41.00 GiB"]
    for said in ["block 12/80 solve", "64/128 rows, 3/7 Linears", "15 %", "eta 2:13:05", "2.61 GB/s", "█", *memory]:
        assert said in line
    unknown = live_line(Moment(blocks=3), 140)
    assert unknown.startswith("starting") and "eta –" in unknown and "GB/s" not in unknown and "gpu" not in unknown


@given(st.integers(0, 200), st.floats(0, 1), st.booleans())
def test_the_live_line_fits(width: int, fraction: float, unicode: bool) -> None:
    line = live_line(Moment(blocks=8, block=3, phase="solve", fraction=fraction, rate=1e9, host=2**30), width, unicode)
    assert len(line) <= width and (unicode or line.isascii()) and "\n" not in line
    assert line.startswith("block 3/8 solve"[:width])
    assert len(bar(fraction, 9, unicode)) == 9


def test_what_matters_most_stays_where_it_is_narrow() -> None:
    assert live_line(MOMENT, 40) == "block 12/80 solve  15 %  eta 2:13:05"
    assert live_line(MOMENT, 24) == "block 12/80 solve  15 %"
    assert live_line(MOMENT, 10) == "block 12/8"


def test_a_bar_grows() -> None:
    assert [bar(part, 6, False) for part in (0, 0.5, 1)] == ["[    ]", "[##  ]", "[####]"]
    assert [bar(part, 4) for part in (0, 0.25, 0.5, 0.99, 1)] == ["▕  ▏", "▕▌ ▏", "▕█ ▏", "▕█▉▏", "▕██▏"]


def test_one_line_at_the_bottom_and_messages_above(terminal: Terminal) -> None:
    with Progress(3, CPU, stream=terminal.stream) as progress:
        progress.say("plan: much\n  needs   little")
        progress.phase("solve", 0)
        progress.read(10**8)
        progress.solved(2, 7, 0.5)
        progress.tick()
        above, needs, line = terminal.look().seen
        assert (above, needs) == ("plan: much", "  needs   little")
        assert line.startswith("block 1/3 solve  2/7 Linears  13 %  ▕") and "B/s" in line and "eta " in line and "host " in line
        progress.block_done(0, 1.5, ("q_proj", 0.5))
        seen = terminal.look().seen
        assert len(seen) == 4 and seen[2].startswith("block 1/3  1.5 s  worst q_proj") and seen[3].startswith("block 1/3 solve  33 %")
        progress.say("warning: x")
        assert [row[:10] for row in terminal.look().seen[3:]] == ["warning: x", "block 1/3 "]
    seen = terminal.look().seen
    assert len(seen) == 4 and seen[-1] == "warning: x", "nothing is left of the line"
    assert terminal.look().escapes == {"K"}, "no colours, no moves"


def test_it_moves_by_itself(terminal: Terminal) -> None:
    """While the main thread is somewhere else."""
    with Progress(3, CPU, stream=terminal.stream) as progress:
        progress.phase("solve", 0)
        terminal.look()
        progress.step("rows", 3, 8)
        assert "3/8 rows" not in terminal.look().seen[-1]
        until = time.monotonic() + 10
        while "3/8 rows" not in terminal.look(0.1).seen[-1]:
            assert time.monotonic() < until
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_a_terminal_that_becomes_narrow_gets_no_more_lines(terminal: Terminal) -> None:
    """tqdm overwrites what it wrote before with spaces, which would wrap here."""
    with Progress(3, CPU, stream=terminal.stream) as progress:
        progress.phase("solve", 0)
        wide = len(terminal.look().seen[-1])
        terminal.resize(40)
        rows = len(terminal.look().rows)
        for _ in range(3):
            progress.tick()
            assert len(terminal.look().rows) == rows and 0 < len(terminal.look().seen[-1]) < 40 < wide
        terminal.resize(100)
        progress.tick()
        assert len(terminal.look().seen[-1]) == wide and len(terminal.look().rows) == rows


def test_a_terminal_without_block_characters() -> None:
    made = Terminal(90, "ascii")
    with Progress(2, CPU, stream=made.stream) as progress:
        progress.phase("load", 1)
        progress.tick()
        line = made.look().seen[-1]
        assert "[####" in line and line.isascii() and len(line) < 90 and made.raw.isascii()
    made.close()


def test_a_terminal_of_unknown_size_has_80_columns() -> None:
    made = Terminal(0)
    made._screen.columns = 200
    with Progress(2, CPU, stream=made.stream) as progress:
        progress.phase("load", 1)
        assert 40 < len(made.look().seen[-1]) < 80
    made.close()


def test_which_display_suits_a_stream(terminal: Terminal) -> None:
    assert type(display_for(terminal.stream)) is Live
    assert type(display_for(terminal.stream, dumb=True)) is Lines
    assert type(display_for(io.StringIO())) is Lines
    assert type(display_for(terminal.stream, quiet=True)) is Display and Display.period is None


def test_the_screen_of_these_tests_wraps_and_erases() -> None:
    screen = Screen(4)
    screen.feed("abcdef\rXY\x1b[K\nz\x1b[31m")
    assert screen.seen == ["abcd", "XY", "z"] and screen.escapes == {"K", "m"}


# Events.


def all_events(hands: Hands) -> list[dict[str, Any]]:
    """At least one of each."""
    stream = io.StringIO()
    display = Events(stream)
    progress = Progress(2, CPU, display=display)
    display.reading("m/ö")
    progress.planned("plan: …", {"blocks": 2})
    progress.start(0)
    progress.phase("load", 0)
    progress.read(1000)
    progress.step("rows", 1, 2)
    hands.now += HEARTBEAT
    progress.tick()
    progress.block_done(0, 60.0, ("q", 0.5))
    progress.event("checkpoint", block=2, blocks=2)
    progress.say("out of memory: batch 8 → 4")
    progress.say("warning: \x1b[2J")
    progress.block_done(1, 1.0, ("v", float("nan")))
    progress.event("done", **dict.fromkeys(DONE_FIELDS, 0))
    display.error(4, "ResourceError", "no\nroom")
    text = stream.getvalue()
    assert text.isascii()
    return [json.loads(line) for line in text.splitlines()]


def test_events_are_lines_of_json(hands: Hands) -> None:
    events = all_events(hands)
    assert [event["event"] for event in events] == [
        "reading", "plan", "start", "phase", "heartbeat", "block", "checkpoint", "note", "warning", "block", "done", "error",
    ]  # fmt: skip
    assert ["v" in event for event in events] == [True] + [False] * 11 and events[0]["v"] == 1
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", event["time"]) for event in events)
    heartbeat, block = events[4], events[5]
    assert heartbeat["steps"] == {"rows": [1, 2]} and heartbeat["seconds"] == HEARTBEAT and heartbeat["eta_seconds"] is None
    assert (block["block"], block["blocks"], block["seconds"], block["eta_seconds"]) == (1, 2, 60.0, 60.0)
    assert block["worst"] == {"name": "q", "relative_error": 0.5} and block["bytes_read"] == 1000
    assert block["host_bytes"] > 2**20 and block["device_bytes"] is None
    assert events[8]["message"] == "\x1b[2J" and events[9]["worst"]["relative_error"] is None, "JSON has no NaN"
    assert events[11] == {**events[11], "exit_code": 4, "kind": "ResourceError", "message": "no\nroom"}


def test_the_documentation_names_every_event_and_field(hands: Hands) -> None:
    text = (ROOT / "docs" / "progress.md").read_text(encoding="utf-8").partition("## Events")[2]
    documented = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"\| `(\w+)` \|[^|]*\| (.*) \|", line):
            fields = re.sub(r"\([^()]*\)", "", match[2])
            documented[match[1]] = set(re.findall(r"`(\w+)`", fields))
    told = {event["event"]: set(event) - {"v", "event", "time"} for event in all_events(hands)}
    assert documented == told


def test_quiet_events_are_the_error_alone() -> None:
    stream = io.StringIO()
    display = Events(stream, quiet=True)
    assert display.period is None
    with Progress(2, CPU, display=display) as progress:
        progress.planned("", {"blocks": 2})
        progress.say("x")
        progress.phase("load", 0)
        progress.block_done(0, 1.0, None)
    assert stream.getvalue() == ""
    display.error(3, "DataError", "m")
    assert json.loads(stream.getvalue())["v"] == 1


def test_a_signal_is_an_event_too() -> None:
    read, write = os.pipe()
    with open(write, "w") as stream:
        for quiet in (False, True):
            display = Events(stream, quiet=quiet)
            display.signalled("SIGTERM: finishing", None)
            display.signalled("stopped", 75)
    events = [json.loads(line) for line in open(read)]
    assert [(event["event"], event.get("exit_code")) for event in events] == [("note", None), ("error", 75), ("error", 75)]


def test_json_of_anything() -> None:
    assert json.loads(to_json({"a": (1.5, float("inf"), {"é": None}), 3: "x"})) == {"a": [1.5, None, {"é": None}], "3": "x"}


def test_calls_of_a_display_come_one_at_a_time() -> None:
    inside, most = 0, 0

    class Counting(Display):
        period = 0.0005

        def _in(self) -> None:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.001)
            inside -= 1

        def tick(self, moment: Moment) -> None:
            self._in()

        def say(self, text: str) -> None:
            self._in()

        def block(self, done: Finished, moment: Moment) -> None:
            self._in()

    with Progress(99, CPU, display=Counting()) as progress:
        speakers = [threading.Thread(target=lambda: [progress.say("x") for _ in range(20)]) for _ in range(3)]
        for speaker in speakers:
            speaker.start()
        for i in range(20):
            progress.block_done(i, 1.0, None)
        for speaker in speakers:
            speaker.join()
    assert most == 1


def test_behind_the_last_block_there_is_no_block_and_no_guess() -> None:
    """The output head, or a GGUF file."""
    with Progress(1, torch.device("cpu"), quiet=True) as progress:
        progress.start(0)
        progress.phase("solve", 0)
        assert progress.moment().block == 1
        progress.block_done(0, 1.0, None)
        assert progress.moment().eta == 0
        progress.phase("output head")
        now = progress.moment()
        assert (now.block, now.phase, now.eta) == (None, "output head", None) and "eta_seconds" not in progress.facts()
