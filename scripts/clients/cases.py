"""The cases that clients read: a tiny model, bigq's output of it, and what a client must find in that output.

The folder of a case holds

    model/                  the source, in fp16: the same values whether it is read in fp16 or fp32
    out/                    bigq's output, quantized on 16 × 40 random tokens, with experts on 64 × 40
    expected.safetensors    ids int64 [N, T]; logits fp32 [N, T, V] of the dense model with bigq's dequantized weights, rounded to
                            fp16 as readers store them, computed in fp32 (in w8a8-int8 and fp8: not rounded, but inputs are, to int8
                            with the largest number that the client module names, 127 if it names none, or to E4M3; in nvfp4-w4a4
                            to E2M1, by inverses if the client module says so);
                            original: the logits of the source; weight.NAME fp32 [outputs, inputs] of every packed Linear, not rounded
    case.json               names of the packed Linears, and the settings that the client module has for its reader
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from composite_families import COMPOSITE, make_composite, reference_composite
from models import (
    linear_module,
    logits_of,
    make_checkpoint,
    matrix,
    random_ids,
    reference_model,
    save_ids,
    stored_tensors,
    word_tokenizer,
)
from moe_families import MOE_FAMILIES, moe_model

from bigq.cli.main import main as bigq
from bigq.io.reader import read_tensor
from bigq.kernels.grid import find_grid, nearest
from bigq.model.pager import Pager
from bigq.model.quantization import packed_schemes
from bigq.model.skeleton import is_linear
from bigq.scheme import QuantScheme

#: Sizes of models with experts that vLLM's kernel for experts takes.
_EXPERTS: Mapping[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "head_dim": 32}
#: Sizes that are multiples of all group sizes used here; the tests' own models have an intermediate size of 96.
SIZES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"intermediate_size": 128},
    "qwen2": {"intermediate_size": 128},
    "opt": {"ffn_dim": 128},
    "bloom": {},
    **dict.fromkeys(MOE_FAMILIES, _EXPERTS),
    "mixtral": _EXPERTS | {"intermediate_size": 64, "sliding_window": None},
    "gpt_oss": _EXPERTS | {"intermediate_size": 64},
    "granitemoe": _EXPERTS | {"intermediate_size": 64},
    "llama4_text": _EXPERTS | {"intermediate_size": 64, "intermediate_size_mlp": 256},
    "deepseek_v3": _EXPERTS
    | {
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "num_key_value_heads": 4,
        "topk_method": "noaux_tc",
    },
}
_IN_BLOCKS: Mapping[str, Any] = {"hidden_size": 128, "num_key_value_heads": 4, "head_dim": 32, "moe_intermediate_size": 128}
#: Sizes in blocks of 128: of all inputs, and of the outputs of what is loaded as one, except the last part. Changes of ``SIZES``.
IN_BLOCKS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64},
    "qwen2": {"hidden_size": 256, "intermediate_size": 256},
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 256},
    "bloom": {"hidden_size": 128},
    **dict.fromkeys(("qwen3_moe", "glm4_moe"), _IN_BLOCKS),
    "mixtral": _IN_BLOCKS | {"intermediate_size": 128},
    "deepseek_v3": _IN_BLOCKS | {"q_lora_rank": 128, "kv_lora_rank": 128},
}
CALIBRATION = ("--seqlen", "40", "--dtype", "float32")
#: Rows of calibration; an expert sees only the tokens that are routed to it.
ROWS, ROWS_WITH_EXPERTS = 16, 64
EVALUATED_ROWS = 4

#: Largest error of a weight, relative to the error of rounding to nearest.
FARTHEST = 2.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """name: of the row and of the folder. family, model: the family of the tiny model, and its changed config values.

    flags: options of ``bigq quantize``. reader: settings for the client's reader.
    """

    name: str
    family: str
    flags: tuple[str, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    reader: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A program that reads bigq's output.

    name: of the results file (docs/results/clients_NAME.json); venv: of its virtual environment, the same name if empty.
    reader: a script in this folder. The environment's own Python runs it, without bigq, as ``reader RESULTS FOLDER…``. It appends
    a JSON line to RESULTS for each case and way of reading, {"case": …, "route": …} and its findings, and prints {"versions": {…}}
    as its last line. environment: of the reader's process. cases: the cases that it must read.
    fails: the reason why a row is wrong; None if it is right.
    limits: regular expression for ROUTE/NAME → why the reader cannot read these cases.
    """

    name: str
    reader: str
    cases: tuple[Case, ...]
    fails: Callable[[dict[str, Any]], str | None]
    limits: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    venv: str = ""

    @property
    def home(self) -> str:
        """The folder of its virtual environment, among those of all clients."""
        return self.venv or self.name


