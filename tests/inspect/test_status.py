"""``bigq status``: what is said of jobs that run, were killed, stopped or failed, or are finished; whatever their records look like."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from models import make_checkpoint

from bigq import faults, quantize
from bigq.config import JobConfig
from bigq.errors import BigqError, UsageError
from bigq.inspect.status import RESUMABLE, STATES, Status, status
from bigq.io.folders import STATE_FOLDER
from bigq.job.owner import OWNER_NAME
from bigq.scheme import QuantScheme

#: One job, as a process of its own: the model, OUT, calibration ids, and what is to go wrong.
JOB = """
import sys
from bigq import faults, quantize
from bigq.config import JobConfig
from bigq.errors import BigqError
from bigq.job.stop import Stop
from bigq.scheme import QuantScheme

model, out, ids, fault = sys.argv[1:]
if fault:
    faults.arm(fault)
config = JobConfig(scheme=QuantScheme(group_size=32), calibration=ids, samples=4, seqlen=16, batch=4, quiet=True)
stop = Stop(config.grace)
try:
    with stop.listen():
        quantize(model, out, config, stop)
except BigqError as error:
    sys.exit(error.exit_code)
"""


@dataclasses.dataclass
class Job:
    """A job that can be run again and again, each time in a process of its own."""

    model: Path
    out: Path
    ids: Path

    def start(self, fault: str = "") -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", JOB, *map(str, (self.model, self.out, self.ids)), fault]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    def run(self, fault: str = "") -> int:
        process = self.start(fault)
        return process.wait(timeout=120)

    def until(self, seen: Callable[[Status], bool]) -> Status:
        """Look until something is seen."""
        end = time.monotonic() + 100
        while time.monotonic() < end:
            try:
                now = status(self.out)
            except UsageError:  # it has not begun
                now = None
            if now is not None and seen(now):
                return now
            time.sleep(0.05)
        raise AssertionError(f"never seen; last: {now}")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, ids_file: Path) -> Job:
    folder = tmp_path_factory.mktemp("status")
    return Job(make_checkpoint(folder / "m", "llama"), folder / "out", ids_file)


@pytest.fixture(scope="module")
def killed(job: Job) -> Path:
    """The folder of a job that was killed when two blocks were committed."""
    if not job.out.exists():
        assert job.run("block.solved:3:kill") == -signal.SIGKILL
    return job.out


@pytest.fixture
def out(killed: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(killed, tmp_path / "out"))


def run_here(job: Job, out: Path, **changes: Any) -> None:
    """Run a job in this process."""
    values = {"scheme": QuantScheme(group_size=32), "calibration": str(job.ids), "samples": 4, "seqlen": 16, "batch": 4, "quiet": True}
    quantize(str(job.model), out, JobConfig(**{**values, **changes}))


def told(out: Path) -> Status:
    """The status, of which everything that is shown of it can be shown."""
    now = status(out)
    assert json.loads(json.dumps(now.to_json(), allow_nan=False))["state"] == now.state
    assert now.state in STATES and now.state in now.text()
    for text in (*now.damaged, *now.warnings):
        assert words(text) in words(now.text())
    assert max(map(len, now.text().splitlines())) <= 60
    return now


def words(text: str) -> str:
    """A text without the white space that wrapping moves."""
    return "".join(text.split())


def change_owner(out: Path, **changes: Any) -> None:
    path = out / ".bigq" / "owner.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.long
def test_a_job_from_its_beginning_over_its_death_to_its_end(job: Job, tmp_path: Path) -> None:
    own = dataclasses.replace(job, out=tmp_path / "out")
    process = own.start("block.solved:2:sleep=60")
    try:
        running = own.until(lambda s: s.state == "running" and s.blocks_done == 1)
        assert told(own.out).state == "running"
        assert not running.resumable and running.blocks == 3 and running.shards == 2
        assert running.bytes_written == sum(path.stat().st_size for path in own.out.glob("*.safetensors"))
        assert running.holder is not None and running.holder.pid == process.pid
        assert running.holder.heartbeat_age is not None and 0 <= running.holder.heartbeat_age < 100
        assert running.damaged == () and running.said is None
    finally:
        process.kill()
        process.wait()
    dead = told(own.out)
    assert (dead.state, dead.resumable, dead.blocks_done, dead.blocks) == ("killed", True, 1, 3)
    assert dead.phase is None and dead.eta_seconds is None
    assert own.run() == 0
    done = told(own.out)
    assert (done.state, done.resumable, done.blocks_done, done.blocks, done.shards) == ("finished", False, 3, 3, 4)
    assert any("ended abruptly" in warning for warning in done.warnings)
    assert done.damaged == ()


def test_phase_and_time_left_of_a_job_that_runs(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come with the heartbeat."""
    monkeypatch.setattr("bigq.job.owner.BEAT_SECONDS", 0.02)
    out = tmp_path / "out"
    out.mkdir()
    seen = [status(out)]

    def look() -> None:
        while seen[-1].state != "finished":
            seen.append(status(out))
            time.sleep(0.02)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    faults.arm("block.solved:3:sleep=1")
    try:
        run_here(job, out)
    finally:
        faults.disarm()
    thread.join(timeout=30)
    assert list(dict.fromkeys(s.state for s in seen)) == ["not begun", "running", "finished"]
    asleep = [s for s in seen if s.blocks_done == 2 and s.phase == "block 3 solve"]
    assert asleep and asleep[-1].eta_seconds is not None and asleep[-1].blocks == 3
    assert "block 3 solve" in asleep[-1].text()


