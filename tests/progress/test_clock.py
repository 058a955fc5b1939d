"""The clock, on the host and on a simulated device: seconds by phase, measured without waiting until they are needed."""

from __future__ import annotations

import contextlib
import itertools
import time

import pytest
import torch

from bigq.progress import clock as clock_module
from bigq.progress.clock import BETWEEN, Clock, StreamTimeline
from bigq.progress.trace import Trace

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


class Hands:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    hands = Hands()
    monkeypatch.setattr(time, "perf_counter", hands)
    return hands


# On the host.


def test_inner_phases_are_not_counted_in_outer_ones(hands: Hands) -> None:
    clock = Clock(CPU)
    with clock.phase("solve") as solve:
        hands.now += 1
        with clock.phase("read") as read:
            hands.now += 10
            with clock.phase("wait"):
                hands.now += 100
        hands.now += 2
        with clock.phase("read"):
            hands.now += 20
    assert clock.seconds == {"solve": 3, "read": 30, "wait": 100}
    assert (solve.seconds, read.seconds) == (133, 110), "a lap is the whole stretch"


def test_repeated_phases_add_up(hands: Hands) -> None:
    clock = Clock(CPU)
    for seconds in (1, 2, 4):
        with clock.phase("load"):
            hands.now += seconds
        hands.now += 1000
    assert clock.seconds == {"load": 7}


def test_a_phase_inside_itself_is_counted_once(hands: Hands) -> None:
    clock = Clock(CPU)
    with clock.phase("a"):
        hands.now += 1
        with clock.phase("a"):
            hands.now += 2
    assert clock.seconds == {"a": 3}


def test_a_phase_that_fails_is_counted_and_leaves_the_nesting_sound(hands: Hands) -> None:
    clock = Clock(CPU)
    with clock.phase("outer"):
        with contextlib.suppress(ValueError), clock.phase("inner"):
            hands.now += 5
            raise ValueError
        hands.now += 1
    assert clock.seconds == {"inner": 5, "outer": 1}


def test_the_host_waits_where_it_reads_writes_or_copies(hands: Hands) -> None:
    clock = Clock(CPU)
    for seconds, phase in enumerate(("load", "solve", "write", "copy", "probe", "embed", "transfer"), 1):
        with clock.phase(phase):
            hands.now += seconds
        hands.now += 1000
    assert clock.wait_seconds() == {"reading weights": 1, "writing": 3, "copying the rest": 4, "activations": 7}


def test_spans_are_kept_only_when_asked_for(hands: Hands) -> None:
    trace = Trace()
    for clock in (Clock(CPU), Clock(CPU, Trace(keep=False)), Clock(CPU, trace)):
        clock.subject = "layer 3"
        with clock.phase("solve"):
            hands.now += 2
        hands.now += 5
        assert len(clock.trace.spans) == (clock.trace is trace)
    assert [(s.lane, s.name, s.begin, s.end) for s in trace.spans] == [("solve", "layer 3", 14, 16)]


# On a device that works through a queue while the host continues.


class Device:
    """A simulated CUDA stream: work and events are done in order, after the host queues them. Times are in seconds."""

    #: The offset of the device's clock to the host's.
    OFFSET = 5000.0

    def __init__(self, hands: Hands) -> None:
        self.hands, self.free_at, self.waits, self.events = hands, 0.0, 0, 0

    def work(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.hands.now) + seconds

    def event(self) -> DeviceEvent:
        self.events += 1
        return DeviceEvent(self)


class DeviceEvent:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.at: float | None = None

    def record(self) -> None:
        self.at = max(self.device.free_at, self.device.hands.now)

    def query(self) -> bool:
        assert self.at is not None
        return self.at <= self.device.hands.now

    def synchronize(self) -> None:
        assert self.at is not None
        self.device.waits += 1
        self.device.hands.now = max(self.device.hands.now, self.at)

    def elapsed_time(self, end_event: DeviceEvent) -> float:
        """As in CUDA: milliseconds, and an error where an event is not reached."""
        assert self.at is not None and end_event.at is not None
        if not (self.query() and end_event.query()):
            raise RuntimeError("device not ready")
        return ((end_event.at + Device.OFFSET) - (self.at + Device.OFFSET)) * 1000


@pytest.fixture
def device(hands: Hands) -> Device:
    return Device(hands)


def clock_of(device: Device, trace: Trace | None = None) -> Clock:
    return Clock(CUDA, trace, StreamTimeline(device.event))


def block(clock: Clock, device: Device, hands: Hands, reading: float) -> None:
    """One block of a job: the host reads for a while, then queues 16 seconds of work at once."""
    with clock.phase("load"):
        hands.now += reading
        device.work(1)
    with clock.phase("replay"):
        device.work(2)
        for _ in range(2):
            with clock.phase("hessian"):
                device.work(4)
        device.work(5)


