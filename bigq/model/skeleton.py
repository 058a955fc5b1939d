"""The transformers model with its parameters on the meta device, and how checkpoint names map onto it.

This module (with ``calibration``) is the only one that knows transformers. Parameters are put on meta as they are
registered while buffers are really computed: rotary tables, embedding scales and ALiBi slopes are what
``from_pretrained`` would compute, ties between parameters survive, and 176 billion parameters cost a few MiB.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bigq.errors import BigqError, CheckpointError, UnsupportedModelError
from bigq.io.json_file import read_json_object, show_name, show_value
from bigq.model.config import check_config, uses_hub_kernels

#: Freshly made tensors above this size go straight to meta: they are parameters on their way to being registered.
_LARGE_BYTES = 2**28
#: Buffers are really computed. The largest of a published model, a mask of 8192 positions, has 256 MiB.
_MAX_BUFFER_BYTES = 2**30
#: Parameters of a model without a checkpoint to compare with. Llama-3.1-405B has 1137; experts are stored together.
_MAX_PARAMETERS = 20_000


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model folder, without its ``quantization_config``. Raises CheckpointError,
    UnsupportedModelError."""
    path = folder / "config.json"
    raw = read_json_object(path)
    if not isinstance(raw.get("model_type"), str):
        raise CheckpointError(f"{path}: has no model_type, so the architecture is unknown")
    check_config(path, raw, trust_remote_code=trust_remote_code)
    kind = show_value(raw["model_type"])
    if raw.get("auto_map") and not trust_remote_code:
        from transformers import CONFIG_MAPPING

        if raw["model_type"] not in CONFIG_MAPPING:
            raise UnsupportedModelError(f"{folder}: model type {kind} comes with code of its own; pass --trust-remote-code to run it")
    from transformers import AutoConfig

    # transformers raises anything from KeyError to its own validation errors for a config with wrong values.
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        if "model type" in str(error) or raw["model_type"] in str(error):
            raise UnsupportedModelError(f"{folder}: transformers does not know model type {kind}: {_error_line(error)}") from error
        raise CheckpointError(f"{path}: is not a valid configuration: {_error_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    if uses_hub_kernels(raw) and not trust_remote_code:
        # Kernels of a hub, and flash attention where it is not installed, would be fetched and run. None is transformers' own choice.
        config._attn_implementation = None
        config._experts_implementation = None
    return config


def compute_dtype(config: Any, wanted: str, stored: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype of the forward passes: as wanted, else the config's, else that of the first floating tensor stored."""
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
    """The causal language model of a config, parameters on meta, in evaluation mode.

    initialised False: where only shapes matter; buffers that a model fills in as it initialises its weights are undefined.
    max_parameters: the limit. Raises UnsupportedModelError; CheckpointError for more parameters than that or for large buffers.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    # Same reason as in load_config: a model's constructor may raise anything for a config that it does not like.
    try:
        with _parameters_on_meta(max_parameters), contextlib.nullcontext() if initialised else no_init_weights():
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except BigqError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"transformers cannot build a causal language model from this config: {_error_line(error)}") from error
    if not initialised:
        model.tie_weights()  # type: ignore[operator]
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):  # it looks at token ids, which a model on meta has none of
            module.__dict__["warn_if_padding_and_no_attention_mask"] = _no_warning
    return model.eval().requires_grad_(False)


def map_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Checkpoint name → parameter or buffer name, for every name that the model has a place for.

    Follows the renamings that transformers applies on loading. Raises UnsupportedModelError where a tensor would
    have to be merged or split (as for fused experts).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    places = model.state_dict()
    prefix = model.base_model_prefix
    result = {}
    for name in names:
        target, converter = rename_source_key(name, renamings, converters, prefix, places)
        if target not in places and name in places:
            target, converter = name, None
        if converter is not None:
            raise UnsupportedModelError(
                f"tensor {name} needs {converter!r} merged or split on loading; mixture-of-experts models are not supported yet"
            )
        if target in places:
            result[name] = target
    return result


def forced_dtypes(model: nn.Module, dtype: torch.dtype, names: Iterable[str]) -> dict[str, torch.dtype]:
    """Parameters that transformers keeps in another dtype than the model's (its ``keep_in_fp32`` lists)."""
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
    """Stop transformers from printing to the terminal: bigq reports in its own words."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def is_linear(module: nn.Module) -> bool:
    """An ``nn.Linear`` (or subclass), or GPT-2's Conv1D, which is a Linear stored transposed."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def linears(model: nn.Module) -> tuple[str, ...]:
    """Module names of every ``nn.Linear`` of a model, in blocks and outside."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))


def is_transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_weight(module: nn.Module) -> Tensor:
    """A Linear's weight as a [outputs, inputs] view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if is_transposed(module) else weight


def set_linear_weight(module: nn.Module, weight: Tensor) -> None:
    """Replace a Linear's weight by values [outputs, inputs] of the same dtype, in place."""
    linear_weight(module).copy_(weight)


def max_positions(config: Any) -> int | None:
    """The longest sequence that the model has positions for; None where it says nothing."""
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _dtype(value: Any) -> torch.dtype:
    dtype = value if isinstance(value, torch.dtype) else getattr(torch, str(value), None)
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedModelError(
            f"the model's dtype is {show_name(str(value))}; bigq computes in float32, bfloat16 or float16 (choose one with --dtype)"
        )
    return dtype


def _no_warning(*_: Any) -> None:
    """In place of a warning."""


def _error_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300] if text.isprintable() else show_value(text)}"


class _LargeTensorsToMeta(TorchFunctionMode):
    """Sends large uninitialized or constant tensors to meta, so that they never ask for address space.

    Other calls that might make a large tensor are tried on meta first. Raises CheckpointError where it would be too large.
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
    """No call with these arguments makes a tensor of more elements in memory: the product of all sizes and numbers in them."""
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
        return  # what cannot be tried without making it, or not at all
    if isinstance(result, Tensor) and result.untyped_storage().nbytes() > _MAX_BUFFER_BYTES:
        raise CheckpointError(
            f"config.json makes the model hold a buffer {list(result.shape)} of {result.untyped_storage().nbytes()} bytes; "
            "its sizes are taken for a mistake, correct them"
        )


@contextlib.contextmanager
def _parameters_on_meta(max_parameters: int) -> Iterator[None]:
    register = nn.Module.register_parameter
    registered = 0

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal registered
        registered += 1
        if registered > max_parameters:
            raise CheckpointError(
                f"config.json makes a model of more than {max_parameters} tensors, which the checkpoint does not hold; correct it"
            )
        register(self, name, param)
        if param is not None and param.device.type != "meta":
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with _LargeTensorsToMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
