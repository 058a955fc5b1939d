#!/usr/bin/env python3
"""Open the page of ``bigq serve`` in Chromium while a job runs, with a folder beside it whose name and records hold markup.

    python scripts/check_live_page.py [--browser chromium] [--json docs/results/live_page.json] [--picture docs/live.png]

The browser must show the running job with its Linears, and nothing of the markup may have become an element or have run. Nothing may
listen on an address of this host but the loopback one. Exit status: 1 if any of this fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from facts import revision, versions

MODEL = ROOT / "bigq/assets/tiny-llama"
#: What a record may try: each changes the title, or asks for a file, if it becomes part of the page.
HOSTILE = "<script>document.title='owned'</script>\"'><img src=x onerror=\"document.title='owned'\">"
LIMIT = 120.0


class Elements(HTMLParser):
    """How many elements of each kind a page has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.title = ""
        self._in_title = False
        self.feed(text)

    def handle_starttag(self, tag: str, _: object) -> None:
        self.counts[tag] += 1
        self._in_title = tag == "title"

    def handle_data(self, data: str) -> None:
        self.title += data if self._in_title else ""
        self._in_title = False


def hostile_folder(work: Path) -> Path:
    """A job that failed, whose every text is markup."""
    out = work / HOSTILE.replace("/", "\u2215")
    state = out / ".bigq"
    state.mkdir(parents=True)
    about = {"token": "t", "host": HOSTILE, "machine": "m", "pid": 1, "started": 0, "beat": 1, "at": HOSTILE, "outcome": "failed"}
    (state / "owner.json").write_text(json.dumps({**about, "facts": {"said": HOSTILE, "phase": HOSTILE, "blocks": 9}}))
    return out


def browse(browser: str, work: Path, url: str, *options: str) -> str:
    """What the browser prints."""
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={work / 'profile'}", *options, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True).stdout


def jobs_at(url: str) -> list[dict[str, object]]:
    with urllib.request.urlopen(f"{url}status.json", timeout=10) as response:
        found: list[dict[str, object]] = json.load(response)["jobs"]
        return found


@contextlib.contextmanager
def bigq(work: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of bigq, which ends with the context."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bigq", *arguments]
    with subprocess.Popen(command, cwd=work, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


@contextlib.contextmanager
def served(work: Path, *places: str) -> Iterator[str]:
    """The address of a server for these places."""
    with bigq(work, "serve", *places, "--port", "0") as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()


def check(browser: str, picture: Path, work: Path) -> dict[str, object]:
    """The facts of one look at the page."""
    whole, running, hostile = "tiny-llama-3bit", "tiny-llama-4bit", hostile_folder(work).name
    job = [
        "quantize",
        str(MODEL),
        "--calibration",
        "builtin",
        "--samples",
        "512",
        "--seqlen",
        "256",
        "--quality",
        "best",
        "--device",
        "cpu",
    ]
    with bigq(work, "quantize", str(MODEL), whole, "--method", "rtn", "--bits", "3", "--quiet") as first:
        first.wait(LIMIT)
    with bigq(work, *job[:2], running, *job[2:], "--quiet"), served(work, running, whole) as url, served(work, running, hostile) as other:
        until = time.monotonic() + LIMIT
        while jobs_at(url)[0]["linears"] == 0 and time.monotonic() < until:
            time.sleep(0.05)
        browse(browser, work, url, f"--screenshot={picture.resolve()}", "--window-size=1000,1020", "--hide-scrollbars")
        dom = browse(browser, work, other, "--dump-dom")
        elements, port = Elements(dom), int(other.rstrip("/").rpartition(":")[2])
        return {
            "title": elements.title,
            "dangerous_elements": {tag: elements.counts[tag] for tag in ("script", "img", "iframe", "object", "a", "link", "form")},
            "tables": elements.counts["table"],
            "shows_linears": "self_attn" in dom or "mlp" in dom,
            "shows_markup_as_text": "&lt;script&gt;" in dom,
            "state_of_the_job": jobs_at(other)[0]["state"],
            "answers_on_loopback": answers("127.0.0.1", port),
            "answers_on_another_address": [address for address in other_addresses() if answers(address, port)],
            "other_addresses": len(other_addresses()),
        }


def other_addresses() -> list[str]:
    """Addresses of this host besides the loopback one."""
    found = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split()
    return [address for address in found if not address.startswith("127.")]


def answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", default="chromium")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, default=Path("live.png"))
    args = parser.parse_args()
    browser = shutil.which(args.browser)
    if browser is None:
        raise SystemExit(f"--browser {args.browser}: is not installed")
    with tempfile.TemporaryDirectory() as work:
        found = check(browser, args.picture, Path(work))
    said = subprocess.run([browser, "--version"], capture_output=True, text=True, check=True).stdout.split()
    result = {
        "command": "python scripts/check_live_page.py --json docs/results/live_page.json --picture docs/live.png",
        "revision": revision(ROOT),
        "versions": {**versions(), "chromium": next((word for word in said if word[:1].isdigit()), "")},
        **found,
    }
    print(json.dumps(result, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    dangerous = found["dangerous_elements"]
    assert isinstance(dangerous, dict)
    sound = found["title"] == "bigq jobs, live" and not any(dangerous.values()) and found["shows_linears"] and found["shows_markup_as_text"]
    return 0 if sound and found["answers_on_loopback"] and not found["answers_on_another_address"] else 1


if __name__ == "__main__":
    sys.exit(main())