def prepare(case: Case, work: Path) -> Path:
    """Make the folder of a case, unless it exists with the same settings. Returns the folder."""
    folder = work / case.name
    settings = {"family": case.family, "model": dict(case.model), "flags": list(case.flags), "reader": dict(case.reader)}
    described = folder / "case.json"
    if described.exists() and json.loads(described.read_text())["settings"] == settings:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    values = {**SIZES.get(case.family, {}), **case.model}
    with silent():
        if case.family in COMPOSITE:
            make_composite(folder / "model", case.family, dtype=torch.float16, **values)
        elif case.family in MOE_FAMILIES:
            moe_model(case.family, torch.float16, **values).save_pretrained(folder / "model")
        else:
            make_checkpoint(folder / "model", case.family, dtype=torch.float16, **values)
    word_tokenizer().save_pretrained(folder / "model")
    rows = ROWS_WITH_EXPERTS if case.family in MOE_FAMILIES else ROWS
    save_ids(folder / "calibration.safetensors", random_ids(rows))
    quantize(folder, ("--samples", str(rows), *case.flags))
    packed = write_expected(folder, case.reader.get("largest", 127), inverses=case.reader.get("inverses", False))
    described.write_text(json.dumps({"settings": settings, "packed": packed, **case.reader}, indent=2) + "\n")
    return folder


def quantize(folder: Path, flags: tuple[str, ...]) -> None:
    command = ["quantize", str(folder / "model"), str(folder / "out"), "--calibration", str(folder / "calibration.safetensors")]
    status = bigq([*command, *CALIBRATION, "--device", "cpu", "--quiet", *flags])
    if status:
        sys.exit(f"clients: bigq quantize {' '.join(flags)} ended with status {status}")


def dequantized(out: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 [outputs, inputs]) of every packed Linear, as bigq dequantizes it; matrices of experts have their names in the file."""
    pager = Pager(out, device=torch.device("cpu"), dtype="float32")
    for i in range(len(pager.blocks)):
        pager.load_block(i)
        for name in pager.block_names(i):
            if name in pager.packed:
                yield name.removesuffix(".weight"), pager.model.get_parameter(name).detach().clone()
        pager.evict_block(i)
    for bank in pager.banks.values():
        for source in bank.packed():
            yield source.name.removesuffix(".weight"), source.value(read_tensor, torch.device("cpu"), torch.float32)
    if f"{pager.head_name}.weight" in pager.packed:
        yield pager.head_name, pager.dequantized(f"{pager.head_name}.weight")


def weights_in(model: torch.nn.Module, source: Path) -> dict[str, Tensor]:
    """Views of a model's matrices [outputs, inputs], by name: of Linears, and of experts as the output names those of ``source``."""
    found = {name: matrix(linear_module(model, name)) for name, module in model.named_modules() if is_linear(module)}
    for path, bank in Pager(source, device=torch.device("cpu")).banks.items():
        for key in bank.sources:
            weights = model.get_parameter(f"{path}.{key}").data
            for e, weight in enumerate(weights.mT if bank.is_transposed(key) else weights):
                names = bank.matrices(key, e)
                found |= dict(zip(names, weight.chunk(len(names)), strict=True))
    return found


def write_expected(folder: Path, largest: float = 127, *, inverses: bool = False) -> list[str]:
    """Write expected.safetensors; returns the names of the packed Linears. largest: number of a rounded input. inverses: see ``in_fp4``."""
    weights = dict(dequantized(folder / "out"))
    with silent():
        kind = json.loads((folder / "model/config.json").read_text())["model_type"]
        model = (reference_composite if kind in COMPOSITE else reference_model)(folder / "model")
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
    ids = random_ids(EVALUATED_ROWS, seed=1)
    original = logits_of(model, ids, EVALUATED_ROWS).float().contiguous()
    said = json.loads((folder / "out/config.json").read_text())["quantization_config"]
    groups = said.get("config_groups", {})
    rounded = any(group["input_activations"] is not None and group["weights"]["num_bits"] == 4 for group in groups.values())
    blocks = any("block_structure" in group["weights"] for group in groups.values())
    variant = "fp8-block" if blocks else said.get("format")
    if rounded:
        variant = f"nvfp4-w4a4{' by inverses' * inverses}"
    schemes = packed_schemes(folder / "out")
    assert schemes is not None, "nothing is packed"
    places = weights_in(model, folder / "model")
    for name, weight in weights.items():
        require_near(name, weight, places[name], schemes.scheme(name))
        places[name].copy_(weight if variant in INPUTS else weight.to(torch.float16))
    packed = [places[name] for name in weights]
    static = input_scales(folder / "out", list(weights))
    with RoundedInputs(INPUTS[variant], largest, packed, static) if variant in INPUTS else contextlib.nullcontext():
        logits = logits_of(model, ids, EVALUATED_ROWS).float().contiguous()
    tensors = {"ids": ids, "logits": logits, "original": original} | {
        f"weight.{name}": weight.contiguous() for name, weight in weights.items()
    }
    save_file(tensors, folder / "expected.safetensors")
    return sorted(weights)


