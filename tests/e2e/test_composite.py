"""Models with towers for images or audio: the language model is streamed and quantized by text, the rest is copied and never loaded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composite_families import COMPOSITE, MORE, make_composite, reference_composite
from models import logits_of, random_ids, rewrite, save_ids, stored_tensors, streamed_logits, word_tokenizer
from safetensors.torch import save_file
from transformers import AutoModelForMultimodalLM, Blip2Config, Blip2ForConditionalGeneration, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.blip_2 import Blip2QFormerConfig, Blip2VisionConfig
from transformers.models.opt import OPTConfig

import bigq
from bigq.cli.main import main
from bigq.errors import UnsupportedModelError, UsageError
from bigq.inspect.history import read_history
from bigq.model.pager import Pager
from bigq.reports.model_card import model_card
from bigq.sched.plan.inputs import _outline
from bigq.sched.plan.survey import survey

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Parts of names of what is not the language model's.
BESIDE = re.compile(r"vision|visual|projector|connector|audio|image_newline|abstractor|qformer|merger")
EVERY = [*COMPOSITE, *(pytest.param(kind, marks=pytest.mark.long) for kind in MORE)]

pytestmark = pytest.mark.usefixtures("one_thread")
Composite = Callable[[str], Path]


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> Composite:
    """Model type → its tiny fp32 checkpoint. To be read only."""
    folder = tmp_path_factory.mktemp("composite")

    def get(kind: str) -> Path:
        path = folder / kind
        return path if path.exists() else make_composite(path, kind)

    return get


def job(format: str = "compressed-tensors", **settings: Any) -> bigq.JobConfig:
    scheme = bigq.QuantScheme(group_size=32)
    return bigq.JobConfig(**{"scheme": scheme, "device": "cpu", "quiet": True, "format": format, "method": "rtn", **settings})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", EVERY)
def test_streamed_logits_are_those_of_the_composite_class(kind: str, dtype: str, composite: Composite) -> None:
    folder, ids = composite(kind), random_ids(2)
    expected = logits_of(reference_composite(folder, DTYPES[dtype]), ids, 2)
    assert expected.dtype == DTYPES[dtype] and torch.isfinite(expected).all()
    assert torch.equal(streamed_logits(folder, ids, 2, dtype), expected)


@pytest.mark.parametrize("kind", ["qwen2_vl", *(pytest.param(kind, marks=pytest.mark.long) for kind in COMPOSITE if kind != "qwen2_vl")])
def test_one_changed_weight_changes_streamed_logits(kind: str, composite: Composite, tmp_path: Path) -> None:
    source, folder, ids = composite(kind), tmp_path / "changed", random_ids(2)
    shutil.copytree(source, folder)
    tensors = stored_tensors(folder)
    name = [n for n in tensors if n.endswith("layers.2.self_attn.o_proj.weight") and not BESIDE.search(n)][-1]
    changed = tensors[name].clone()
    changed[1, 2] += 3
    rewrite(folder, name, changed)
    got = streamed_logits(folder, ids, 2, "float32")
    assert not torch.equal(got, streamed_logits(source, ids, 2, "float32"))
    assert torch.equal(got, logits_of(reference_composite(folder), ids, 2))


def _loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the parameters that are loaded from now on."""
    names: list[str] = []
    load = Pager._load

    def spy(self: Pager, name: str) -> None:
        if name in self._meta:
            names.append(name)
        load(self, name)

    monkeypatch.setattr(Pager, "_load", spy)
    return names


def quantized(source: Path, out: Path, tmp_path: Path, **settings: Any) -> None:
    ids = save_ids(tmp_path / "ids.safetensors", random_ids(4, 24))
    bigq.quantize(source, out, job(**{"method": "gptq", "calibration": str(ids), "samples": 4, "seqlen": 24, **settings}))


