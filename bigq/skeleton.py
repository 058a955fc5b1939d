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

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.index import read_json_object

#: Freshly made tensors above this size go straight to meta: they are parameters on their way to being registered.
_LARGE_BYTES = 2**28


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model folder, without its ``quantization_config``. Raises CheckpointError,
    UnsupportedModelError."""
    raw = read_json_object(folder / "config.json")
    if not isinstance(raw.get("model_type"), str):
        raise CheckpointError(f"{folder / 'config.json'}: has no model_type, so the architecture is unknown")
    if raw.get("auto_map") and not trust_remote_code:
        from transformers import CONFIG_MAPPING

        if raw["model_type"] not in CONFIG_MAPPING:
            raise UnsupportedModelError(
                f"{folder}: model type {raw['model_type']!r} comes with code of its own; pass --trust-remote-code to run it"
            )
    from transformers import AutoConfig

    # transformers raises anything from KeyError to its own validation errors for a config with wrong values.
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        if "model type" in str(error) or raw["model_type"] in str(error):
            raise UnsupportedModelError(
                f"{folder}: transformers does not know model type {raw['model_type']!r}: {_one_line(error)}"
            ) from error
        raise CheckpointError(f"{folder / 'config.json'}: is not a valid configuration: {_one_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def compute_dtype(config: Any, wanted: str, stored: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype of the forward passes: as wanted, else the config's, else that of the first floating tensor stored."""
    if wanted != "auto":
        return _dtype(wanted)
    declared = getattr(config, "dtype", None)
    if declared is not None:
        return _dtype(declared)
    return next((d for d in stored if d.is_floating_point), torch.float32)


def build(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False, initialised: bool = True) -> nn.Module:
    """The causal language model of a config, parameters on meta, in evaluation mode. Raises UnsupportedModelError.

    initialised False: where only shapes matter; buffers that a model fills in as it initialises its weights are undefined.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    # Same reason as in load_config: a model's constructor may raise anything for a config that it does not like.
    try:
        with _parameters_on_meta(), contextlib.nullcontext() if initialised else no_init_weights():
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UnsupportedModelError(f"transformers cannot build a causal language model from this config: {_one_line(error)}") from error
    if not initialised:
        model.tie_weights()  # type: ignore[operator]
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


def silence() -> None:
    """Stop transformers from printing to the terminal: bigq reports in its own words."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def is_linear(module: nn.Module) -> bool:
    """An ``nn.Linear`` (or subclass), or GPT-2's Conv1D, which is a Linear stored transposed."""
    return isinstance(module, nn.Linear) or stored_transposed(module)


def stored_transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_weight(module: nn.Module) -> Tensor:
    """A Linear's weight as a [outputs, inputs] view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if stored_transposed(module) else weight


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
            f"the model's dtype is {value}; bigq computes in float32, bfloat16 or float16 (choose one with --dtype)"
        )
    return dtype


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


class _LargeToMeta(TorchFunctionMode):
    """Sends large uninitialized or constant tensors to meta, so that they never ask for address space."""

    _FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._FACTORIES and kwargs.get("device") is None:
            size = kwargs.get("size", args[0] if args and isinstance(args[0], (tuple, list)) else args)
            if all(isinstance(s, int) for s in size) and math.prod(size) * 4 > _LARGE_BYTES:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and param.device.type != "meta":
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with _LargeToMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
