"""Every message with advice: the advice is followed by program, and the next run passes that point."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from advice_cases import OPTION_CASES
from batch_cases import BATCH_CASES
from checkpoint_cases import CHECKPOINT_CASES
from folder_cases import FOLDER_CASES
from follow import followed, line
from messages import ADVICE, matcher, templates
from models import make_checkpoint, rewrite, stored_tensors
from not_followed import NO_MESSAGE, NOT_FOLLOWED
from place import Case, Place
from text_cases import TEXT_CASES

from bigq.cli.main import main
from bigq.errors import BigqError
from bigq.machine.ceilings import Ceilings
from bigq.sched.plan import inputs

CASES = (*OPTION_CASES, *CHECKPOINT_CASES, *TEXT_CASES, *FOLDER_CASES, *BATCH_CASES)
#: Llamas of one block: a plain one, one whose head is the embedding, and one with sizes that are no multiples of 32.
SPECIAL: Mapping[str, dict[str, Any]] = {
    "small": {},
    "tied": {"tie_word_embeddings": True},
    "odd": {"hidden_size": 40, "intermediate_size": 72},
}
TESTS = Path(__file__).resolve().parents[1]
_measure = inputs.measure


@cache
def measured(device: torch.device) -> Ceilings:
    """The speed of the machine, in fp32: products in fp16 take a CPU seconds."""
    return _measure(device, torch.float32)


@pytest.fixture(scope="module")
def done(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job: 4 bits, asymmetric, gptq_v2. Some zero points are 0, which gptq cannot hold."""
    source = shutil.copytree(checkpoint("llama"), tmp_path_factory.mktemp("done") / "model")
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(source, name, stored_tensors(source)[name].abs() + 0.01)
    out = source.parent / "out"
    words = line(
        "quantize {source} {out} --method rtn --device cpu --group-size 32 --asym --format gptq_v2 --quiet", source=source, out=out
    )
    assert main(words) == 0
    return out