def input_scales(out: Path, names: list[str]) -> list[Tensor | None]:
    """The static scale, or global scale, of the inputs of each packed Linear; None if readers find one for each token."""
    stored = stored_tensors(out)
    return [stored.get(f"{name}.input_scale", stored.get(f"{name}.input_global_scale")) for name in names]


def in_int8(x: Tensor, largest: float, scale: Tensor | None = None) -> Tensor:
    """Inputs [..., K] as int8 numbers times a scale: the given one for all tokens, else one for each."""
    scale = x.abs().amax(-1, keepdim=True) / largest if scale is None else scale
    return torch.clamp(torch.round(x / scale), -128, 127) * scale


def in_fp8(x: Tensor, largest: float, scale: Tensor | None = None) -> Tensor:
    """The same with numbers of E4M3, which has a largest one of its own."""
    scale = x.abs().amax(-1, keepdim=True) / 448 if scale is None else scale
    return torch.clamp(x / scale, -448, 448).to(torch.float8_e4m3fn).float() * scale


def in_groups_of_fp8(x: Tensor, largest: float, scale: Tensor | None = None) -> Tensor:
    """The same with a scale for each 128 inputs too."""
    assert scale is None
    return in_fp8(x.unflatten(-1, (-1, 128)), largest).flatten(-2)


def in_fp4(x: Tensor, largest: float, scale: Tensor | None = None, *, inverses: bool = False) -> Tensor:
    """Numbers of E2M1 in groups of 16 inputs, whose scales are numbers of E4M3 divided by the given one.

    inverses: whether these are multiplied by as their inverses, as in vLLM. An input may become another number then.
    """
    assert scale is not None
    grouped = x.unflatten(-1, (-1, 16))
    of_group = grouped.abs().amax(-1, keepdim=True)
    exact = scale * (of_group * (1 / 6) if inverses else of_group / 6)
    wide = exact.clamp(max=448).to(torch.float8_e4m3fn).float()
    factor = wide * (1 / scale) if inverses else wide / scale
    scaled = grouped * (1 / factor) if inverses else grouped / factor
    points = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    middles = (points[1:] + points[:-1]) / 2
    middles[1::2] = torch.nextafter(middles[1::2], torch.zeros(3))  # ties go to numbers with an even fraction
    places = torch.bucketize(scaled.nan_to_num(0).abs(), middles)
    return (points[places] * grouped.sign() * factor).flatten(-2)


#: Variants of compressed-tensors whose readers round the inputs of Linears, and how.
INPUTS: Mapping[str, Callable[[Tensor, float, Tensor | None], Tensor]] = {
    "int-quantized": in_int8,
    "float-quantized": in_fp8,
    "fp8-block": in_groups_of_fp8,
    "nvfp4-w4a4": in_fp4,
    "nvfp4-w4a4 by inverses": functools.partial(in_fp4, inverses=True),
}


class RoundedInputs(TorchFunctionMode):
    """Rounds what some weights are multiplied with: of Linears, and of experts, whose weights are parts of one parameter. scales: static
    ones, in the order of the weights."""

    def __init__(
        self, rounded: Callable[[Tensor, float, Tensor | None], Tensor], largest: float, weights: list[Tensor], scales: list[Tensor | None]
    ) -> None:
        super().__init__()
        self._rounded, self._largest = rounded, largest
        self._scales = {weight.untyped_storage().data_ptr(): scale for weight, scale in zip(weights, scales, strict=True)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and (place := args[1].untyped_storage().data_ptr()) in self._scales:
            args = (self._rounded(args[0], self._largest, self._scales[place]), *args[1:])
        return func(*args, **(kwargs or {}))


def require_near(name: str, weight: Tensor, source: Tensor, scheme: QuantScheme) -> None:
    """Exit if a dequantized weight [N, K] is too far from its source.

    Without this check, an error that packing and reading share would become the expected value. A zero point that is off by one gives
    three times the error of rounding to nearest; GPTQ gives up to 1.7 times.
    """
    spec = dataclasses.replace(scheme.grid, symmetric=True, search=False)
    grouped = source.view(len(source), -1, scheme.group_width(source.shape[1])).permute(2, 0, 1)
    scale, zero = find_grid(grouped, spec)
    rounded = scale * nearest(grouped / scale, zero, spec)
    ratio = float((weight - source).norm() / (rounded - grouped).norm())
    if not ratio < FARTHEST:
        sys.exit(f"clients: {name} is read back {ratio:.1f} times as far from its source as rounding to nearest would be")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Discard stderr: transformers writes progress bars to it even when they are disabled."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