def test_phases_take_what_the_device_spent_between_their_ends(device: Device, hands: Hands) -> None:
    """The device waits for the first block. Reading the second overlaps the work of the first, except for one second."""
    clock = clock_of(device)
    before = device.waits
    block(clock, device, hands, reading=10)
    block(clock, device, hands, reading=17)
    assert device.waits == before, "the host waits for the device within a job"
    assert hands.now == 127
    assert clock.seconds == {"load": 10 + 1 + 1 + 1, "replay": 2 * 7, "hessian": 2 * 8}
    assert hands.now == 127 + 1 + 15, "asked for its seconds, a clock waits for the device"
    assert device.waits == before + 1
    assert sum(clock.seconds.values()) == hands.now - 100, "the phases are the whole run"
    assert device.waits == before + 1, "with nothing new there is nothing to wait for"


def test_a_gpu_waits_between_phases_too(device: Device, hands: Hands) -> None:
    clock = clock_of(device)
    block(clock, device, hands, reading=10)
    hands.now += 20
    with clock.phase("write"):
        hands.now += 3
    with clock.phase("transfer"):
        hands.now += 1
    assert clock.wait_seconds() == {"reading weights": 11, "writing": 3, "activations": 1, BETWEEN: 4}


def test_laps_are_read_only_when_needed(device: Device, hands: Hands) -> None:
    clock = clock_of(device)
    before = device.waits
    with clock.phase("replay") as outer:
        device.work(3)
        with clock.phase("solve") as lap:
            device.work(2)
        assert device.waits == before
        assert (lap.seconds, float(lap)) == (2, 2)
        assert device.waits == before + 1
        device.work(4)
    assert outer.seconds == 9
    assert clock.seconds == {"replay": 7, "solve": 2}, "an inner lap that was read off early still counts"


def test_a_phase_that_fails_on_the_device_is_counted(device: Device) -> None:
    clock = clock_of(device)
    with clock.phase("outer"):
        with contextlib.suppress(ValueError), clock.phase("inner"):
            device.work(5)
            raise ValueError
        device.work(1)
    assert clock.seconds == {"inner": 5, "outer": 1}


def test_events_are_used_again(device: Device, hands: Hands) -> None:
    clock = clock_of(device)
    for _ in range(20):
        block(clock, device, hands, reading=1)
        clock.synchronize()
    assert device.events <= 2 * 4 + 2
    assert clock.seconds["hessian"] == 20 * 8


def test_many_laps_are_read_without_waiting(device: Device, hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock_module, "PENDING", 10)
    clock = clock_of(device, Trace())
    before = device.waits
    with clock.phase("replay"):
        for i in range(1000):
            with clock.phase("hessian"):
                device.work(1)
            hands.now += 1 if i % 2 else 0.5
            if i == 500:
                hands.now += 200
    assert device.waits == before and device.events < 1000
    assert len(clock.trace.spans) > 500
    assert clock.seconds["hessian"] == 1000 and len(clock.trace.spans) == 1001
    begins = [s.begin for s in clock.trace.spans if s.lane == "hessian"]
    assert all(b - a >= 1 for a, b in itertools.pairwise(begins))


def test_device_phases_lie_on_the_host_s_time(device: Device, hands: Hands) -> None:
    """At the time they ran, not when they were queued; beside the host's spans."""
    trace = Trace()
    clock = clock_of(device, trace)
    clock.subject = "layer 0"
    hands.now += 7
    for _ in range(2):
        with clock.phase("solve"):
            device.work(4)
        with trace.span("read", "weights"):
            hands.now += 1
        clock.synchronize()
    spans = [(s.lane, s.name, s.begin, s.end) for s in trace.spans]
    assert spans == [
        ("read", "weights", 7, 8),
        ("solve", "layer 0", 7, 11),
        ("read", "weights", 11, 12),
        ("solve", "layer 0", 11, 15),
    ]


@pytest.mark.gpu
def test_a_gpu_s_phases_add_up_to_the_run() -> None:
    """Matrix products that are queued at once, and a pause of the host that the device waits for."""
    x = torch.randn(4096, 4096, device=CUDA)
    x @ x
    torch.cuda.synchronize()
    trace = Trace()
    clock = Clock(CUDA, trace)
    started = time.perf_counter()
    with clock.phase("replay"):
        for _ in range(20):
            x = x @ x / 64
    queued = time.perf_counter() - started
    paused = time.perf_counter()
    with clock.phase("load"):
        time.sleep(0.3)
    with clock.phase("hessian"):
        x @ x
    paused = time.perf_counter() - paused
    seconds = clock.seconds
    whole = time.perf_counter() - started
    assert sum(seconds.values()) == pytest.approx(whole, rel=0.05, abs=0.005)
    assert seconds["replay"] > queued or queued < 0.05
    assert 0.3 - seconds["replay"] <= seconds["load"] <= paused + 0.005, "a busy host sleeps longer than asked"
    assert clock.wait_seconds()["reading weights"] == seconds["load"]
    begins = [span.begin for span in trace.spans]
    assert begins == sorted(begins) and begins[0] >= 0