def test_a_job_that_begins_at_this_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner's record appears after the look at it: the folder is as it was then."""
    (tmp_path / STATE_FOLDER).mkdir()

    def late(state: Path) -> None:
        (state / OWNER_NAME).write_text("{}")

    monkeypatch.setattr("bigq.inspect.status.Holder.read", late)
    assert told(tmp_path).state == "not begun" and told(tmp_path).state == "unknown"


@pytest.mark.long
def test_a_job_that_was_asked_to_stop_says_so(job: Job, tmp_path: Path) -> None:
    own = dataclasses.replace(job, out=tmp_path / "out")
    process = own.start("block.loaded:2:sleep=2")
    try:
        own.until(lambda s: s.blocks_done == 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
    finally:
        process.kill()
    now = told(own.out)
    assert now.state == "stopped" and now.resumable
    assert now.said is not None and "SIGTERM" in now.said and words(now.said) in words(now.text())


def test_a_job_that_failed_says_why(job: Job, tmp_path: Path) -> None:
    faults.arm("shard.piece:9:ENOSPC")
    try:
        with pytest.raises(BigqError):
            run_here(job, tmp_path / "out")
    finally:
        faults.disarm()
    now = told(tmp_path / "out")
    assert (now.state, now.resumable) == ("failed", True)
    assert now.said is not None and "No space left" in now.said


def test_a_finished_job_that_was_asked_for_something_else_stays_finished(job: Job, tmp_path: Path) -> None:
    run_here(job, tmp_path / "out")
    with pytest.raises(UsageError):
        run_here(job, tmp_path / "out", seed=1)
    now = told(tmp_path / "out")
    assert now.state == "finished" and now.said is None, "it leaves no trace"
    (tmp_path / "out" / "config.json").unlink()
    change_owner(tmp_path / "out", outcome="finished")
    now = told(tmp_path / "out")
    assert now.state == "failed" and now.resumable and any(text.startswith("config.json: ") for text in now.damaged)


def test_a_holder_on_another_machine(out: Path) -> None:
    change_owner(out, host="elsewhere", machine="elsewhere 1 2")
    now = told(out)
    assert (now.state, now.resumable) == ("unknown", False)
    assert now.holder is not None and now.holder.host == "elsewhere" and "elsewhere" in now.text()
    assert now.blocks_done == 2 and now.blocks == 3
    change_owner(out, outcome="stopped")
    assert told(out).state == "stopped", "how it ended counts wherever it ran"


def test_a_process_number_that_was_given_to_another(out: Path) -> None:
    change_owner(out, pid=os.getpid())
    assert told(out).state == "killed"


def test_age_of_the_heartbeat_is_told_by_the_file(out: Path) -> None:
    path = out / ".bigq" / "owner.json"
    written = time.time() - 3725
    os.utime(path, (written, written))
    before = sorted(path.name for path in (out / ".bigq").iterdir())
    now = told(out)
    assert now.holder is not None and now.holder.heartbeat_age == pytest.approx(3725, abs=60)
    assert "1:02:" in now.text()
    assert sorted(path.name for path in (out / ".bigq").iterdir()) == before, "looking on leaves nothing behind"


@pytest.mark.parametrize("name", ["job.json", "journal.jsonl", "runs.jsonl", "owner.json"])
@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 9, b"{", b"[" * 100_000, b"null\n", b"{}\n", b'{"facts": 3}', None], ids=lambda d: str(d)[:9]
)
def test_damaged_records_are_told_and_no_error(data: bytes | None, name: str, out: Path) -> None:
    path = out / ".bigq" / name
    path.unlink()
    path.mkdir() if data is None else path.write_bytes(data)
    now = told(out)
    if data != b"" or name in ("job.json", "owner.json"):
        assert any(name in text for text in now.damaged)
    assert now.resumable == (name not in ("job.json", "owner.json"))
    assert now.blocks_done == (0 if name == "journal.jsonl" else 2)
    assert now.state == ("unknown" if name == "owner.json" else "killed")


