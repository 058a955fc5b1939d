"""Records as documents: conversations give exactly the ids of the tokenizer's own chat template; other fields; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import MARKS, ids_of, save_lines, tokenizer_folder, words
from torch import Tensor
from transformers import AutoTokenizer

from bigq.calibration import calibration_rows, evaluation_rows, read_calibration
from bigq.data.given import calibration_source
from bigq.data.records import Conversation, document
from bigq.errors import CalibrationError

SAID = [[("system", ids_of(3, 9 * i)), ("user", ids_of(5, 50 * i)), ("assistant", ids_of(7, 90 * i))] for i in range(12)]
OPENAI = [[{"role": role, "content": words(ids)} for role, ids in said] for said in SAID]
SHAREGPT = [
    [{"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": words(ids), "weight": 0} for role, ids in said]
    for said in SAID
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With <s> before every text, and in the template."""
    return tokenizer_folder(tmp_path_factory.mktemp("chat"), bos=True, chat=True)


@pytest.fixture(scope="module")
def without_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("plain"), bos=True)


def all_ids(source: Any, model: Path, **changes: Any) -> list[int]:
    """All tokens in order."""
    rows = evaluation_rows(str(source) if isinstance(source, Path) else source, model, seqlen=1, samples=None, **changes)
    return [int(i) for i in rows.flatten()]


def templated(conversations: list[list[dict[str, Any]]], model: Path) -> list[int]:
    """What the tokenizer itself makes of conversations."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [i for each in conversations for i in tokenizer.apply_chat_template(each, tokenize=True, return_dict=True)["input_ids"]]


@pytest.mark.parametrize("field", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize("form", ["openai", "sharegpt"])
def test_conversations_are_written_by_the_chat_template(form: str, field: str, tmp_path: Path, model: Path) -> None:
    """Special tokens once; roles under the template's names; not the JSON, and not the words alone."""
    records = [{"id": "w7", field: said} for said in (OPENAI if form == "openai" else SHAREGPT)]
    found = all_ids(save_lines(tmp_path / "t.txt", records), model)
    assert found == templated(OPENAI, model)
    assert found == [i for said in SAID for i in [1, *(i for role, ids in said for i in [MARKS[role], *ids])]]


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        ({"prompt": "w3", "completion": "w4"}, ["w3"]),
        ({"prompt": [{"role": "user", "content": "w3"}], "completion": [{"role": "assistant", "content": "w4"}]}, ["w3"]),
        ({"prompt": "w3", "response": "w4"}, ["w3"]),
        ({"instruction": "w3", "output": "w4"}, ["w3"]),
        ({"instruction": "w3", "input": "", "output": "w4"}, ["w3"]),
        ({"instruction": "w3", "input": "w5", "output": "w4"}, ["w3", "w5"]),
        ({"instruction": "w3", "context": "w5", "response": "w4"}, ["w3", "w5"]),
    ],
)
def test_questions_and_answers_are_conversations(record: dict[str, Any], asked: list[str], tmp_path: Path, model: Path) -> None:
    found = all_ids(save_lines(tmp_path / "t.jsonl", [record] * 2), model)
    assert found == templated([[{"role": "user", "content": "\n\n".join(asked)}, {"role": "assistant", "content": "w4"}]] * 2, model)


def test_a_text_comes_before_messages(tmp_path: Path, model: Path) -> None:
    assert all_ids(save_lines(tmp_path / "t.jsonl", [{"messages": OPENAI[0], "text": "w5 w6"}]), model) == [1, 5, 6]


def test_a_named_field(tmp_path: Path, model: Path) -> None:
    """Of strings or of messages; it comes before all others."""
    path = save_lines(tmp_path / "t.txt", [{"text": "w3", "body": "w5 w6", "chosen": OPENAI[i]} for i in range(3)])
    assert all_ids(path, model, text_field="body") == [1, 5, 6] * 3
    assert all_ids(path, model, text_field="chosen") == templated(OPENAI[:3], model)
    with pytest.raises(CalibrationError, match=r"line 1: has no field 'boddy' \(it has text, body, chosen\)"):
        all_ids(path, model, text_field="boddy")


