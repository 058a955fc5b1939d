"""Text generation with a model, original or quantized, that fits the device: transformers' ``generate`` on a model that bigq loads.

Every token is the most likely one unless a temperature or a top-p is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigq.data.tokenizer import load_tokenizer
from bigq.errors import CalibrationError, CheckpointError, ResourceError, UsageError
from bigq.infer.load import load_resident, stored_bytes
from bigq.infer.options import GenerateConfig
from bigq.infer.streamer import Streamer
from bigq.io.hub import resolve_model
from bigq.io.json_file import read_json_object, show_name
from bigq.machine.device import choose_device
from bigq.machine.memory import hold_heap
from bigq.model import skeleton
from bigq.model.architecture import max_positions
from bigq.model.pager import Pager
from bigq.progress.sizes import show_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The result of a generation.

    text: without the prompt. load_seconds, prompt_seconds (up to the first token), seconds (of the other tokens).
    weight_bytes: of the model on the device.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    load_seconds: float
    prompt_seconds: float
    seconds: float
    weight_bytes: int

    def summary(self) -> str:
        """One line for a person."""
        rate = f"{(self.new_tokens - 1) / self.seconds:.1f} tokens/s" if self.new_tokens > 1 and self.seconds > 0 else "–"
        return (
            f"{self.new_tokens} tokens, {rate}; {self.prompt_tokens} tokens of prompt in {self.prompt_seconds:.2f} s; "
            f"{show_size(self.weight_bytes)} of weights loaded in {self.load_seconds:.1f} s"
        )


def generate(
    model: str | Path,
    prompt: str,
    config: GenerateConfig | None = None,
    *,
    write: Callable[[str], None] = lambda text: None,
    say: Callable[[str], None] = lambda line: None,
) -> Generation:
    """Continue a prompt with a model, original or quantized.

    write: receives the text piece by piece while it is generated. say: receives warnings.
    Raises UsageError (an empty or too long prompt, no chat template), ResourceError where the model does not fit the device, and
    CheckpointError or UnsupportedModelError for the model's folder.
    """
    config = config or GenerateConfig()
    if not prompt.strip():
        raise UsageError("--prompt: is empty; give some text for the model to continue")
    device = choose_device(config.device)
    folder = resolve_model(str(model))
    hold_heap()
    skeleton.silence_transformers()
    started = time.monotonic()
    try:
        with torch.no_grad():
            pager = Pager(folder, device=device, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
            tokenizer = _tokenizer(folder, config)
            ids = _prompt_ids(tokenizer, prompt, config, folder)
            room = _room(ids, pager, config)
            model_on_device: Any = load_resident(pager, tokens=len(ids) + room, say=say)
            loaded = time.monotonic()
            streamer = Streamer(tokenizer, write)
            torch.manual_seed(config.seed)
            given = torch.tensor([ids], device=device)
            model_on_device.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=room,
                streamer=streamer,
                **_end_tokens(folder, tokenizer),
                **config.sampling,
            )
            ended = time.monotonic()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(f"{device}: out of memory while generating; use fewer --max-new-tokens, or --device cpu") from error
    first = streamer.first or ended
    return Generation(
        text=streamer.text,
        prompt_tokens=len(ids),
        new_tokens=streamer.count,
        load_seconds=loaded - started,
        prompt_seconds=first - loaded,
        seconds=ended - first,
        weight_bytes=stored_bytes(model_on_device),
    )


def _tokenizer(folder: Path, config: GenerateConfig) -> Any:
    try:
        return load_tokenizer(folder, trust_remote_code=config.trust_remote_code)
    except CalibrationError as error:
        raise CheckpointError(f"{str(error).partition(';')[0]}; generating needs a tokenizer: add its files to the folder") from error


def _prompt_ids(tokenizer: Any, prompt: str, config: GenerateConfig, folder: Path) -> list[int]:
    if config.chat and not getattr(tokenizer, "chat_template", None):
        raise UsageError(f"--chat: the tokenizer of {folder} has no chat template; leave --chat out")
    # Templates are programs that come with the model, and even tokenizers that load may be invalid: both may raise any exception.
    try:
        if config.chat:
            message = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        else:
            ids = tokenizer(prompt).input_ids
    except Exception as error:
        said = show_name(" ".join(str(error).split())[:200])
        raise CheckpointError(f"{folder}: its tokenizer fails on the prompt ({type(error).__name__}: {said}); fetch it again") from error
    if not ids:
        raise UsageError("--prompt: the tokenizer turns it into no tokens; give some text for the model to continue")
    return ids


def _room(ids: list[int], pager: Pager, config: GenerateConfig) -> int:
    """The maximum number of tokens after the prompt."""
    vocabulary = pager.embedding.num_embeddings
    if max(ids) >= vocabulary:
        raise CheckpointError(
            f"{pager.folder}: its tokenizer gives token {max(ids)}, but the model has {vocabulary}; fetch the tokenizer of this model"
        )
    limit = max_positions(pager.config)
    if limit is None:
        return config.max_new_tokens
    if len(ids) >= limit:
        raise UsageError(f"--prompt: has {len(ids)} tokens, but the model has {limit} positions; give a shorter one")
    return min(config.max_new_tokens, limit - len(ids))


def _end_tokens(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """The tokens that end a text: from generation_config.json, else from config.json, else from the tokenizer."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        said = read_json_object(path).get("eos_token_id") if path.exists() else None
        ends = said if isinstance(said, list) else [said]
        if ends and all(type(end) is int for end in ends):
            return {"eos_token_id": ends, "pad_token_id": ends[0]}
    end = tokenizer.eos_token_id
    return {} if end is None else {"eos_token_id": [end], "pad_token_id": end}
