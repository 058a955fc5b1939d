"""The transformers model with its parameters on the meta device, and the mapping of checkpoint names onto it.

Only this room and ``calibration`` import transformers. Parameters move to meta as they are registered, while buffers are computed:
rotary tables, embedding scales and ALiBi slopes have the values that ``from_pretrained`` would compute. Ties between parameters
survive. A model of 176 billion parameters takes a few MiB.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bigq.errors import BigqError, CheckpointError, UnsupportedModelError
from bigq.io.json_file import read_json_object, show_name, show_value
from bigq.machine.memory import return_freed_memory
from bigq.model.architecture import ONLY, auto_class, broken_code, error_line, not_causal, refuse_diffusion, require_causal
from bigq.model.config import check_config, uses_hub_kernels
from bigq.model.experts.flat import gather_banks, moved_names
from bigq.model.experts.spare import trim_banks

#: New tensors above this size are made on meta at once: they are parameters that are about to be registered.
_LARGE_BYTES = 2**28
#: The largest buffer allowed. The largest in a published model, a mask of 8192 positions, has 256 MiB.
_MAX_BUFFER_BYTES = 2**30
#: The most parameters of a model without a checkpoint to compare with. Llama-3.1-405B has 1137; experts are stored together.
_MAX_PARAMETERS = 20_000
#: The steps of a rule that exchanges the last two dimensions of [experts, inputs, outputs] where the shape asks for it.
_TURN = (("Transpose", (1, 2, True)),)
#: Bytes of parameters after which the memory that they had before they moved to meta is returned: heaps of small models stay as they are.
_RETURN_BYTES = 2**30


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model folder, without its ``quantization_config``.

    Raises CheckpointError, UnsupportedModelError.
    """
    path = folder / "config.json"
    raw = read_json_object(path)
    refuse_diffusion(path, raw)
    if not isinstance(raw.get("model_type"), str):
        raise CheckpointError(f"{path}: has no model_type, so the architecture is unknown; {ONLY}")
    check_config(path, raw, trust_remote_code=trust_remote_code)
    packing = raw.get("quantization_config")
    if packing is not None and not isinstance(packing, dict):
        raise CheckpointError(f"{path}: quantization_config is {show_value(packing)}, not an object; fetch it again")
    kind = show_value(raw["model_type"])
    if raw.get("auto_map") and not trust_remote_code:
        from transformers import CONFIG_MAPPING

        if raw["model_type"] not in CONFIG_MAPPING:
            raise UnsupportedModelError(f"{folder}: model type {kind} needs the checkpoint's own code; pass --trust-remote-code to run it")
    from transformers import AutoConfig

    # For a config with wrong values transformers may raise anything, from KeyError to its own validation errors.
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        if trust_remote_code and raw.get("auto_map") and isinstance(error, (OSError, ImportError, SyntaxError)):
            raise UnsupportedModelError(broken_code(folder, raw, error)) from error
        if "model type" in str(error) or raw["model_type"] in str(error):
            from transformers import CONFIG_MAPPING, __version__

            if raw["model_type"] not in CONFIG_MAPPING:
                raise UnsupportedModelError(
                    f"{folder}: transformers {__version__} does not know model type {kind}; install a transformers that does, or correct "
                    "model_type in config.json"
                ) from error
            raise UnsupportedModelError(f"{folder}: transformers cannot read model type {kind}: {error_line(error)}") from error
        raise CheckpointError(f"{path}: is not a valid configuration: {error_line(error)}") from error
    require_causal(path, raw, config, trust_remote_code=trust_remote_code)
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    if uses_hub_kernels(raw) and not trust_remote_code:
        # transformers would fetch kernels from the hub and run them, also for flash attention that is not installed. None: its default.
        config._attn_implementation = None
        config._experts_implementation = None
    return config


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers of a model whose parameters are on meta."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def compute_dtype(config: Any, wanted: str, stored: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype of the forward passes: ``wanted``; for "auto" the config's, or else that of the first stored floating-point tensor."""
    if wanted != "auto":
        return _dtype(wanted)
    declared = getattr(config, "dtype", None)
    if declared is not None:
        return _dtype(declared)
    return next((d for d in stored if d.is_floating_point), torch.float32)


