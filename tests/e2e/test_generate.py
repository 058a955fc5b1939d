"""``bigq generate``: whole models, dense and packed, against transformers' own with the same weights; and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from models import logits_of, random_ids, reference_model, streamed_logits, word_tokenizer
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import bigq
from bigq.cli.main import main
from bigq.common_options import MAX_SEED
from bigq.config import JobConfig
from bigq.data.tokenizer import load_tokenizer
from bigq.errors import BigqError, CheckpointError, ResourceError, UsageError
from bigq.infer import load
from bigq.infer.generate import generate
from bigq.infer.options import GenerateConfig
from bigq.infer.packed_linear import PackedLinear
from bigq.infer.streamer import KEPT, WINDOW, Streamer
from bigq.scheme import QuantScheme, Rule

FAMILIES = ["llama", "qwen2", "opt", "bloom", "gpt2", "falcon"]
PROMPT = " ".join(f"w{i}" for i in (5, 9, 17, 30, 8, 44))

pytestmark = pytest.mark.usefixtures("one_thread")

Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A family's quantized model, rounded to nearest (which is enough here), with a tokenizer; made once for each setting."""
    folder = tmp_path_factory.mktemp("made")
    known: dict[Any, Path] = {}

    def make(family: str, bits: int = 4, **how: Any) -> Path:
        key = (family, bits, *sorted(map(str, how.items())))
        if key not in known:
            out = known[key] = folder / f"{family}-{len(known)}"
            scheme = QuantScheme(bits=bits, group_size=32, symmetric=how.pop("symmetric", True))
            config = JobConfig(scheme=scheme, calibration=str(ids_file), method="rtn", device="cpu", quiet=True, **how)
            bigq.quantize(str(checkpoint(family)), out, config)
            word_tokenizer(bos=True).save_pretrained(out)
        return known[key]

    return make


def dense_reference(quantized: Path, source: Path) -> nn.Module:
    """transformers' own model with the weights that bigq's codes stand for, read by itself from the folder."""
    model = reference_model(source)
    stored = bigq.load_model(quantized, device="cpu", dtype="float32", packed=False).state_dict()
    model.load_state_dict(stored)
    return model


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_dense_models_are_the_streamed_one(family: str, made: Made, checkpoint: Callable[[str], Path]) -> None:
    """Their logits are those of ``bigq eval``, and close to none of the source's."""
    out, ids = made(family, 3), random_ids(2)
    expected = streamed_logits(out, ids, 2)
    dense = bigq.load_model(out, device="cpu", packed=False)
    packed = bigq.load_model(out, device="cpu", packed=True)
    assert not packed_linears(dense) and len(packed_linears(packed)) >= 4
    assert not [name for model in (dense, packed) for name, p in model.named_parameters() if p.is_meta]
    assert torch.equal(logits_of(dense, ids, 2), expected)
    torch.testing.assert_close(logits_of(packed, ids, 2), expected, rtol=1e-4, atol=1e-4)
    source = logits_of(reference_model(checkpoint(family)), ids, 2)
    assert (source - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_transformers_own(family: str, made: Made, checkpoint: Callable[[str], Path]) -> None:
    out = made(family)
    tokenizer = load_tokenizer(out)  # of the class that transformers takes for the family
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    reference: Any = dense_reference(out, checkpoint(family))
    expected = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=2
    )[0, ids.shape[1] :]
    pieces: list[str] = []
    result = generate(out, PROMPT, GenerateConfig(max_new_tokens=8, device="cpu"), write=pieces.append)
    assert result.text == tokenizer.decode(expected, skip_special_tokens=True) == "".join(pieces)
    assert result.new_tokens == len(expected) and result.prompt_tokens == ids.shape[1]
    assert len(pieces) > 1, "as it comes"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("symmetric", "form"), [(True, "gptq"), (False, "gptq_v2")])
@pytest.mark.usefixtures("triton_path")
def test_packed_linears_through_the_kernels(bits: int, symmetric: bool, form: str, made: Made) -> None:
    """Few vectors go through the one kernel, many through the other; both come to the dense result, bias included."""
    model = bigq.load_model(made("qwen2", bits, symmetric=symmetric, format=form), device="cpu", packed=True)
    linear = next(module for name, module in packed_linears(model).items() if name.endswith("k_proj"))
    assert linear.bias is not None and linear.bits == bits
    for rows in (1, 3, 40):
        x = torch.randn(2, rows, linear.in_features, generator=torch.Generator().manual_seed(rows)).half()
        bias = linear.bias.half()
        exact = x.double() @ linear.weight(torch.float32).double().T + bias.double()
        y = PackedLinear.forward(_with_bias(linear, bias), x)
        assert y.dtype == torch.float16 and y.shape == exact.shape
        torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=2e-3)


