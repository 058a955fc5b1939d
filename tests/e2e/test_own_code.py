"""Models that come with their own code: streaming equals the whole model's own forward, or the model is refused with what was seen."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models import logits_of, make_checkpoint, random_ids, stored_tensors
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bigq import EvalConfig, JobConfig, evaluate, plan, quantize
from bigq.errors import UnsupportedModelError
from bigq.infer.evaluate import Stream
from bigq.model.pager import Pager
from bigq.scheme import QuantScheme

CODE = Path(__file__).resolve().parent / "modeling_toy.py"

#: Twists with which streaming computes what the whole model computes.
SOUND = ("none", "embeddings_after", "tokens_after", "last_in_place", "softcap", "logits_of_tokens")

#: Twist → what the refusal names.
REFUSED = {
    "looped": "block 0 is called again after block 3: the model runs blocks more than once",
    "twice_in_a_row": "block 1 is called again after itself: the model runs blocks more than once",
    "other_order": "decoder blocks are called out of order: block 2 comes after block 0",
    "skips_one": "out of order: block 3 comes after block 1",
    "early_exit": "only 2 of 4 decoder blocks are called before its output head",
    "skip": "the output of block 1 is used after the last block",
    "mixed_logits": "the output of block 1 is used after the last block",
    "scaled_between": "the input of block 1 is not the output of block 0",
    "scaled_in_place": "the output of block 0 is changed in place before block 1",
    "embeddings_between": "the input of block 2 is not the output of block 1",
    "counter_after": "what reaches its output head differs between two runs on the same tokens",
    "rows_after": "what reaches its output head for a row depends on the other rows",
    "dropout_before": "what reaches its first block differs between two runs on the same tokens",
    "dropout": "layers.0: the same input gives another output the second time",
    "counter": "layers.0: the same input gives another output the second time",
    "running_maximum": "layers.0: the same input gives another output the second time",
    "memory": "layers.0: the same input gives another output the second time",
    "mixes_rows": "layers.0: the output of a row depends on the other rows",
    "in_place": "layers.0: overwrites its input",
    "float64": "layers.1: turns hidden states [2, 16, 64] of torch.float32 into [2, 16, 64] of torch.float64",
    "tuple_later": "layers.1: returns its outputs in another form than block 0",
    "scaled_linear": "layers.0.down: its Scaled does not compute x · Wᵀ + b",
    "hook": "layers.0: has forward hooks",
    "head_function": "its forward never calls its output head",
}

#: Twists that only show where all blocks run in one forward, on meta; ``quantize`` and ``eval`` look first.
ON_META = {
    "shared_values": "block 1 receives something from an earlier block by another way",
}


@pytest.fixture(scope="module", autouse=True)
def _no_cache_of_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code of checkpoints is copied to a folder of this module instead of the user's cache."""
    import transformers.dynamic_module_utils as dynamic

    before, dynamic.HF_MODULES_CACHE = dynamic.HF_MODULES_CACHE, str(tmp_path_factory.mktemp("modules"))
    paths = list(sys.path)
    yield
    dynamic.HF_MODULES_CACHE, sys.path[:] = before, paths


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Twist → a checkpoint with random weights."""
    root = tmp_path_factory.mktemp("toys")

    def get(twist: str) -> Path:
        folder = root / twist
        if not folder.exists():
            write_toy(folder, twist)
        return folder

    return get


def write_toy(folder: Path, twist: str, **more: object) -> None:
    folder.mkdir()
    shutil.copy(CODE, folder)
    config = {
        "model_type": "toy",
        "architectures": ["ToyForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_toy.ToyConfig", "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM"},
        "twist": twist,
        "dtype": "float32",
        "max_position_embeddings": 64,
        "vocab_size": 128,
    }
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    d, generator = 64, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.15

    tensors = {"embed.weight": random(128, d), "lm_head.weight": random(128, d), "norm.weight": 1 + random(d), "norm.bias": random(d)}
    for i in range(4):
        for name, m, n in (("qkv", 3 * d, d), ("out", d, d), ("up", 2 * d, d), ("down", d, 2 * d)):
            tensors |= {f"layers.{i}.{name}.weight": random(m, n), f"layers.{i}.{name}.bias": random(m)}
        for name in ("norm1", "norm2"):
            tensors |= {f"layers.{i}.{name}.weight": 1 + random(d), f"layers.{i}.{name}.bias": random(d)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def own_logits(folder: Path, ids: Tensor, batch: int) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    return logits_of(model, ids, batch)


def streamed(folder: Path, ids: Tensor, batch: int) -> Tensor:
    with torch.no_grad():
        stream = Stream(Pager(folder, device=torch.device("cpu"), trust_remote_code=True), ids, batch)
        with stream.tail_ready():
            return torch.cat([stream.logits(lo, min(lo + batch, len(ids))) for lo in range(0, len(ids), batch)])


def eval_config(tmp_path: Path) -> EvalConfig:
    save_file({"input_ids": random_ids(2, 24)}, tmp_path / "eval.safetensors")
    return EvalConfig(data=str(tmp_path / "eval.safetensors"), samples=2, seqlen=24, trust_remote_code=True, quiet=True)


def job_config(ids_file: Path) -> JobConfig:
    return JobConfig(
        calibration=str(ids_file), samples=4, seqlen=24, scheme=QuantScheme(bits=4, group_size=32), trust_remote_code=True, quiet=True
    )


@pytest.mark.parametrize("twist", SOUND)
def test_streaming_equals_the_model_s_own_forward(twist: str, toy: Callable[[str], Path]) -> None:
    ids = random_ids(3, 24)
    got = streamed(toy(twist), ids, 2)
    assert torch.equal(got, own_logits(toy(twist), ids, 2))
    if twist not in ("none", "last_in_place"):  # the final norm takes a factor away
        assert not torch.allclose(got, own_logits(toy("none"), ids, 2))


@pytest.mark.parametrize("twist", REFUSED)
def test_what_streaming_would_get_wrong_is_refused(twist: str, toy: Callable[[str], Path], tmp_path: Path, ids_file: Path) -> None:
    """By ``eval`` and by ``quantize``, which leaves nothing that loads."""
    with pytest.raises(UnsupportedModelError, match=re.escape(REFUSED[twist])):
        evaluate(str(toy(twist)), eval_config(tmp_path))
    with pytest.raises(UnsupportedModelError):
        quantize(str(toy(twist)), tmp_path / "out", job_config(ids_file))
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("twist", ON_META)
def test_what_passes_between_blocks_out_of_sight_is_refused(twist: str, toy: Callable[[str], Path], tmp_path: Path, ids_file: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(ON_META[twist])):
        evaluate(str(toy(twist)), eval_config(tmp_path))
    with pytest.raises(UnsupportedModelError, match=re.escape(ON_META[twist])):
        quantize(str(toy(twist)), tmp_path / "out", job_config(ids_file))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("twist", ["dropout", "counter_after", "running_maximum", "scaled_linear", "skip"])
def test_rounding_to_sixteen_bits_hides_nothing(twist: str, toy: Callable[[str], Path], tmp_path: Path) -> None:
    config = dataclasses.replace(eval_config(tmp_path), dtype="bfloat16")
    with pytest.raises(UnsupportedModelError, match=re.escape(REFUSED[twist])):
        evaluate(str(toy(twist)), config)
    assert evaluate(str(toy("none")), config).perplexity > 1


@pytest.mark.parametrize("twist", ["looped", "twice_in_a_row", "other_order", "skip", "scaled_between", "scaled_in_place"])
def test_the_plan_refuses_too(twist: str, toy: Callable[[str], Path], tmp_path: Path, ids_file: Path) -> None:
    with pytest.raises(UnsupportedModelError):
        plan(str(toy(twist)), tmp_path / "out", job_config(ids_file))


def test_a_mask_made_of_tokens_is_noticed_in_the_rows(toy: Callable[[str], Path], tmp_path: Path) -> None:
    """The few random tokens of the probe need not hold the token that masks are made of; the rows themselves are looked at too."""
    ids = random_ids(4, 24)
    ids[ids == 5] = 6
    folder = toy("mask_of_padding")
    assert torch.equal(streamed(folder, ids, 2), own_logits(folder, ids, 2))
    ids[2, 3] = 5
    with pytest.raises(UnsupportedModelError, match=r"the arguments of block 0 for rows 3 to 4 differ"):
        streamed(folder, ids, 2)
    assert not torch.equal(own_logits(folder, ids, 2), own_logits(toy("none"), ids, 2))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (None, r"the checkpoint's own code cannot be loaded \(modeling_toy.py is missing\); fetch modeling_toy.py into it$"),
        ("import no_such_package\n", r"no_such_package.*; run pip install no_such_package$"),
        ("def (:\n", r"SyntaxError: .*; fetch its .py files again$"),
    ],
)
def test_own_code_that_cannot_be_loaded(code: str | None, said: str, tmp_path: Path, ids_file: Path) -> None:
    write_toy(tmp_path / "m", "none")
    file = tmp_path / "m" / "modeling_toy.py"
    if code is None:
        file.unlink()
    else:
        file.write_text(code)
    with pytest.raises(UnsupportedModelError, match=said):
        plan(str(tmp_path / "m"), tmp_path / "o", job_config(ids_file))


def test_missing_code_that_transformers_does_not_need(tmp_path: Path, ids_file: Path) -> None:
    """Phi-3 and Falcon are published with code that transformers has too."""
    model = make_checkpoint(tmp_path / "m", "phi3")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="or leave out --trust-remote-code: transformers has its own code for 'phi3'"):
        plan(str(model), tmp_path / "o", job_config(ids_file))
    plan(str(model), tmp_path / "o", dataclasses.replace(job_config(ids_file), trust_remote_code=False))


def test_a_sound_model_is_quantized_and_evaluated(toy: Callable[[str], Path], tmp_path: Path, ids_file: Path) -> None:
    quantize(str(toy("none")), tmp_path / "out", job_config(ids_file))
    assert sum(name.endswith(".qweight") for name in stored_tensors(tmp_path / "out")) == 16
    found = evaluate(str(tmp_path / "out"), eval_config(tmp_path), baseline=str(toy("none")))
    assert found.kl is not None
    assert 0 < found.kl < 1
