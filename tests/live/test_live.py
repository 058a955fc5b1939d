"""``bigq serve`` and ``bigq status --watch``: what they say of jobs, to whom, and what becomes of what records hold."""

from __future__ import annotations

import html.parser
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Child
from models import make_checkpoint, random_ids, save_ids

from bigq.cli.main import main
from bigq.errors import ResourceError, UsageError
from bigq.io.checksum import seal
from bigq.io.folders import STATE_FOLDER
from bigq.job.journal import JOURNAL_NAME
from bigq.job.owner import OWNER_NAME
from bigq.live import metrics as metrics_module
from bigq.live.metrics import metrics
from bigq.live.page import render
from bigq.live.server import Server
from bigq.live.watched import WatchedJob, require_places, watched

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;\u202e\x1b[31m\\"
BLOCKS = 3


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished job."""
    folder = tmp_path_factory.mktemp("live")
    model = make_checkpoint(folder / "m", "mixtral", num_hidden_layers=BLOCKS)
    ids = save_ids(folder / "ids.safetensors", random_ids())
    rows = ["--calibration", str(ids), "--samples", "4", "--seqlen", "24", "--group-size", "32", "--device", "cpu", "--quiet"]
    assert main(["quantize", str(model), str(folder / "out"), *rows]) == 0
    return folder / "out"


@pytest.fixture
def begun(tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a job that holds these records."""

    def make(name: str = "out", facts: dict[str, Any] | None = None, lines: bytes = b"", **owner: Any) -> Path:
        state = tmp_path / name / STATE_FOLDER
        state.mkdir(parents=True)
        about = {"token": "t", "host": "h", "machine": "m", "pid": 1, "started": 0, "beat": 7, "at": "2026-01-01T00:00:00+00:00"}
        (state / OWNER_NAME).write_text(json.dumps({**about, "outcome": "failed", "facts": facts or {}, **owner}))
        (state / JOURNAL_NAME).write_bytes(lines)
        return tmp_path / name

    return make


def line(folder: Path, number: int, seconds: float, linears: list[Any]) -> bytes:
    """A line of the journal, and its shard of 1000 bytes, which was written so many seconds after the first."""
    file = f"shard-{number}.safetensors"
    (folder / file).write_bytes(bytes(1000))
    value = {"unit": f"block-{number}", "file": file, "size": 1000, "sha256": "0" * 64, "modified": int(seconds * 1e9), "tensors": []}
    return seal({**value, "linears": linears, "left_out": [], "skipped": {}, "source": "", "batch": 1}, line=True)


def record(name: str, error: object, **more: object) -> dict[str, object]:
    return {"name": name, "bits": 4, "relative_error": error, **more}


@pytest.fixture
def served(done: Path) -> Iterator[Server]:
    with Server([done, Path("nowhere")], 0, 5) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: Server, path: str, method: str = "GET", host: str | None = None) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response, text


def test_a_finished_job_and_one_that_is_not_there_yet(done: Path) -> None:
    finished, missing = watched([done, Path("nowhere")])
    assert (finished.state, missing.state, missing.found) == ("finished", "not begun", None)
    assert finished.linears == BLOCKS * (4 + 4 * 3)
    assert finished.fraction == 1.0 and finished.found is not None
    assert finished.newest[0].name.startswith(f"model.layers.{BLOCKS - 1}.") and all(one.bits == 4 for one in finished.newest)
    assert any(one.tokens for one in watched([done])[0].newest)
    errors = [one.error or 0.0 for one in finished.largest]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0
    assert finished.bytes_per_second is None or finished.bytes_per_second > 0


