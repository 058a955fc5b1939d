"""Which checkpoints are causal language models, by the class that their config.json names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_checkpoint, random_ids, streamed_logits
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Florence2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    Qwen3_5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bigq import JobConfig, plan
from bigq.errors import BigqError, UnsupportedModelError
from bigq.model.architecture import max_positions, require_causal
from bigq.model.skeleton import build, load_config

LLAMA = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, num_labels=1
)
BERT = BertConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
T5 = T5Config(vocab_size=128, d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16)
WHISPER = WhisperConfig(
    vocab_size=128,
    d_model=64,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=96,
    decoder_ffn_dim=96,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)


def composite() -> Any:
    """A tiny Qwen3.5 with its vision part."""
    text = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16}
    return Qwen3_5ForConditionalGeneration(CONFIG_MAPPING["qwen3_5"](text_config=text, vision_config=vision))


#: Class → how to make it, what the message calls it, and the causal class of its model type (None: it has none).
OTHERS = {
    "LlamaForSequenceClassification": (
        lambda: LlamaForSequenceClassification(LLAMA),
        "a sequence classifier (such as a reward",
        "LlamaForCausalLM",
    ),
    "LlamaForTokenClassification": (lambda: LlamaForTokenClassification(LLAMA), "a token classifier", "LlamaForCausalLM"),
    "LlamaModel": (lambda: LlamaModel(LLAMA), "a model without an output head (such as an embedding model)", "LlamaForCausalLM"),
    "BertForMaskedLM": (lambda: BertForMaskedLM(BERT), "an encoder (a masked language model)", None),
    "T5ForConditionalGeneration": (lambda: T5ForConditionalGeneration(T5), "an encoder-decoder model", None),
    "WhisperForConditionalGeneration": (
        lambda: WhisperForConditionalGeneration(WHISPER),
        "a speech model; such models are not supported yet, and WhisperForCausalLM is only a part of it",
        None,
    ),
}


def refusal(folder: Path, tmp_path: Path) -> str:
    """What ``bigq plan`` says; ``quantize`` and ``eval`` open the config in the same way."""
    with pytest.raises(UnsupportedModelError) as caught:
        plan(str(folder), tmp_path / "out", JobConfig(calibration="builtin"))
    with pytest.raises(UnsupportedModelError, match=re.escape(str(caught.value))):
        load_config(folder)
    return str(caught.value)


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_another_kind_is_told_what_it_is(name: str, tmp_path: Path) -> None:
    made, kind, causal = OTHERS[name]
    made().save_pretrained(tmp_path / "m")
    said = refusal(tmp_path / "m", tmp_path)
    assert said.startswith(f"{tmp_path / 'm' / 'config.json'}: architectures names {name}, {kind}")
    assert "fetch it again" not in said
    assert len(said) < 400
    assert ("set architectures to" in said) == (causal is not None)
    assert causal is None or f'set architectures to ["{causal}"]' in said


def with_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def test_the_advice_works(tmp_path: Path) -> None:
    """A causal model whose config.json names another class: with the class that the message names, the next run passes."""
    folder = with_config(make_checkpoint(tmp_path / "m", "llama"), architectures=["LlamaModel"])
    advised = re.search(r'set architectures to (\["\w+"\])', refusal(folder, tmp_path))
    assert advised
    with_config(folder, architectures=json.loads(advised[1]))
    streamed_logits(folder, random_ids(2), 2, "float32")


@pytest.mark.parametrize("architectures", [None, [], ["LLaMAForCausalLM"], ["LlamaForCausalLM", "Other"], "LlamaForCausalLM", 3, [None]])
def test_names_that_change_nothing(architectures: Any, tmp_path: Path) -> None:
    """No class, or one whose name looks like a causal model: the model type decides, as it does for transformers."""
    folder = with_config(make_checkpoint(tmp_path / "m", "llama"), architectures=architectures)
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception:
        with pytest.raises(BigqError, match=re.escape("config.json")):
            load_config(folder)
        return
    streamed_logits(folder, random_ids(2), 2, "float32")


def test_unknown_classes_and_classes_of_another_type(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")
    said = refusal(with_config(folder, architectures=["LlamaForRewardModel"]), tmp_path)
    assert "LlamaForRewardModel, which transformers does not know" in said
    said = refusal(with_config(folder, architectures=["OPTForCausalLM"]), tmp_path)
    assert "a causal language model of another model type than 'llama', so readers" in said
    assert said.endswith('set architectures to ["LlamaForCausalLM"] to quantize what transformers runs, or correct model_type')
    load_config(with_config(folder, architectures=["LlamaForCausalLM"]))


def test_without_architectures_the_kind_is_the_model_type_s(tmp_path: Path) -> None:
    T5ForConditionalGeneration(T5).save_pretrained(tmp_path / "t5")
    said = refusal(with_config(tmp_path / "t5", architectures=None), tmp_path)
    assert "model type 't5' is that of an encoder-decoder model; bigq quantizes causal language models only" in said


def test_a_composite_type_and_a_causal_one_of_one_name(tmp_path: Path) -> None:
    """The class that architectures names is built; without it, the whole of what the config describes."""
    composite().save_pretrained(tmp_path / "m")
    for named, built in (
        (["Qwen3_5ForConditionalGeneration"], "Qwen3_5ForConditionalGeneration"),
        (["Qwen3_5ForCausalLM"], "Qwen3_5ForCausalLM"),
        (None, "Qwen3_5ForConditionalGeneration"),
    ):
        config = load_config(with_config(tmp_path / "m", architectures=named))
        assert type(build(config, torch.float32)).__name__ == built


def test_a_composite_class_of_another_type(tmp_path: Path) -> None:
    folder = with_config(make_checkpoint(tmp_path / "m", "llama"), architectures=["LlavaForConditionalGeneration"])
    said = refusal(folder, tmp_path)
    assert "LlavaForConditionalGeneration, a vision-language model of another model type than 'llama', so readers" in said
    assert said.endswith('set architectures to ["LlamaForCausalLM"] to quantize what transformers runs, or correct model_type')


def test_a_composite_encoder_decoder_model(tmp_path: Path) -> None:
    Florence2Config().save_pretrained(tmp_path / "m")
    said = refusal(with_config(tmp_path / "m", architectures=["Florence2ForConditionalGeneration"]), tmp_path)
    assert "Florence2ForConditionalGeneration is an encoder-decoder model; bigq quantizes causal language models only" in said


def test_diffusion_models(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UnsupportedModelError, match="is a diffusion pipeline"):
        plan(str(tmp_path / "m"), tmp_path / "out", JobConfig(calibration="builtin"))
    (tmp_path / "m" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.35"}')
    assert "a part of a diffusion model ('FluxTransformer2DModel')" in refusal(tmp_path / "m", tmp_path)


AUTO = {"AutoConfig": "m.C", "AutoModel": "m.XModel", "AutoModelForCausalLM": "o/r--m.XForCausalLM"}


@pytest.mark.parametrize(
    ("name", "auto_map", "refused"),
    [
        ("XForCausalLM", AUTO, None),
        (None, AUTO, None),
        ("XModel", {**AUTO, "AutoModel": "m.XForCausalLM"}, None),  # as ChatGLM's configs
        ("XForSequenceClassification", AUTO, "the causal language model of the checkpoint's code is XForCausalLM"),
        (
            "XRanker",
            {**AUTO, "AutoModelForSequenceClassification": "m.XRanker"},
            "XRanker (AutoModelForSequenceClassification in auto_map)",
        ),
        ("XModel", {"AutoModel": "m.XModel"}, "own code offers AutoModel, but not AutoModelForCausalLM"),
    ],
)
def test_code_of_the_checkpoint(name: str | None, auto_map: dict[str, str], refused: str | None) -> None:
    raw = {"model_type": "x", "auto_map": auto_map, "architectures": [name] if name else None}
    if refused is None:
        require_causal(Path("config.json"), raw, object(), trust_remote_code=True)
        return
    with pytest.raises(UnsupportedModelError, match=re.escape(refused)):
        require_causal(Path("config.json"), raw, object(), trust_remote_code=True)


def test_every_causal_class_of_transformers_passes() -> None:
    """With the class that transformers writes for it, and with none unless the config is that of a larger model."""
    passed = 0
    for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        try:
            config = CONFIG_MAPPING[kind]()
        except Exception:
            continue  # its settings have no defaults that fit
        for name in [names] if isinstance(names, str) else names:
            require_causal(Path("config.json"), {"model_type": kind, "architectures": [name]}, config, trust_remote_code=False)
            passed += 1
    assert passed > 150


@pytest.mark.parametrize(("kind", "setting"), [("llama", "max_position_embeddings"), ("gpt2", "n_positions"), ("mpt", "max_seq_len")])
def test_the_longest_row_by_whatever_name_a_config_has_for_it(kind: str, setting: str) -> None:
    assert max_positions(CONFIG_MAPPING[kind](**{setting: 96})) == 96
