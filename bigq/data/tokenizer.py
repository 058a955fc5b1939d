"""The model's tokenizer: loading it safely, and applying it to texts and, with its chat template, to conversations."""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigq.data.records import Conversation, Document, with_plain_contents
from bigq.errors import CalibrationError, CheckpointError
from bigq.io.json_file import read_json_object, show_name, show_value

#: Bytes of one tokenizer file; the largest published ones have 35 MB.
MAX_TOKENIZER_BYTES = 2**28


class Tokenizer:
    """The tokenizer of a model folder, loaded when it is first needed. Raises CalibrationError."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self._folder, self._trust = folder, trust_remote_code
        self._loaded: Any = None

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The token ids of a text. special: whether to add the special tokens that the tokenizer adds to texts."""
        tokenizer = self._tokenizer  # one that cannot be loaded has its own message
        try:
            ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
        except BaseException as error:  # as in load_tokenizer: files that load may still be damaged
            if not _is_failure(error):
                raise
            raise CalibrationError(
                f"the model's tokenizer fails on the text ({_reason(error)}); give token ids in a safetensors file"
            ) from error
        return ids

    def encode_document(self, document: Document) -> list[int]:
        """The token ids of a document on its own: a text with special tokens, or a conversation as the chat template writes it."""
        if isinstance(document, str):
            return self.encode(document, special=True)
        return self.encode(self.as_text(document), special=False)  # the template writes the special tokens

    def as_text(self, conversation: Conversation) -> str:
        """A conversation as the chat template writes it. Raises CalibrationError without a template, or where it refuses."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise CalibrationError(
                f"{conversation.where}: is a conversation, but the tokenizer of {self._folder} has no chat template; "
                f"{_without_template(conversation)}"
            )
        more = {"tools": list(conversation.tools)} if conversation.tools else {}
        # Templates are programs that come with the model, and may raise any exception.
        try:
            with _fixed_date():
                text = self._tokenizer.apply_chat_template(with_plain_contents(conversation.messages), tokenize=False, **more)
        except BaseException as error:
            if not _is_failure(error):
                raise
            raise CalibrationError(
                f"{conversation.where}: the model's chat template refuses the conversation ({_reason(error)}); "
                f"correct or remove it, or {_without_template(conversation)}"
            ) from error
        return str(text)

    @property
    def _tokenizer(self) -> Any:
        if self._loaded is None:
            self._loaded = load_tokenizer(self._folder, trust_remote_code=self._trust)
        return self._loaded


class _FixedDate(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return cls(2025, 1, 1, tzinfo=tz)


@contextlib.contextmanager
def _fixed_date() -> Iterator[None]:
    """Let chat templates take another date for today: with the real one a job could not be repeated, nor resumed after midnight.

    transformers takes no function for ``strftime_now``, so its clock is replaced.
    """
    from transformers.utils import chat_template_utils

    before = getattr(chat_template_utils, "datetime", None)
    chat_template_utils.datetime = _FixedDate
    try:
        yield
    finally:
        chat_template_utils.datetime = before


def _without_template(conversation: Conversation) -> str:
    if conversation.text_field is not None:
        return f"take one field of the records as text: --text-field {shlex.quote(conversation.text_field)}"
    return "give other text, such as --calibration builtin, or the text of each conversation in a field 'text'"


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder. Raises CalibrationError."""
    from transformers import AutoTokenizer

    _check_tokenizer(folder)
    # A damaged or missing tokenizer raises nearly any exception, depending on the tokenizer's class; a panic of its Rust part is not
    # even an Exception.
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise CalibrationError(
            f"{folder}: its tokenizer cannot be loaded ({_reason(error)}); add the tokenizer files, or give token ids in a safetensors file"
        ) from error
    tokenizer.model_max_length = 10**9
    return tokenizer


def _is_failure(error: BaseException) -> bool:
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {show_name(' '.join(str(error).split())[:200])}"


def _check_tokenizer(folder: Path) -> None:
    """Raise CalibrationError where tokenizer files are too large, or would make transformers open other files or run other code.

    transformers looks the tokenizer's class up by name among all that it exports, classes that unpickle or download included. It
    passes what tokenizer_config.json and special_tokens_map.json say to that class, paths of files included.
    """
    for path in folder.glob("*"):
        if path.suffix in (".json", ".model", ".txt", ".spm", ".jinja", ".vocab") and path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CalibrationError(f"{path}: is larger than the {MAX_TOKENIZER_BYTES} bytes that bigq reads of a tokenizer file")
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            values = read_json_object(path, repeats=True)
        except CheckpointError as error:
            raise CalibrationError(str(error)) from None
        if name != "special_tokens_map.json":
            _require_tokenizer_class(path, values.get("tokenizer_class"))
        if name != "config.json":
            _require_own_files(path, values)


def _require_tokenizer_class(path: Path, name: Any) -> None:
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
    from transformers.utils.import_utils import DummyObject

    if name is None:
        return
    if not isinstance(name, str) or not name.isidentifier():
        raise CalibrationError(f"{path}: tokenizer_class {show_value(name)} is not the name of a class; correct it")
    for spelling in (name, name.removesuffix("Fast"), name.removesuffix("Fast") + "Fast"):
        found = tokenizer_class_from_name(spelling)
        missing_package = isinstance(found, DummyObject)  # transformers names the package itself
        if found is not None and not missing_package and not (isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)):
            raise CalibrationError(f"{path}: tokenizer_class {show_value(name)} is not a tokenizer; correct it, or give token ids")


def _require_own_files(path: Path, values: Any) -> None:
    """Raise CalibrationError where a string in a JSON value is the path of an existing file outside the folder of ``path``."""
    left = [values]
    for value in left:
        if isinstance(value, (dict, list)):
            left.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, str) and 0 < len(value) < 4096 and "\0" not in value:
            with contextlib.suppress(OSError, ValueError):  # a string that is not a path
                if os.path.isfile(value) and path.parent.resolve() not in Path(os.path.abspath(value)).parents:
                    raise CalibrationError(f"{path}: names a file outside the model's folder, {show_value(value)}; remove the entry")