def test_rates_are_those_of_the_last_commits(begun: Callable[..., Path]) -> None:
    out = begun()
    # One that took an hour, then two seconds each.
    times = [0.0, 3600.0, *(3600.0 + 2 * i for i in range(1, 12))]
    lines = b"".join(line(out, i, at, [record(f"l{i}", i)]) for i, at in enumerate(times))
    (out / STATE_FOLDER / JOURNAL_NAME).write_bytes(lines)
    (job,) = watched([out])
    assert job.bytes_per_second == pytest.approx(500) and job.blocks_per_hour == pytest.approx(1800)
    assert [one.name for one in job.newest[:2]] == ["l12", "l11"] and job.largest[0].error == 12
    (out / STATE_FOLDER / JOURNAL_NAME).write_bytes(lines.splitlines(keepends=True)[0])
    assert watched([out])[0].blocks_per_hour is None


@pytest.mark.parametrize("damage", [[None], ["x"], [{}], [{"name": 3, "bits": "x", "relative_error": "NaN", "tokens": -1}]])
def test_records_may_hold_anything(damage: list[Any], begun: Callable[..., Path]) -> None:
    out = begun(facts={"blocks": "x", "phase": 3, "eta_seconds": -1})
    (out / STATE_FOLDER / JOURNAL_NAME).write_bytes(line(out, 0, 0.0, damage) + b"torn")
    jobs = watched([out])
    assert jobs[0].state == "failed" and jobs[0].largest == []
    assert "1 of 2 lines are damaged" in render(jobs, 5) or damage[0] is None or damage == ["x"]
    assert "bigq_damaged_records" in metrics(jobs)
    json.dumps(jobs[0].to_json(), allow_nan=False)