@pytest.mark.parametrize("kind", [k if k in ("qwen2_vl", "llava") else pytest.param(k, marks=pytest.mark.long) for k in COMPOSITE | MORE])
def test_a_job_quantizes_the_language_model_and_copies_the_rest(
    kind: str, composite: Composite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = composite(kind), tmp_path / "out"
    loaded = _loaded(monkeypatch)
    quantized(source, out, tmp_path)
    assert loaded and not [name for name in loaded if BESIDE.search(name)]
    before, after = stored_tensors(source), stored_tensors(out)
    packed, made = set(before) - set(after), set(after) - set(before)
    assert packed and not [name for name in packed | made if BESIDE.search(name) or not re.search(r"(layers|blocks)\.\d", name)]
    for name in set(before) & set(after):
        assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]), name
    assert {name for name in packed if ".experts" not in name} == {_linear_of(name) for name in made if ".experts" not in name}
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == json.loads((source / "config.json").read_text())
    assert bigq.verify(out) == []


def _linear_of(name: str) -> str:
    """The weight that a packed tensor belongs to."""
    return re.sub(r"\.weight_\w+$", ".weight", name)


@pytest.mark.parametrize("kind", [k if k == "llava" else pytest.param(k, marks=pytest.mark.long) for k in COMPOSITE if k != "llama4"])
def test_the_composite_class_loads_the_output_by_its_names(kind: str, composite: Composite, tmp_path: Path) -> None:
    """With packed tensors replaced by what they decode to: no key is missing or unexpected, and logits are those that stream from it."""
    out, plain, ids = tmp_path / "out", tmp_path / "plain", random_ids(2)
    quantized(composite(kind), out, tmp_path)
    with torch.no_grad():
        pager = Pager(out, device=torch.device("cpu"), dtype="float32")
        weights = {f"{pager.packed[name]}.weight": pager.dequantized(name).contiguous() for name in pager.packed}
    assert len(weights) == 21
    tensors = {name: t for name, t in stored_tensors(out).items() if _linear_of(name) not in weights}
    plain.mkdir()
    save_file(tensors | weights, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    model, found = AutoModelForMultimodalLM.from_pretrained(plain, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    assert torch.equal(streamed_logits(out, ids, 2, "float32"), logits_of(model.eval(), ids, 2))


def test_a_converted_output_is_what_a_job_in_that_format_writes(composite: Composite, tmp_path: Path) -> None:
    quantized(composite("qwen3_vl"), tmp_path / "one", tmp_path, format="gptq")
    quantized(composite("qwen3_vl"), tmp_path / "other", tmp_path)
    bigq.convert(tmp_path / "one", tmp_path / "converted", "compressed-tensors")
    one, other = stored_tensors(tmp_path / "converted"), stored_tensors(tmp_path / "other")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    configs = [json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in ("converted", "other")]
    assert configs[0]["ignore"] == configs[1]["ignore"]
    assert bigq.verify(tmp_path / "converted") == []


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_parts_beside_the_language_model_do_not_count_as_packed(format: str, composite: Composite, tmp_path: Path) -> None:
    """By the names of transformers, of the checkpoint and of vLLM, where a tower is at the top and q, k and v are one Linear."""
    quantized(composite("llava"), tmp_path / "out", tmp_path, format=format)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]

    def excludes(name: str) -> bool:
        if format == "gptq":
            return next((rule[:2] for rule in config["dynamic"] if re.match(rule[2:], name)), None) == "-:"
        return any(re.match(one[3:], name) if one.startswith("re:") else one == name for one in config["ignore"])

    for tower in ("vision_tower.vision_model.encoder.layers.0.self_attn", "model.vision_tower.encoder.layers.0.self_attn"):
        assert excludes(f"{tower}.q_proj") and excludes(f"{tower}.qkv_proj")
    assert excludes("multi_modal_projector.linear_1") and excludes("model.multi_modal_projector.linear_1")
    for text in ("model.language_model.layers.0", "language_model.model.layers.0"):
        assert not excludes(f"{text}.self_attn.q_proj") and not excludes(f"{text}.mlp.gate_proj")


def test_the_plan_counts_only_what_text_needs(composite: Composite) -> None:
    """Beside blocks, embedding and head that is the final norm; the towers are in the output."""
    source = composite("llava")
    with torch.no_grad():
        outline, _, warnings = _outline(source, None, job())
        shape = survey(outline, 24)
    assert shape.rest_loaded == 64 * 4 and not warnings
    tensors = stored_tensors(source)
    blocks = sum(t.nbytes for name, t in tensors.items() if "language_model" in name and ".layers." in name)
    assert shape.rest_stored == sum(t.nbytes for t in tensors.values()) - blocks


def test_eval_and_generate_run_on_text(composite: Composite, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "m"
    shutil.copytree(composite("qwen2_vl"), folder)
    word_tokenizer().save_pretrained(folder)
    (tmp_path / "text.txt").write_text("w5 w6 w7 w8 " * 30)
    assert main(["eval", str(folder), "--data", str(tmp_path / "text.txt"), "--device", "cpu", "--seqlen", "24"]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["generate", str(folder), "--prompt", "w5 w6", "--device", "cpu", "--max-new-tokens", "3"]) == 0
    ids = torch.tensor([[5, 6]])
    model = reference_composite(folder)
    for _ in range(3):
        ids = torch.cat([ids, logits_of(model, ids, 1)[:, -1:].argmax(-1)], dim=1)
    assert word_tokenizer().decode(ids[0, 2:]) in capsys.readouterr().out


def test_a_model_that_sees_later_tokens_is_not_evaluated(composite: Composite, tmp_path: Path) -> None:
    """PaliGemma's attention goes both ways over text that it is given at once, so it sees the token that it should predict."""
    ids = save_ids(tmp_path / "ids.safetensors", random_ids(2))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0: sees later tokens of a row, so .* perplexity"):
        bigq.evaluate(composite("paligemma"), bigq.EvalConfig(data=str(ids), seqlen=40, device="cpu", quiet=True))
    assert bigq.evaluate(composite("llava"), bigq.EvalConfig(data=str(ids), seqlen=40, device="cpu", quiet=True)).perplexity > 1


def test_the_card_loads_the_composite_class(composite: Composite, tmp_path: Path) -> None:
    """Without a format the job writes the one that was read by a reader of such models."""
    quantized(composite("qwen2_vl"), tmp_path / "out", tmp_path, format=None)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    card = model_card(read_history(tmp_path / "out"), "")
    assert 'model = AutoModelForMultimodalLM.from_pretrained("MODEL"' in card and "AutoModelForCausalLM" not in card


def test_without_architectures_the_whole_model_is_built(composite: Composite, tmp_path: Path) -> None:
    folder, ids = tmp_path / "m", random_ids(2)
    shutil.copytree(composite("qwen3_vl"), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["architectures"]
    path.write_text(json.dumps(config))
    assert torch.equal(streamed_logits(folder, ids, 2), streamed_logits(composite("qwen3_vl"), ids, 2))


def test_the_longest_row_is_the_language_model_s(composite: Composite, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the model has 128 positions"):
        bigq.plan(str(composite("llava")), tmp_path / "out", job(seqlen=200))


def test_a_model_that_needs_an_image_is_refused(tmp_path: Path) -> None:
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = OPTConfig(**{**size, "vocab_size": 64, "ffn_dim": 64, "word_embed_proj_dim": 64})
    vision, former = Blip2VisionConfig(**size, image_size=28), Blip2QFormerConfig(**size, vocab_size=64)
    config = Blip2Config(vision_config=vision.to_dict(), qformer_config=former.to_dict(), text_config=text.to_dict())
    Blip2ForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    with pytest.raises(UnsupportedModelError, match=r"own forward fails on text alone, without images or audio: .*'pixel_values'"):
        bigq.plan(str(tmp_path / "m"), tmp_path / "out", job())


def test_a_tower_larger_than_the_language_model_is_not_taken_for_it(tmp_path: Path) -> None:
    size = {"intermediate_size": 96, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**size, hidden_size=96, num_hidden_layers=6, image_size=28, patch_size=14)
    text = LlamaConfig(**size, vocab_size=160, hidden_size=64, num_hidden_layers=2)
    make_composite(tmp_path / "m", "llava", text_config=text.to_dict(), vision_config=vision.to_dict())
    assert isinstance(LlavaConfig.from_pretrained(tmp_path / "m").text_config, LlamaConfig)
    pager = Pager(tmp_path / "m", device=torch.device("cpu"))
    assert (pager.blocks_path, len(pager.blocks)) == ("model.language_model.layers", 2)