def test_one_damaged_line_costs_its_block_and_no_other(out: Path) -> None:
    path = out / ".bigq" / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"unit":"block-0"', b'"unit":"block-9"'))
    now = told(out)
    assert now.blocks_done == 1 and len(now.damaged) == 1 and "1 of 3 lines" in now.damaged[0]


def test_shards_that_are_gone_or_cut_short_do_not_count(out: Path) -> None:
    (out / "model-00002-of-00004.safetensors").unlink()
    with open(out / "model-00003-of-00004.safetensors", "ab") as file:
        file.truncate(100)
    now = told(out)
    assert now.blocks_done == 0 and now.shards == 1
    assert [text.partition(":")[0] for text in now.damaged] == ["model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors"]


FACTS = [
    {},
    {"blocks": "3"},
    {"blocks": -1, "phase": ["x"], "eta_seconds": "soon", "said": 5},
    {"eta_seconds": float("nan"), "blocks": True},
]


@pytest.mark.parametrize("facts", FACTS, ids=str)
def test_facts_may_be_anything(facts: dict[str, Any], out: Path) -> None:
    change_owner(out, facts=facts, machine="elsewhere")
    now = told(out)
    assert now.blocks is None and now.phase is None and now.eta_seconds is None and now.said is None
    assert now.blocks_done == 2


def test_nothing_was_begun(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert told(tmp_path / "out").state == "not begun"
    (tmp_path / "out" / ".bigq").mkdir()
    now = told(tmp_path / "out")
    assert (now.state, now.resumable, now.blocks, now.holder) == ("not begun", False, None, None)


@pytest.mark.parametrize("kind", ["absent", "a file", "a model"])
def test_a_folder_of_no_job_is_refused(kind: str, job: Job, tmp_path: Path) -> None:
    path = job.model if kind == "a model" else tmp_path / "x"
    if kind == "a file":
        path.write_text("")
    with pytest.raises(UsageError, match="holds no job"):
        status(path)


def test_only_the_states_that_can_be_taken_up_are_called_so() -> None:
    assert set(RESUMABLE) < set(STATES)


def test_a_folder_that_cannot_be_written_to(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the age is told by this machine's clock."""

    def refused(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    now = told(out)
    assert now.state == "killed" and now.holder is not None and now.holder.heartbeat_age is not None


def test_neither_torch_nor_transformers_is_imported(killed: Path, child: Callable[..., Any]) -> None:
    """They take seconds, and a status is asked for again and again."""
    code = (
        "import sys; from pathlib import Path; from bigq.inspect.status import status; print(status(Path(sys.argv[1])).text());"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy', 'safetensors', 'tqdm')))"
    )
    result = child("-c", code, killed)
    assert result.returncode == 0 and "killed" in result.stdout, result.stderr