class Elements(html.parser.HTMLParser):
    """The elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_names_and_records_become_no_markup_and_no_metric(begun: Callable[..., Path]) -> None:
    folder = begun(HOSTILE.replace("/", "\u2215"), {"said": HOSTILE, "phase": HOSTILE, "blocks": 3}, host=HOSTILE, at=HOSTILE)
    (folder / STATE_FOLDER / JOURNAL_NAME).write_bytes(line(folder, 0, 0.0, [record(HOSTILE, 0.5)]))
    jobs = watched([folder, Path(f"{HOSTILE}\nbigq_blocks 7")])
    text = render(jobs, 5)
    assert "\u202e" not in text and "\x1b" not in text
    elements = Elements(text).found
    assert not {tag for tag, _ in elements} & {"script", "img", "a", "link", "iframe", "object", "form"}
    assert not any(key.startswith("on") or key in ("href", "src", "style") for _, attrs in elements for key in attrs)
    assert text.count("&lt;script&gt;") >= 4
    sample = re.compile(r'bigq_\w+\{out="(?:[^"\\\n]|\\\\|\\")*"(?:,state="[a-z ]+")?\} [-+.e\d]+')
    for each in metrics(jobs).splitlines():
        assert each.startswith("# ") or sample.fullmatch(each), each


def test_metrics_have_the_states_and_figures_of_all_jobs(done: Path) -> None:
    jobs = [*watched([done]), WatchedJob(out="b", state="waiting")]
    lines = metrics(jobs).splitlines()
    assert f'bigq_blocks_done{{out="{done}"}} {BLOCKS}' in lines
    assert f'bigq_job_state{{out="{done}",state="finished"}} 1' in lines and f'bigq_job_state{{out="{done}",state="failed"}} 0' in lines
    assert 'bigq_job_state{out="b",state="waiting"} 1' in lines and 'bigq_linears{out="b"} 0' in lines
    assert not any(each.startswith('bigq_blocks{out="b"') for each in lines), "unknown values have no line"
    for job in jobs:
        assert sum(each.endswith("} 1") for each in lines if f'bigq_job_state{{out="{job.out}"' in each) == 1
        assert job.state in metrics_module.STATES
    typed = {each.split()[2] for each in lines if each.startswith("# TYPE")}
    assert {each.partition("{")[0] for each in lines if not each.startswith("#")} == typed


def test_the_server_answers_this_machine_only(served: Server) -> None:
    assert served.server_address[0] == "127.0.0.1" and served.url.startswith("http://127.0.0.1:")
    for path, kind in (("/", "text/html"), ("/status.json", "application/json"), ("/metrics", "text/plain")):
        response, text = ask(served, path)
        assert response.status == 200 and text and str(response.getheader("Content-Type")).startswith(kind)
        assert str(response.getheader("Content-Security-Policy")).startswith("default-src 'none'; style-src 'unsafe-inline'; frame-anc")
        assert response.getheader("Cache-Control") == "no-store" and response.getheader("X-Content-Type-Options") == "nosniff"
    assert [job["state"] for job in json.loads(ask(served, "/status.json?x=1")[1])["jobs"]] == ["finished", "not begun"]
    assert '<meta http-equiv="refresh" content="5">' in ask(served, "/", host=f"localhost:{served.server_address[1]}")[1]
    # A page of another site that has its name point here.
    for host in ("evil.example", f"evil.example:{served.server_address[1]}", "127.0.0.1.evil.example:80", ""):
        response, text = ask(served, "/", host=host)
        assert response.status == 403 and "finished" not in text
    assert ask(served, "/../etc/passwd")[0].status == 404
    assert ask(served, "/", "HEAD")[1] == "" and ask(served, "/", "POST")[0].status == 501


def test_a_port_in_use(served: Server, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = served.server_address[1]
    with pytest.raises(ResourceError, match=rf"--port {port}: cannot be listened on \(address already in use\); name another port"):
        Server([done], port, 5)
    with Server([done], 0, 5) as other:
        assert other.server_address[1] not in (0, port), "the advice works"
    assert main(["serve", str(done), "--port", str(port)]) == 4
    assert main(["serve", str(done), "--port", "70000"]) == 2
    assert main(["serve", str(done), "--refresh", "0"]) == 2
    assert "--refresh 0: must be whole seconds from 1 to 3600" in capsys.readouterr().err


def test_what_is_no_job_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with pytest.raises(UsageError, match="holds no job of bigq"):
        require_places([tmp_path])
    with pytest.raises(UsageError):
        require_places([tmp_path / "x"])
    require_places([tmp_path / "nothing yet"])


def test_records_are_read_once_for_many_who_look(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    monkeypatch.setattr("bigq.live.server.watched", lambda places: calls.append(time.monotonic()) or [])
    for _ in range(5):
        ask(served, "/metrics")
    assert len(calls) <= 1 + (calls[-1] - calls[0] > 1.0)


def test_it_ends_quietly_with_ctrl_c(done: Path) -> None:
    command = [sys.executable, "-m", "bigq", "serve", str(done), "--port", "0"]
    listened = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and passes that on
    try:
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, listened)
    with server:
        assert server.stdout is not None and server.stdout.readline().startswith("http://127.0.0.1:")
        time.sleep(0.5)
        server.send_signal(signal.SIGINT)
        try:
            _, said = server.communicate(timeout=20)
        finally:
            server.kill()
    assert (server.returncode, said) == (0, "")


def test_it_begins_without_torch(done: Path, child: Child) -> None:
    program = "import sys, bigq.cli.live, bigq.live.server\nprint([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert child("-c", program).stdout.strip() == "[]"


def test_status_is_watched_until_the_job_ends(
    begun: Callable[..., Path], done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    out = begun(host="elsewhere", outcome=None)
    seen: list[float] = []

    def later(seconds: float) -> None:
        seen.append(seconds)
        assert len(seen) < 9, "it goes on for ever"
        if len(seen) == 2:
            owner = out / STATE_FOLDER / OWNER_NAME
            owner.write_text(json.dumps({**json.loads(owner.read_text()), "outcome": "stopped"}))

    monkeypatch.setattr("bigq.cli.live.pause", later)
    assert main(["status", str(out), "--watch", "--json"]) == 0
    assert [json.loads(each)["state"] for each in capsys.readouterr().out.splitlines()] == ["unknown", "unknown", "stopped"]
    assert main(["status", str(done), "--watch"]) == 0 and len(seen) == 2