def build(
    config: Any,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
    initialised: bool = True,
    max_parameters: int = _MAX_PARAMETERS,
) -> nn.Module:
    """The causal language model of a config, or the composite model with it, with parameters on meta, in evaluation mode.

    initialised: False leaves buffers undefined that the model fills in when it initialises its weights; for callers that need shapes only.
    max_parameters: the largest number of parameter tensors. Raises UnsupportedModelError; CheckpointError for more, or for large buffers.
    """
    import transformers
    from transformers.initialization import no_init_weights

    # As in load_config: a model's constructor may raise anything for a config with wrong values.
    try:
        with _parameters_on_meta(max_parameters), contextlib.nullcontext() if initialised else no_init_weights():
            auto = getattr(transformers, auto_class(config))
            model: nn.Module = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except BigqError:
        raise
    except Exception as error:
        if (reason := not_causal(config)) is not None:
            raise UnsupportedModelError(reason) from error
        raise UnsupportedModelError(f"transformers cannot build a language model from this config: {error_line(error)}") from error
    if any(param.ndim == 3 for param in model.parameters()) and getattr(model, "_can_set_experts_implementation", bool)():
        # One expert after the other: only this can be computed expert by expert with the same bits.
        model.set_experts_implementation("eager")  # type: ignore[operator]
    gather_banks(model)
    trim_banks(model)
    if not initialised:
        model.tie_weights()  # type: ignore[operator]
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):  # it reads token ids, which have no values on meta
            module.__dict__["warn_if_padding_and_no_attention_mask"] = _no_warning
    return model.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Merge:
    """A stored tensor that transformers merges with others into the parameter ``target``.

    place, places: which of the rule's kinds of tensors it is. steps: the rule's operations and the dimension that each works on.
    targets: all parameters that the rule makes, ``target`` first.
    """

    target: str
    place: int
    places: int
    steps: tuple[tuple[str, Any], ...]
    targets: tuple[str, ...]

    def at(self, target: str) -> Merge:
        """The merger for one of the parameters that a rule makes, of which this one has the patterns in place of names."""
        targets = tuple(target.replace(self.targets[0], pattern) for pattern in self.targets)
        return Merge(target, self.place, self.places, self.steps, targets)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the tensors of a checkpoint go, by their names in it. whole: the parameter or buffer that a tensor is, as it is stored.

    turned: those of whole whose last two dimensions are exchanged where that gives the parameter's shape. merged: how transformers merges
    others. Tensors that the model has no place for are in neither.
    """

    whole: Mapping[str, str]
    merged: Mapping[str, Merge]
    turned: frozenset[str] = frozenset()


def place(model: nn.Module, names: Iterable[str]) -> Placement:
    """Where tensors go, by the renamings and mergers that transformers applies on loading."""
    places = model.state_dict()
    rules = _merging_rules(model)
    whole: dict[str, str] = {}
    merged: dict[str, Merge] = {}
    for name, (target, pattern) in _renamed(model, names).items():
        if target not in places:
            continue
        if pattern is None:
            whole[name] = target
        else:
            merged[name] = rules[pattern].at(target)
    turned = frozenset(name for name, merge in merged.items() if merge.steps == _TURN)
    whole |= {name: merged.pop(name).target for name in turned}
    return Placement(whole, merged, turned)


def map_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Checkpoint name → parameter or buffer name, for every tensor that the model uses as it is stored: see ``place``."""
    return dict(place(model, names).whole)


