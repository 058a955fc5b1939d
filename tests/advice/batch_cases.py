"""Messages about files of settings and of jobs, and how each is made and followed."""

from __future__ import annotations

from follow import line
from place import Act, Case, Place, begun

PLAN_FILE = "plan {model} --seqlen 16 --device cpu --group-size 32 --config {tmp}/file.yaml"
BATCH = "batch {tmp}/file.yaml"
#: A job that is refused for another reason, so that none is run.
NOWHERE = "{model: ./nowhere, out: o"


def file(text: str) -> Act:
    def write(place: Place) -> None:
        (place.tmp / "file.yaml").write_text(text.format(**vars(place)))

    return write


def corrected(command: str, text: str) -> Act:
    """The same command with another file."""

    def follow(place: Place) -> list[str]:
        (place.tmp / "file.yaml").write_text(text)
        return line(command, **vars(place))

    return follow


BATCH_CASES = (
    Case("{}: is no name here; write {}: false", PLAN_FILE, file("asym: true"), corrected(PLAN_FILE, "sym: false")),
    Case("{}: {} may mean an octal number; write it without the zeros in front", PLAN_FILE, file("samples: 04"),
         corrected(PLAN_FILE, "samples: 4")),
    Case("; see bigq quantize --help", PLAN_FILE, file("colour: red\nsamples: 4"), corrected(PLAN_FILE, "samples: 4")),
    Case(
        "{}: is a file of several jobs; run bigq batch {}",
        PLAN_FILE,
        file("jobs: [" + NOWHERE.replace("{", "{{") + "}}]"),
        lambda p: line(BATCH, **vars(p)),
        then="no such folder",
    ),
    Case(
        "{}: holds no jobs; write them under jobs: or matrix:, or run bigq quantize --config {}",
        BATCH,
        file("{{model: {model}, out: {out}, method: rtn, group-size: 32, device: cpu, quiet: true}}"),
        lambda p: line("quantize --config {tmp}/file.yaml", **vars(p)),
    ),
    Case(
        "{}: line {}: out: {{}} stands for nothing; use {model} and {settings}",
        BATCH,
        file("matrix: {{models: [./nowhere], settings: {{a: {{}}}}, out: 'o/{{name}}'}}"),
        corrected(BATCH, "matrix: {models: [./nowhere], settings: {a: {}}, out: 'o/{model}-{settings}'}"),
        then="no such folder",
    ),
    Case(
        "{}: neither {} is set; give a number",
        BATCH + " --index auto",
        file("jobs: [" + NOWHERE.replace("{", "{{") + "}}]"),
        lambda p: line(BATCH + " --index 0", **vars(p)),
        then="no such folder",
    ),
    Case(
        "--html {}: is the file of jobs itself; name another",
        "status {tmp}/file.yaml --html {tmp}/file.yaml",
        file("jobs: [" + NOWHERE.replace("{", "{{") + "}}]"),
        lambda p: line("status {tmp}/file.yaml --html {tmp}/page.html", **vars(p)),
    ),
    Case("--html {}: {} is no file of jobs; run bigq report {}", "status {out} --html {tmp}/page.html", begun,
         lambda p: line("report {out}", **vars(p))),
)  # fmt: skip