def _with_bias(linear: PackedLinear, bias: Tensor) -> PackedLinear:
    return PackedLinear(linear.words, linear.scales.T, linear.zeros.T, linear.bits, nn.Parameter(bias, requires_grad=False))


def test_rules_and_skipped_linears(made: Made) -> None:
    rules = (Rule(".*(q|k|v)_proj", None), Rule(".*down_proj", {"bits": 8}))
    out = made("llama", 4, rules=rules)
    packed = packed_linears(bigq.load_model(out, device="cpu", packed=True))
    assert not [name for name in packed if name.endswith(("q_proj", "k_proj", "v_proj"))] and {
        m.bits for n, m in packed.items() if "down" in n
    } == {8}
    ids = random_ids(1)
    logits = logits_of(bigq.load_model(out, device="cpu", packed=True), ids, 1)
    torch.testing.assert_close(logits, streamed_logits(out, ids, 1), rtol=1e-4, atol=1e-4)


def test_tied_embeddings_stay_tied(made: Made) -> None:
    for packed in (False, True):
        model: Any = bigq.load_model(made("bloom"), device="cpu", packed=packed)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_packed_model_takes_less_than_a_dense_one(ids_file: Path, tmp_path: Path) -> None:
    """And both take what was foreseen; where there is no room for the dense one, the packed one is taken."""
    from models import make_checkpoint

    source = make_checkpoint(tmp_path / "m", "llama", shard="20MB", hidden_size=512, intermediate_size=1024, num_hidden_layers=2)
    config = JobConfig(scheme=QuantScheme(group_size=128), calibration=str(ids_file), method="rtn", device="cpu", quiet=True)
    bigq.quantize(str(source), tmp_path / "out", config)
    sizes = {packed: load.stored_bytes(bigq.load_model(tmp_path / "out", device="cpu", packed=packed)) for packed in (False, True)}
    assert sizes[True] < 0.25 * sizes[False]
    from bigq.model.pager import Pager

    pager = Pager(tmp_path / "out", device=torch.device("cpu"))
    largest = 512 * 1024 * 4
    for packed, size in sizes.items():
        needed = load.bytes_needed(pager, 0, packed=packed)
        assert size - 2**16 < needed < size + 2 * largest + 2**16
    for there, expected in ((2**40, False), (load.bytes_needed(pager, 0, packed=True), True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(load, "host_budget", lambda _, there=there: there)
            assert load.choose_packed(pager, 0) is expected
            said: list[str] = []
            model = load.load_resident(Pager(tmp_path / "out", device=torch.device("cpu")), say=said.append)
            assert bool(packed_linears(model)) is expected and len(said) == int(expected)
            if expected:
                with pytest.raises(ResourceError, match=r"needs .* but cpu has"):
                    load.choose_packed(pager, 10**6)


def test_the_source_itself_can_be_tried(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "m"
    shutil.copytree(checkpoint("llama"), source)
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(source)
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    reference: Any = reference_model(source)
    expected = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=2)[0, 6:]
    result = generate(source, PROMPT, GenerateConfig(max_new_tokens=6, device="cpu"))
    assert result.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_sampling_is_by_seed(made: Made) -> None:
    def text(**how: Any) -> str:
        return generate(made("llama"), PROMPT, GenerateConfig(max_new_tokens=12, device="cpu", **how)).text

    assert text(temperature=5.0, seed=1) == text(temperature=5.0, seed=1) != text(temperature=5.0, seed=2)
    assert text(top_p=1e-6) == text(), "only the likeliest is left"


def test_the_command(made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["generate", str(made("llama")), "--device", "cpu", "--max-new-tokens", "5", "--prompt"]
    assert main([*flags, PROMPT]) == 0
    plain = capsys.readouterr()
    assert plain.out.count("\n") == 1 and plain.out.startswith("w")
    reading, summary = plain.err.splitlines()
    assert reading == f"reading {made('llama')} …" and summary.startswith("5 tokens, ") and "tokens/s" in summary
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert main([*flags, "-", "--quiet"]) == 0
    assert capsys.readouterr() == (plain.out, "")


def test_chat(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made("llama"), out)
    with pytest.raises(UsageError, match="no chat template"):
        generate(out, "w5", GenerateConfig(chat=True, device="cpu"))
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "w7 {{ messages[0]['content'] }} w8"
    tokenizer.save_pretrained(out)
    result = generate(out, "w5 w6", GenerateConfig(chat=True, device="cpu", max_new_tokens=3))
    assert result.prompt_tokens == 4
    assert result.text == generate(out, "w7 w5 w6 w8", GenerateConfig(device="cpu", max_new_tokens=3)).text
    tokenizer.chat_template = "{{ 1 / 0 }}"
    tokenizer.save_pretrained(out)
    with pytest.raises(CheckpointError, match="fails on the prompt"):
        generate(out, "w5", GenerateConfig(chat=True, device="cpu"))


def test_a_text_ends_where_the_model_has_no_more_positions(made: Made) -> None:
    folder = made("gpt2")
    limit = json.loads((folder / "config.json").read_text())["n_positions"]
    words = " ".join(["w5"] * (limit - 4))
    result = generate(folder, words, GenerateConfig(max_new_tokens=100, device="cpu"))
    assert result.prompt_tokens + result.new_tokens <= limit and result.new_tokens <= 3
    with pytest.raises(UsageError, match=f"has {limit + 1} tokens, but the model has {limit} positions"):
        generate(folder, " ".join(["w5"] * limit), GenerateConfig(device="cpu"))


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        ("prompt", UsageError, "--prompt: is empty"),
        ("tokenizer", CheckpointError, "tokenizer"),
        ("shard", CheckpointError, "safetensors"),
        ("config", BigqError, "config.json"),
        ("vocabulary", CheckpointError, "fetch the tokenizer of this model"),
    ],
)
def test_refusals(damage: str, error: type[BigqError], said: str, made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made("llama"), out)
    prompt = " \n" if damage == "prompt" else PROMPT
    if damage == "tokenizer":
        for path in out.glob("*token*"):
            path.unlink()
    elif damage == "shard":
        shard = sorted(out.glob("*.safetensors"))[-1]
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "config":
        (out / "config.json").unlink()
    elif damage == "vocabulary":
        tokenizer = word_tokenizer()
        tokenizer.add_tokens([f"x{i}" for i in range(500)])
        tokenizer.save_pretrained(out)
        prompt = "x400"
    with pytest.raises(error, match=said) as raised:
        generate(out, prompt, GenerateConfig(device="cpu"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "how",
    [
        {"max_new_tokens": 0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": 10**22},
        {"seed": -1},
    ],
)
def test_settings_that_make_no_sense(how: dict[str, Any]) -> None:
    flag = "--" + next(iter(how)).replace("_", "-")
    with pytest.raises(UsageError, match=flag):
        GenerateConfig(**how)


class Bytes:
    """A tokenizer of bytes; 0 is a special token."""

    def convert_ids_to_tokens(self, ids: list[int], skip_special_tokens: bool) -> list[str]:
        return [chr(i) for i in ids if i]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(i for i in ids if i).decode(errors="replace")


def test_characters_come_whole() -> None:
    pieces: list[str] = []
    streamer = Streamer(Bytes(), pieces.append)
    streamer.put(torch.tensor([[65, 66]]))
    for byte in "aé\nü→".encode() + b"\0\xe2":
        streamer.put(torch.tensor([byte]))
    assert pieces == ["a", "é", "\n", "ü", "→"] and streamer.count == 11
    streamer.end()
    assert streamer.text == "aé\nü→\ufffd" and pieces[-1] == "\ufffd"


def _fast(model: Any, decoder: Any, **how: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", **how)
    made.add_special_tokens({"additional_special_tokens": ["<unk>", "</s>"]})
    return made


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(["<unk>", "</s>", *tokens])}


_PIECES = ["▁def", "▁f", ":", "▁▁▁", "▁", "▁return", "x", "é", "<0x0A>", "<0xC3>", "<0xA9>", "<0xFF>", "<0x41>"]
_WORDS = ["it", "do", "'", "s", "'s", "n", "n't", "'t", "'ve", "v", ".", "!", ",", "a", "##b", "##'", "' ", "\n"]
_LIKE_LLAMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


def _byte_level() -> PreTrainedTokenizerFast:
    whole = [chr(c) for c in (*range(33, 60), *range(0xA1, 0xAD), *range(0xAE, 0x120))]
    return _fast(BPE(_numbered([*whole, "Ġit", "ĠĠ", "Ċ", "â", ""]), [], unk_token="<unk>"), decoders.ByteLevel())


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "like llama 2": lambda: _fast(BPE(_numbered(_PIECES), [], byte_fallback=True, unk_token="<unk>"), _LIKE_LLAMA),
    "metaspace": lambda: _fast(BPE(_numbered(_PIECES), [], unk_token="<unk>"), decoders.Metaspace()),
    "byte level": _byte_level,
    "words, cleaned up": lambda: _fast(
        WordLevel(_numbered(_WORDS), unk_token="<unk>"), decoders.WordPiece(cleanup=False), clean_up_tokenization_spaces=True
    ),
    "word pieces": lambda: _fast(WordLevel(_numbered(_WORDS), unk_token="<unk>"), decoders.WordPiece(), clean_up_tokenization_spaces=False),
    "ends of words": lambda: _fast(BPE(_numbered(["he", "llo</w>", ".</w>", "x"]), [], unk_token="<unk>"), decoders.BPEDecoder("</w>")),
    "no decoder": lambda: _fast(WordLevel(_numbered(_WORDS), unk_token="<unk>"), None, clean_up_tokenization_spaces=True),
}


class Counting:
    """A tokenizer that notes how many tokens it decodes at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.inner, self.sizes = tokenizer, list[int]()
        self.clean_up_tokenization_spaces = tokenizer.clean_up_tokenization_spaces
        self.convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.sizes.append(len(ids))
        return str(self.inner.decode(ids, skip_special_tokens=skip_special_tokens))


def streamed(tokenizer: Any, ids: list[int]) -> tuple[list[str], str]:
    """(the pieces, the text)."""
    pieces: list[str] = []
    streamer = Streamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[0]]))
    for i in ids:
        streamer.put(torch.tensor([i]))
    streamer.end()
    assert streamer.count == len(ids) and all(pieces)
    return pieces, streamer.text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_pieces_are_the_text(kind: str) -> None:
    """Of any tokens, also of those that no text has; and the work for one of them does not grow."""
    tokenizer = TOKENIZERS[kind]()
    random = Random(kind)
    for length in [3] * 300 + [12] * 300 + [200] * 20:
        ids = random.choices(range(len(tokenizer)), k=length)
        counting = Counting(tokenizer)
        pieces, text = streamed(counting, ids)
        assert "".join(pieces) == text == tokenizer.decode(ids, skip_special_tokens=True), ids
        assert length < 200 or len(pieces) > 20
        assert max(counting.sizes[:-1], default=0) <= 2 * WINDOW and counting.sizes[-1] == length


def test_spaces_at_the_beginning_of_lines_stay() -> None:
    tokenizer = TOKENIZERS["like llama 2"]()
    names = ["▁def", "▁f", ":", "<0x0A>", "▁▁▁", "▁return", "x", "<0x0A>", "▁▁▁", "▁return"]
    pieces, text = streamed(tokenizer, tokenizer.convert_tokens_to_ids(names))
    assert "".join(pieces) == text == "def f:\n    returnx\n    return"


@pytest.mark.parametrize("token", ["<0x0A>", "▁", "</s>", "<0xFF>"])
def test_a_model_that_says_one_thing_for_ever_costs_no_more(token: str) -> None:
    tokenizer = TOKENIZERS["like llama 2"]()
    for before in ([], ["x"]):
        counting = Counting(tokenizer)
        ids = tokenizer.convert_tokens_to_ids([*before, *[token] * 500])
        pieces, text = streamed(counting, ids)
        assert "".join(pieces) == text == tokenizer.decode(ids, skip_special_tokens=True)
        assert sum(counting.sizes) <= 500 * (WINDOW + KEPT + 2)


def test_seeds_of_torch_are_taken(made: Made) -> None:
    generate(made("llama"), PROMPT, GenerateConfig(max_new_tokens=1, device="cpu", seed=MAX_SEED, temperature=1.0))