def unplaced_names(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """For names of tensors that the model has no place for: the name that transformers' renaming rules make of each, and whether
    transformers expects it in checkpoints of this class, so that its loader ignores it without a warning."""
    renamed = {name: target for name, (target, _) in _renamed(model, names).items()}
    found = SimpleNamespace(missing_keys=set(), unexpected_keys=set(renamed.values()))
    for patterns in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
        # Models with code of their own may have left these as lists.
        model.__dict__[patterns] = set(getattr(model, patterns, None) or ())
    model._adjust_missing_and_unexpected_keys(found)  # type: ignore[operator]
    return {name: (target, target not in found.unexpected_keys) for name, target in renamed.items()}


def _renamed(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """Checkpoint name → the name that transformers' renaming rules make of it, and the rule that would merge or split the tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    moved = moved_names(model)
    places = model.state_dict() | {name: model.get_parameter(target) for name, target in moved.items()}
    prefix = model.base_model_prefix
    result: dict[str, tuple[str, str | None]] = {}
    for name in names:
        target, converter = rename_source_key(name, renamings, converters, prefix, places)
        if target not in places and name in places:
            target, converter = name, None
        result[name] = moved.get(target, target), converter
    return result


def _merging_rules(model: nn.Module) -> dict[str, Merge]:
    """Each pattern of the rules by which transformers merges tensors, with the merger that ``Merge.at`` completes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    found: dict[str, Merge] = {}
    for rule in get_model_conversion_mapping(model):
        if isinstance(rule, WeightConverter):
            steps = tuple((type(step).__name__, _dimensions(step)) for step in rule.operations)
            for i, pattern in enumerate(rule.source_patterns):
                found.setdefault(pattern, Merge("", i, len(rule.source_patterns), steps, tuple(rule.target_patterns)))
    return found


def _dimensions(step: Any) -> Any:
    """What an operation of a rule works on: a dimension, or for Transpose two and whether only where the shape asks for it."""
    return tuple(getattr(step, n, None) for n in ("dim0", "dim1", "check_dims")) if hasattr(step, "dim0") else getattr(step, "dim", None)


def forced_dtypes(model: nn.Module, dtype: torch.dtype, names: Iterable[str]) -> dict[str, torch.dtype]:
    """The dtypes of parameters that transformers keeps in another dtype than the model's (its ``keep_in_fp32`` lists)."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)  # type: ignore[operator]
    if not plan:
        return {}
    from transformers.core_model_loading import build_glob_alternation

    pattern, groups, _ = build_glob_alternation(list(plan))
    result = {}
    for name in names:
        match = pattern.search(name)
        if match is not None and match.lastgroup is not None:
            result[name] = plan[groups[match.lastgroup]]
    return result


def silence_transformers() -> None:
    """Turn off transformers' log messages and progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an ``nn.Linear`` (or subclass) or GPT-2's Conv1D, which is a Linear stored transposed."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def linears(model: nn.Module) -> tuple[str, ...]:
    """Module names of every ``nn.Linear`` of a model, inside and outside the blocks."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))


def is_transposed(module: nn.Module) -> bool:
    """Whether a Linear stores its weight as [inputs, outputs]: GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_weight(module: nn.Module) -> Tensor:
    """A Linear's weight as a [outputs, inputs] view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if is_transposed(module) else weight


def set_linear_weight(module: nn.Module, weight: Tensor) -> None:
    """Overwrite a Linear's weight in place with ``weight`` [outputs, inputs] of the same dtype."""
    linear_weight(module).copy_(weight)


def _dtype(value: Any) -> torch.dtype:
    dtype = value if isinstance(value, torch.dtype) else getattr(torch, str(value), None)
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedModelError(
            f"the model's dtype is {show_name(str(value))}; bigq computes in float32, bfloat16 or float16 (choose one with --dtype)"
        )
    return dtype


def _no_warning(*_: Any) -> None:
    """Replaces a method that warns."""


class _LargeTensorsToMeta(TorchFunctionMode):
    """Makes large uninitialized or constant tensors on meta, so that they take no address space.

    Other calls that might make a large tensor run on meta first. Raises CheckpointError where the result would be too large.
    """

    _FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._FACTORIES and kwargs.get("device") is None:
            size = kwargs.get("size", args[0] if args and isinstance(args[0], (tuple, list)) else args)
            if all(isinstance(s, int) for s in size) and math.prod(size) * 4 > _LARGE_BYTES:
                kwargs["device"] = "meta"
        elif _element_bound((*args, *kwargs.values())) > _MAX_BUFFER_BYTES // 8:
            _refuse_large_buffer(func, args, kwargs)
        return func(*args, **kwargs)


def _element_bound(values: Iterable[Any]) -> int:
    """An upper bound of the elements in the result of a call with these arguments: the product of all sizes and numbers in them."""
    product = 1
    for value in values:
        if isinstance(value, Tensor):
            product *= 1 if value.is_meta else max(1, value.numel())
        elif isinstance(value, (tuple, list)):
            product *= _element_bound(value)
        elif isinstance(value, (int, float)) and value > 1 and math.isfinite(value):
            product *= math.ceil(value)
    return product


def _refuse_large_buffer(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    def on_meta(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(on_meta(v) for v in value)
        return value.to("meta") if isinstance(value, Tensor) else value

    named = {name: on_meta(value) for name, value in kwargs.items()}
    if not any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        named["device"] = "meta"
    try:
        result = func(*on_meta(args), **named)
    except (RuntimeError, TypeError, ValueError):
        return  # the call cannot run on meta, or fails anyway
    if isinstance(result, Tensor) and result.untyped_storage().nbytes() > _MAX_BUFFER_BYTES:
        raise CheckpointError(
            f"config.json asks for a buffer {list(result.shape)} of {result.untyped_storage().nbytes()} bytes, above the limit of "
            f"{_MAX_BUFFER_BYTES}; correct its sizes"
        )


@contextlib.contextmanager
def _parameters_on_meta(max_parameters: int) -> Iterator[None]:
    register = nn.Module.register_parameter
    registered = moved = 0

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal registered, moved
        registered += 1
        if registered > max_parameters:
            raise CheckpointError(
                f"config.json describes a model of more than {max_parameters} tensors, which the checkpoint does not hold; correct it"
            )
        register(self, name, param)
        if param is not None and param.device.type != "meta":
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)
            moved += param.nbytes
        if moved > _RETURN_BYTES:
            # Small allocations between them kept 400 MiB of the zeros that 121 routers of DeepSeek-V3's shape begin with.
            return_freed_memory()
            moved = 0

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with _LargeTensorsToMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