@pytest.fixture(scope="module")
def original(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's model, or one of ``SPECIAL``."""

    @cache
    def make(family: str) -> Path:
        if family not in SPECIAL:
            return checkpoint(family)
        return make_checkpoint(tmp_path_factory.mktemp(family) / "original", "llama", num_hidden_layers=1, **SPECIAL[family])

    return make


@pytest.fixture(autouse=True)
def one_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan measures the speed of the machine; once is enough here."""
    monkeypatch.setattr(inputs, "measure", lambda device, dtype: measured(device))


@pytest.fixture
def place(request: pytest.FixtureRequest, original: Callable[[str], Path], ids_file: Path, done: Path, tmp_path: Path) -> Place:
    case: Case = request.param
    source = original(case.family)
    model = Path(shutil.copytree(source, tmp_path / "model"))
    return Place(model=model, out=tmp_path / "out", tmp=tmp_path, ids=ids_file, original=source, done=done)


Command = list[str] | Callable[[], object]


def refusal(command: Command, capsys: pytest.CaptureFixture[str]) -> str | None:
    """The error that a command or a call ends with."""
    if not isinstance(command, list):
        try:
            command()
        except BigqError as error:
            return str(error)
        return None
    capsys.readouterr()
    code = main(list(map(str, command)))
    told = capsys.readouterr().err
    found = [text for text in told.splitlines() if re.match(r"bigq[\w ]*: error: ", text)]
    assert (code == 0) == (not found), told
    return re.sub(r"^bigq[\w ]*: error: ", "", found[0]) if found else None


def advised(place: Place, case: Case, command: Command, said: str) -> list[Command]:
    """What to run next: commands that the message gives, or after what was done about it, what ``follow`` returns or the same again."""
    if case.follow is None:
        assert isinstance(command, list)
        return list(followed(command, said))
    found = case.follow(place)
    if callable(found):
        return [found]
    if isinstance(found, list) and found and isinstance(found[0], list):
        return found
    return [found if isinstance(found, list) and found and isinstance(found[0], str) else command]


@pytest.mark.long
@pytest.mark.parametrize(
    ("place", "case"), [(case, case) for case in CASES], indirect=["place"], ids=lambda case: getattr(case, "says", "")[:50]
)
def test_the_next_run_passes(place: Place, case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if case.damage is not None:
        case.damage(place)
    for name, value in case.limits:
        monkeypatch.setattr(name, value)
    command: Command = line(case.made, **vars(place)) if isinstance(case.made, str) else partial(case.made, place)
    with monkeypatch.context() as first:
        for name, value in case.faults:
            first.setattr(name, value)
        said = refusal(command, capsys)
    assert said is not None and matcher(case.says).search(said), said
    commands = advised(place, case, command, said)
    assert commands, f"nothing to do is found in: {said}"
    for each in commands:
        again = refusal(each, capsys)
        assert again is None or (case.then is not None and re.search(case.then, again)), f"{said}\n→ {each}\n→ {again}"
        shutil.rmtree(place.out, ignore_errors=True)


def test_every_message_with_advice_has_a_case_or_a_reason() -> None:
    """Of a new message with advice: add a case to advice_cases.py, or a reason to not_followed.py."""
    found = templates()
    known = {case.says for case in CASES}
    reasons = [text for left in NOT_FOLLOWED for text in left.messages]
    pieces = known - set(found)
    missing = [
        f"{where}: {text}"
        for text, where in found.items()
        if text not in reasons and text not in known and not any(_of(says, text) for says in pieces)
    ]
    assert not missing, "\n".join(missing)
    twice = [text for text in reasons if text in known]
    assert not twice, "these have cases:\n" + "\n".join(twice)
    gone = [text for text in reasons if text not in found] + [says for says in pieces if not any(_of(says, text) for text in found)]
    assert not gone, "no message is like this any more:\n" + "\n".join(gone)


@pytest.mark.parametrize("named", sorted({name for left in NOT_FOLLOWED for name in left.tests}))
def test_the_tests_that_follow_elsewhere_are_there(named: str) -> None:
    path, _, function = named.partition("::")
    tree = ast.parse((TESTS / path).read_text())
    assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], named


def test_every_reason_but_one_names_a_test() -> None:
    assert [left.reason for left in NOT_FOLLOWED if not left.tests] == [NO_MESSAGE]


def _of(says: str, template: str) -> bool:
    """Whether a case's piece means the template: the whole of a short one, or a part of a long one."""
    return says == template or (len(says) > 25 and says in template)


def test_the_search_finds_advice() -> None:
    assert ADVICE.search("{}: is wrong; use --other") and ADVICE.search("use --scale-bits {}") and not ADVICE.search("a wrong thing")
    assert len(templates()) > 150


@pytest.mark.parametrize(
    ("words", "message", "expected"),
    [
        ("x --a 1", "--a 1: bad; use --a 2, or leave out --a", ["x --a 2", "x"]),
        ("x --rule p:bits=8", "--rule 'p:bits=8': matches none; use '.*p'", ["x --rule .*p:bits=8"]),
        ("x --skip p --skip q", "--skip 'q': no effect; leave it out", ["x --skip p"]),
        (
            "x --rule p:bits=8 --rule q:bits=3",
            "--rule 'q:bits=3': no; give it first, or leave it out",
            ["x --rule q:bits=3 --rule p:bits=8", "x --rule p:bits=8"],
        ),
        ("x --dev z", "--dev z: no; use auto, cpu or cuda:0", ["x --dev auto", "x --dev cpu", "x --dev cuda:0"]),
        ("x", "q is wrong; use --skip 'a$' and --group-size 32", ["x --skip a$ --group-size 32"]),
        ("x --rule p:group_size=3", "q is wrong; use group_size=8 in --rule 'p:group_size=3'", ["x --rule p:group_size=8"]),
        ("x --len 1", "--len 1: short; use 2 or more", ["x --len 2"]),
    ],
)
def test_advice_is_read(words: str, message: str, expected: list[str]) -> None:
    assert [" ".join(found) for found in followed(words.split(), message)] == expected
