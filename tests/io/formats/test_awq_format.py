"""The awq format, against a decoder written from its definition with Python integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bigq.errors import CheckpointError, UnsupportedModelError, UsageError
from bigq.inspect.scan import scan_shard
from bigq.io.formats import FORMATS, PackedLinear, PackedWeight, Quantization, read_schemes
from bigq.io.formats.base import Misfit
from bigq.io.index import read_header
from bigq.kernels.pack import unpack
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme, Rule

AWQ = FORMATS["awq"]
PATH = Path("model/config.json")
M, N, GROUP = 64, 96, 32
#: Output of 8 in a word, by place.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def random_weight(symmetric: bool = False, group_size: int = GROUP) -> QuantizedWeight:
    """With every code, zero points from 0 to 15, and negative scales."""
    generator = torch.Generator().manual_seed(group_size)
    groups = 1 if group_size == -1 else N // group_size
    zeros = torch.full((M, groups), 8) if symmetric else torch.randint(16, (M, groups), generator=generator)
    return QuantizedWeight(
        codes=torch.randint(16, (M, N), generator=generator).to(torch.uint8),
        scales=(torch.randn(M, groups, generator=generator) / 8).half(),
        zeros=zeros.to(torch.uint8),
        scheme=QuantScheme(group_size=group_size, symmetric=symmetric),
        loss=0.0,
        energy=1.0,
        damping=0.01,
    )


def numbers(words: Tensor) -> list[list[int]]:
    """The numbers [k][N] in int32 words [k, N/8]."""
    found = []
    for row in words.tolist():
        values = [0] * (8 * len(row))
        for i, word in enumerate(row):
            for place, output in enumerate(ORDER):
                values[8 * i + output] = (word & 0xFFFFFFFF) >> (4 * place) & 15
        found.append(values)
    return found


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_the_definition_reads_back_what_was_packed(symmetric: bool, group_size: int) -> None:
    weight = random_weight(symmetric, group_size)
    tensors = AWQ.store("x", PackedWeight.of(weight), weight.scheme, torch.bfloat16)
    groups = weight.scales.shape[1]
    described = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert described == {
        "x.qweight": (torch.int32, (N, M // 8)),
        "x.qzeros": (torch.int32, (groups, M // 8)),
        "x.scales": (torch.float16, (groups, M)),
    }
    linear = PackedLinear(bits=4, outputs=M, inputs=N, groups=groups)
    assert list(AWQ.layout("x", linear, symmetric, torch.bfloat16).items()) == list(described.items())
    codes, zeros = (torch.tensor(numbers(tensors[f"x.{part}"])).T for part in ("qweight", "qzeros"))
    assert torch.equal(codes, weight.codes.long()) and torch.equal(zeros, weight.zeros.long())
    assert torch.equal(tensors["x.scales"], weight.scales.T) and bool((weight.scales < 0).any())
    words, scales, read_zeros = AWQ.read("x", tensors.__getitem__, weight.scheme)
    assert torch.equal(unpack(words, 4).T, weight.codes) and torch.equal(read_zeros, weight.zeros) and torch.equal(scales, weight.scales)
    for name, tensor in tensors.items():
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_scales_that_fp16_cannot_hold_are_refused() -> None:
    words, scales, zeros = PackedWeight.of(random_weight())
    stored = PackedWeight(words, scales.float() * 1e-9, zeros)
    with pytest.raises(UsageError, match="x: its scales are not exact in fp16, the dtype of scales in awq"):
        AWQ.store("x", stored, QuantScheme(), torch.float16)


def scanned(folder: Path, **changes: Tensor) -> Any:
    weight = random_weight()
    tensors = AWQ.store("a.q", PackedWeight.of(weight), weight.scheme, torch.float16)
    save_file(tensors | {f"a.q.{name}": tensor for name, tensor in changes.items()}, folder / "x.safetensors")
    return scan_shard(folder / "x.safetensors", AWQ)


def test_a_shard_is_described_by_its_tensors_alone(tmp_path: Path) -> None:
    found = scanned(tmp_path)
    assert found.problems == () and found.linears == {"a.q": PackedLinear(bits=4, outputs=M, inputs=N, groups=3)}
    zeros = random_weight().zeros
    assert found.zeros == {"a.q": (int(zeros.min()), int(zeros.max()))}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scales": torch.zeros(3, M).half()}, "tensor a.q.scales holds a scale of 0"),
        ({"scales": torch.full((3, M), float("inf")).half()}, "tensor a.q.scales holds NaN or Inf"),
        ({"scales": torch.ones(3, M - 8).half()}, "tensor a.q.qweight: its shape or dtype does not match those of qzeros and scales"),
        ({"qzeros": torch.ones(2, M // 8).int()}, "tensor a.q.qweight: its shape or dtype does not match those of qzeros and scales"),
        ({"qzeros": torch.ones(3, M // 8).float()}, "tensor a.q.qweight: its shape or dtype does not match those of qzeros and scales"),
        ({"qweight": torch.ones(97, M // 8).int()}, "tensor a.q.qweight: its shape or dtype does not match those of qzeros and scales"),
    ],
)
def test_values_and_shapes_that_no_reader_can_use(changes: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    (problem,) = scanned(tmp_path, **changes).problems
    assert problem.startswith(said)
    if "shape" in said:
        with pytest.raises(CheckpointError):
            AWQ.geometry("a.q", read_header(tmp_path / "x.safetensors")[0])


LINEARS = tuple(f"model.layers.{i}.mlp.{name}" for i in (1, 10) for name in ("gate_proj", "up_proj", "down_proj"))
EXPERTS = tuple(f"model.layers.2.mlp.experts.{e}.{name}" for e in (0, 1) for name in ("gate_proj", "up_proj", "down_proj"))


def config(**changes: Any) -> dict[str, Any]:
    scheme = QuantScheme(group_size=GROUP)
    given: dict[str, Any] = {
        "scheme": scheme,
        "rules": (),
        "packed": dict.fromkeys(LINEARS, scheme),
        "left_out": (),
        "others": ("lm_head",),
    }
    return AWQ.config(Quantization(**{**given, "head": None, "meta": {"quantizer": ["bigq:1"]}, **changes}))


def test_the_config_is_the_one_that_readers_know() -> None:
    assert config() == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "lm_head": False,
        "modules_to_not_convert": ["lm_head"],
        "dynamic": {},
        "meta": {"quantizer": ["bigq:1"], "symmetric": True},
    }
    assert config(others=(), head="lm_head")["lm_head"] is True


def test_the_group_size_is_that_of_the_packed_linears() -> None:
    assert config(packed=dict.fromkeys(LINEARS, QuantScheme(group_size=-1)))["group_size"] == -1
    with pytest.raises(ValueError, match="one group size"):
        config(packed={LINEARS[0]: QuantScheme(group_size=32), LINEARS[1]: QuantScheme(group_size=64)})


def vllm_skips(prefix: str, names: list[str], parts: tuple[str, ...] = ()) -> bool:
    """How vLLM 0.32 looks a module up (``is_layer_skipped``, "substring"), by the names of the parts of a fused one."""
    last = prefix.rpartition(".")[2]
    if not parts or any(name in prefix for name in names):
        return any(name in prefix for name in names)
    return all(any(name in prefix.replace(last, part) for name in names) for part in parts)


def test_no_name_catches_a_packed_linear() -> None:
    others = ("lm_head", "model.layers.1.mlp.gate", "model.layers.2.mlp.gate", "model.layers.2.mlp.shared_expert_gate")
    names = config(
        packed=dict.fromkeys((*LINEARS, *EXPERTS), QuantScheme(group_size=GROUP)), others=others, apart=("model.layers.1", "mtp")
    )["modules_to_not_convert"]
    # Layer 1 has a packed gate_proj, in which readers would find the name of its router. It gets a dot, which helps paths only.
    assert names == ["lm_head", "model.layers.1.mlp.gate.", "model.layers.2.mlp.gate", "model.layers.2.mlp.shared_expert_gate", "mtp"]
    for name in (*LINEARS, "model.layers.2.mlp.experts"):
        assert not vllm_skips(name, names)
    assert not vllm_skips("model.layers.1.mlp.gate_up_proj", names, ("gate_proj", "up_proj"))
    assert vllm_skips("model.layers.2.mlp.gate", names) and vllm_skips("mtp.fc", names)


def test_a_path_that_begins_like_a_packed_linear_ends_with_a_dot() -> None:
    names = config(apart=("model.layers.100", "model.layers.1.mlp.up"))["modules_to_not_convert"]
    assert names == ["lm_head", "model.layers.1.mlp.up.", "model.layers.100"]
    assert vllm_skips("model.layers.100.mlp.up_proj", names) and not vllm_skips("model.layers.10.mlp.up_proj", names)


def test_a_bank_that_stays_unquantized_is_named_once() -> None:
    assert config(others=EXPERTS)["modules_to_not_convert"] == ["model.layers.2.mlp.experts"]


def test_a_clash_of_names_is_told() -> None:
    assert AWQ.clash(LINEARS, ["lm_head", "model.layers.1.mlp.gate"]) == ("model.layers.1.mlp.gate", LINEARS[0])
    fused = AWQ.clash([f"h.self_attn.{part}_proj" for part in "qkv"], ["h.self_attn.qkv"])
    assert fused == ("h.self_attn.qkv", "h.self_attn.qkv_proj")
    assert AWQ.clash(EXPERTS, ["model.layers.2.mlp.gate", *LINEARS]) is None
    assert FORMATS["gptq"].clash(LINEARS, ["model.layers.1.mlp.gate"]) is None


def test_gptqmodel_finds_what_is_left_out_in_dynamic() -> None:
    """It does not look at ``modules_to_not_convert``."""
    rules = (Rule(r".*o_proj", None), Rule.parse(r".*up_proj:sym=false"))
    assert config(rules=rules, left_out=(LINEARS[0],))["dynamic"] == {r"-:^model\.layers\.1\.mlp\.gate_proj$": {}, "-:.*o_proj": {}}


@pytest.mark.parametrize(
    ("m", "scheme", "more", "kind", "said"),
    [
        (64, {"bits": 8}, {}, "bits", "is quantized at 8 bits, but awq holds 4 bits only"),
        (64, {"group_size": 16}, {}, "group_size", "is quantized in groups of 16, which readers of awq do not take"),
        (64, {"group_size": 256}, {}, "group_size", "is quantized in groups of 256, which readers of awq do not take"),
        (64, {"group_size": -1}, {"expert": True}, "group_size", "is of experts quantized in whole rows, which readers of awq do not take"),
        (64, {}, {"transposed": True}, "transposed", "is stored transposed (Conv1D), which readers of awq do not support"),
        (40, {}, {}, "shape", "is 40 × 256, but packed dimensions must be multiples of 32"),
        (64, {}, {"joined": True}, "joined", "is part of experts whose gate and up are one Linear, for which awq has no names"),
    ],
)
def test_what_does_not_fit(m: int, scheme: dict[str, Any], more: dict[str, bool], kind: Any, said: str) -> None:
    assert AWQ.misfit(m, 256, QuantScheme(**{"group_size": 32, **scheme}), **more) == Misfit(kind, said)


def test_what_fits() -> None:
    for size in (-1, 32, 64, 128):
        for symmetric in (True, False):
            assert AWQ.misfit(64, 256, QuantScheme(group_size=size, symmetric=symmetric)) is None
    assert AWQ.misfit(64, 256, QuantScheme(group_size=64), expert=True) is None
    said = "is quantized in groups of 64, but awq has one group size for all Linears, which are in whole rows"
    assert AWQ.other_size(QuantScheme(group_size=64), -1) == Misfit("group_size", said)
    assert AWQ.other_size(QuantScheme(), 128) is None and FORMATS["gptq"].other_size(QuantScheme(), 64) is None


def test_it_reads_the_config_it_writes() -> None:
    asymmetric = QuantScheme(group_size=GROUP, symmetric=False)
    for packed, symmetric in ((dict.fromkeys(LINEARS, QuantScheme(group_size=GROUP)), True), (dict.fromkeys(LINEARS, asymmetric), False)):
        schemes = read_schemes(PATH, config(packed=packed))
        assert schemes.format is AWQ and schemes.scheme(LINEARS[0]) == QuantScheme(group_size=GROUP, symmetric=symmetric)
    mixed = config(packed={LINEARS[0]: QuantScheme(group_size=GROUP), LINEARS[1]: asymmetric})
    assert read_schemes(PATH, mixed).scheme(LINEARS[0]).symmetric is False


OTHERS = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}


@pytest.mark.parametrize(
    ("change", "scheme"),
    [
        ({}, QuantScheme(symmetric=False)),
        ({"version": "GEMM", "group_size": -1}, QuantScheme(symmetric=False, group_size=-1)),
        ({"sym": True, "meta": {"quantizer": "x"}}, QuantScheme(symmetric=False)),  # transformers adds its default of sym
        ({"zero_point": False, "sym": True}, QuantScheme()),  # GPTQModel
        ({"group_size": None, "q_group_size": 64}, None),
    ],
    ids=str,
)
def test_configs_of_other_programs(change: dict[str, Any], scheme: QuantScheme | None) -> None:
    if scheme is None:
        with pytest.raises(CheckpointError, match="group_size is None, not an integer; fetch it again"):
            read_schemes(PATH, OTHERS | change)
    else:
        assert read_schemes(PATH, OTHERS | change).scheme("model.layers.0.mlp.up_proj") == scheme


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "gemv"}, "awq, version 'gemv', 4 bits"),
        ({"version": "gemv_fast"}, "awq, version 'gemv_fast', 4 bits"),
        ({"bits": 8}, "awq, version 'gemm', 8 bits"),
    ],
)
def test_other_versions_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        read_schemes(PATH, OTHERS | change)
    assert f"model: is already quantized ({said}); of awq, bigq reads version gemm at 4 bits" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"group_size": 12}, "must be -1 or a positive multiple of 8"),
        ({"group_size": "128"}, "group_size is '128', not an integer"),
        ({"zero_point": "yes"}, "zero_point is 'yes', not a boolean"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head', not a list of names"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert is [1], not a list of names"),
    ],
)
def test_a_damaged_config_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        read_schemes(PATH, OTHERS | change)
    assert str(raised.value).startswith(f"{PATH}: quantization_config: ") and said in str(raised.value)