def test_tools_and_empty_parts_reach_the_template(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "m", chat=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% if tools %}{{ tools[0].function.name }} {% endif %}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    messages = [
        {"role": "user", "content": "w3", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w9"}}]},
        {"from": "observation", "value": "w4"},
    ]
    path = save_lines(tmp_path / "t.jsonl", [{"messages": messages, "tools": [{"function": {"name": "w8"}}]}])
    assert all_ids(path, folder) == [8, 1, 11, 3, 12, 13, 4]


@pytest.mark.parametrize("name", ["messages", "lists of messages", "prompts", "named", "generator"])
def test_conversations_given_in_python(name: str, tmp_path: Path, model: Path) -> None:
    """The same rows as from a file that holds them."""
    given: Any = {
        "messages": [{"messages": each} for each in OPENAI],
        "lists of messages": OPENAI,
        "prompts": [{"prompt": each[:-1], "completion": each[-1:]} for each in OPENAI],
        "named": [{"id": 3, "chosen": each} for each in OPENAI],
        "generator": ({"conversations": each} for each in SHAREGPT),
    }[name]
    field = "chosen" if name == "named" else None
    sizes: dict[str, Any] = {"samples": 4, "seqlen": 16, "seed": 3}
    found = calibration_rows(calibration_source(given, "calibration"), model, **sizes, text_field=field)
    path = save_lines(tmp_path / "t.jsonl", [{"messages": each} for each in OPENAI])
    assert torch.equal(found, calibration_rows(str(path), model, **sizes))


@pytest.mark.parametrize("parts", [1, 2])
def test_contents_in_parts_are_text_to_templates_that_take_strings(parts: int, tmp_path: Path, model: Path) -> None:
    """Many templates would write the Python form of a list into the text."""

    def cut(content: str) -> list[Any]:
        said = content.split()
        return [{"type": "text", "text": " ".join(said[i::parts])} for i in range(parts)]

    records = [{"messages": [{**message, "content": cut(message["content"])} for message in each]} for each in OPENAI]
    joined = [[{**m, "content": "\n".join(part["text"] for part in m["content"])} for m in record["messages"]] for record in records]
    assert all_ids(save_lines(tmp_path / "t.jsonl", records), model) == templated(joined, model)


def test_the_date_of_a_template_is_always_the_same(tmp_path: Path) -> None:
    """Templates such as Llama 3.2's write today's date. A job that is resumed on another day needs the same rows."""
    folder = tokenizer_folder(tmp_path / "m", bos=True, chat=True)
    template = folder / "chat_template.jinja"
    template.write_text("w{{ strftime_now('%j') | int + 3 }} w{{ strftime_now('%y') }} " + template.read_text())
    path = save_lines(tmp_path / "t.jsonl", [{"messages": OPENAI[0]}])
    assert all_ids(path, folder)[:2] == [4, 25]


def test_ids_beside_messages_are_taken_as_before(model: Path) -> None:
    """Datasets that were tokenized keep their other columns."""
    source = calibration_source([{"input_ids": ids_of(16, i), "messages": OPENAI[i]} for i in range(4)], "calibration")
    assert calibration_rows(source, model, samples=4, seqlen=16, seed=0).tolist() == [ids_of(16, i) for i in range(4)]


@pytest.mark.parametrize(
    ("records", "field"),
    [([{"messages": OPENAI[0], "prompt": "w3 w4 w5", "id": "w3"}], "prompt"), ([{"prompt": "w3", "completion": "w4 w5"}], "completion")],
)
def test_without_a_template_a_text_field_works(records: list[Any], field: str, tmp_path: Path, without_template: Path) -> None:
    path = save_lines(tmp_path / "t.jsonl", records)
    with pytest.raises(CalibrationError, match=r"line 1: is a conversation, but the tokenizer of .* has no chat template") as error:
        all_ids(path, without_template)
    assert str(path) in str(error.value) and str(error.value).endswith(f"--text-field {field}")
    assert len(all_ids(path, without_template, text_field=field)) >= 3


def test_without_a_template_and_without_text(tmp_path: Path, without_template: Path) -> None:
    path = save_lines(tmp_path / "t.jsonl", [{"messages": OPENAI[0], "n": 3, "id": "identity_7", "hash": "f" * 64}])
    with pytest.raises(CalibrationError, match="has no chat template; give other text, such as --calibration builtin"):
        all_ids(path, without_template)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": []}, "its conversation has no messages; remove the record"),
        ({"messages": [{"content": "w3"}]}, "message 1 has no role"),
        ({"messages": [{"role": "user", "content": 7}]}, "the content of message 1 is neither a string nor a list"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "w3"}, {"type": "image", "image": "a.png"}]}]},
            r"message 1: has a part that is no text \(image\); remove such parts, or the record",
        ),
        ({"prompt_id": "f" * 64, "chosen": [{"role": "user", "content": "w3"}]}, "holds the messages, such as --text-field chosen"),
        ({"messages": json.dumps(OPENAI[0])}, r"\(it has messages\); give records with a field 'text'"),
        ({"prompt_id": "f" * 64, "lang": "en"}, "give records with a field 'text', or name the field"),
        (
            {"messages": [{"role": "w3", "content": "w3"}]},
            r"the model's chat template refuses the conversation \(TemplateError: no such role\)",
        ),
        ({"messages": "w3 w4"}, r"has no field 'text', and no conversation \(it has messages\); .*--text-field messages"),
        ({"text": None}, "its field 'text' is no string"),
        ({}, r"\(it has no fields\); give records with a field 'text'"),
        ({"a b": "w3 w4"}, "--text-field 'a b'"),
    ],
)
def test_a_bad_record_is_named(record: dict[str, Any], said: str, tmp_path: Path, model: Path) -> None:
    path = save_lines(tmp_path / "t.jsonl", [{"text": "w3"}, record])
    with pytest.raises(CalibrationError, match=said) as error:
        all_ids(path, model)
    assert str(error.value).startswith(f"{path}, line 2: ") and str(error.value).isprintable()


def test_a_conversation_counts_its_characters() -> None:
    found = document({"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": None}]}, "here")
    assert isinstance(found, Conversation) and len(found) == 3


def test_what_was_made_is_counted(tmp_path: Path, model: Path) -> None:
    path = save_lines(tmp_path / "t.jsonl", [{"messages": each} for each in OPENAI] + [{"text": words(ids_of(19))}] * 3)
    (made,) = read_calibration(str(path), model, samples=6, seqlen=16, seed=0).made
    assert made.tokens == 12 * 19 + 3 * 20 and (made.documents, made.conversations, made.rows) == (15, 12, 6)
    assert made.text() == "t.jsonl: 6 rows from 288 tokens of 3 documents and 12 conversations by the chat template"
    assert json.loads(json.dumps(made.to_json()))["chat_template"] is True


def test_rows_of_conversations_depend_on_the_seed(tmp_path: Path, model: Path) -> None:
    path = save_lines(tmp_path / "t.jsonl", [{"messages": each} for each in OPENAI])
    one, same, other = (calibration_rows(str(path), model, samples=4, seqlen=16, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert isinstance(one, Tensor)
