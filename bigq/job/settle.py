"""Decides the settings that depend on the model, and refuses settings that do not fit it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from bigq.common_options import DEFAULT_SEQLEN
from bigq.config import DEFAULT_FORMAT, FORMAT_WITH_EXPERTS, JobConfig
from bigq.errors import UsageError
from bigq.io.formats import STATIC
from bigq.job.adapt import Adapted, adapted
from bigq.job.command import rule_option
from bigq.job.fit import Candidate, misfits, require_distinct, require_fit
from bigq.job.rules import require_sound_rules
from bigq.kernels.grid_spec import FEWEST_SCALE_BITS, SCALE_BITS
from bigq.methods import method_of
from bigq.methods.base import CalibratedMethod, Method
from bigq.mixed.groups import require_budget
from bigq.mixed.settings import mixed_groups
from bigq.model import skeleton
from bigq.model.architecture import is_composite, max_positions
from bigq.model.blocks import block_linears
from bigq.model.description import ModelDescription
from bigq.model.skeleton import linear_weight
from bigq.model.structure import MIN_FEATURES
from bigq.options import table
from bigq.scheme import QuantScheme, scheme_for
from bigq.vocabulary import DATA_FREE_METHODS, FormatName

#: The format to use instead of one that stores numbers for inputs.
FORMAT_WITHOUT_INPUTS: FormatName = "nvfp4"


def require_format(config: JobConfig) -> None:
    """Raise UsageError where the format cannot hold what the job's method produces."""
    formats = method_of(config).formats
    if config.format is not None and config.format not in formats:
        raise UsageError(f"--format {config.format}: {config.method} writes {', '.join(formats)}; use --format {formats[0]}")
    if config.made.input_suffix and config.method in DATA_FREE_METHODS:
        what, instead = _of_inputs(config)
        raise UsageError(f"{what}: needs calibration, which {config.method} has not; use --method gptq, or {instead}")


def _of_inputs(config: JobConfig) -> tuple[str, str]:
    """The option that asks for numbers for inputs, and what to do to go without."""
    if config.input_scales == "static":
        return "--input-scales static", "leave it out"
    return f"--format {config.format}", f"use --format {FORMAT_WITHOUT_INPUTS}"


def _settled_format(model: ModelDescription, config: JobConfig) -> FormatName:
    """The job's format: the given one, or the one that most readers of such a model take."""
    if config.format is not None:
        return config.format
    usual = FORMAT_WITH_EXPERTS if model.has_experts or is_composite(model.config) else DEFAULT_FORMAT
    formats = method_of(config).formats
    return usual if usual in formats else formats[0]


def row_length(model_config: object, config: JobConfig) -> int:
    """Tokens per calibration row. Raises UsageError if the model has fewer positions than requested."""
    limit = max_positions(model_config)
    if config.seqlen is None:
        return min(DEFAULT_SEQLEN, limit or DEFAULT_SEQLEN)
    if limit is not None and config.seqlen > limit:
        raise UsageError(f"--seqlen {config.seqlen}: the model has {limit} positions; use --seqlen {limit} or less")
    return config.seqlen


def settled(model: ModelDescription, config: JobConfig) -> JobConfig:
    """The job with its format and its scheme decided. Raises UsageError if it cannot tune such a model, or if its scales would not fit the
    format."""
    if config.tune_steps and model.has_experts:
        raise UsageError(f"--tune-steps {config.tune_steps}: tunes no models with experts; leave it out")
    config = dataclasses.replace(config, format=_settled_format(model, config))
    _require_possible(model, config)
    return dataclasses.replace(config, scheme=_settled_scheme(model, config))


def require_fixed(config: JobConfig, given: Iterable[str] = ()) -> None:
    """Raise UsageError, naming the option, for a value of which the format has only another.

    A default is taken for no choice, unless the field of the scheme is among those that were ``given``.
    """
    for name, only in config.made.fixed.items():
        option, value = table(QuantScheme)[name], getattr(config.scheme, name)
        if value != only and (value != option.default or name in given):
            advice = "leave it out" if option.default == only else f"use {' '.join(option.words(only))}"
            holds = f"--format {config.format} holds only {' '.join(option.words(only))}"
            raise UsageError(f"{' '.join(option.words(value))}: {holds}; {advice}")


def _require_possible(model: ModelDescription, config: JobConfig) -> None:
    """Raise UsageError, naming the option, for what the format cannot hold."""
    made, named = config.made, f"--format {config.format}"
    require_fixed(config)
    for name, only in made.fixed.items():
        option = table(QuantScheme)[name]
        rule = next((rule for rule in config.rules if (rule.overrides or {}).get(option.rule_key or "", only) != only), None)
        if rule is not None:
            raise UsageError(f"{rule_option(rule)}: {named} holds only {' '.join(option.words(only))}; leave this out of the rule")
    if config.input_scales == "static" and config.format not in STATIC:
        formats = " or ".join(f"--format {name}" for name in STATIC)
        raise UsageError(f"--input-scales static: {named} has no static scales of inputs; use {formats}, or leave it out")
    if made.scale_form != "fp16" and config.scheme.scale_bits:
        raise UsageError(f"--scale-bits {config.scheme.scale_bits}: {named} stores scales in a form of its own; leave it out")
    if made.points != "int" and config.tune_steps:
        raise UsageError(f"--tune-steps {config.tune_steps}: {named} stores no integers; leave it out")
    if config.bits_per_weight and "bits" in made.fixed:
        raise UsageError(f"--bits-per-weight {config.bits_per_weight}: {named} holds {made.fixed['bits']} bits only; leave it out")
    if model.has_experts and not made.takes_experts:
        raise UsageError(f"{named}: its readers take no experts, which {model.folder} has; use --format {FORMAT_WITH_EXPERTS}")
    if config.lm_head and not made.takes_head:
        raise UsageError(f"--lm-head: {named} holds Linears inside blocks only; leave out --lm-head")


def _settled_scheme(model: ModelDescription, config: JobConfig) -> QuantScheme:
    """The scheme of a job whose format is settled, with all settings decided. Raises UsageError if its scales would not fit the format."""
    order = config.scheme.order if method_of(config).calibrated else "natural"  # without a Hessian there is no other one
    fixed: Mapping[str, Any] = config.made.fixed
    return dataclasses.replace(config.scheme, order=order, scale_bits=_scale_bits(model, config), **fixed)


def _scale_bits(model: ModelDescription, config: JobConfig) -> int | None:
    if config.made.scale_form != "fp16":
        return None
    prefix, asked = model.blocks_path + ".", config.scheme.scale_bits
    types = {info.dtype for name, info in model.sources.items() if name.startswith(prefix) and name.endswith(".weight")}
    if config.lm_head and (head := model.sources.get(f"{model.head_name}.weight")) is not None:
        types.add(head.dtype)
    of_type = 8 if torch.bfloat16 in types else SCALE_BITS
    if asked is not None:
        if asked > of_type and config.made.scales_as_weights:
            raise UsageError(
                f"--scale-bits {asked}: {model.folder} is bf16, so --format {config.output_format} stores scales in bf16, which holds "
                f"{of_type} significant bits; use --scale-bits {of_type}, or leave it out"
            )
        return asked
    asymmetric = not config.scheme.symmetric or any((rule.overrides or {}).get("sym") is False for rule in config.rules)
    return FEWEST_SCALE_BITS if config.format == "gguf" and asymmetric else of_type  # so that minimums are fp16 numbers


def head_scheme(model: ModelDescription, config: JobConfig) -> QuantScheme | None:
    """The scheme of a model's output head; None if it stays unquantized. Raises UsageError if it cannot be quantized as requested."""
    if not config.lm_head:
        return None
    name, module = model.head_name, model.head
    if not isinstance(module, nn.Linear):
        raise UsageError(f"--lm-head: {name} is a {type(module).__name__}, not a Linear; leave out --lm-head")
    if module.weight is model.embedding.weight:
        raise UsageError(
            f"--lm-head: {name} has the input embedding's weight (tie_word_embeddings), which stays unquantized; leave out --lm-head"
        )
    return scheme_for(name, config.base_scheme, config.rules)


def check_shapes(model: ModelDescription, config: JobConfig) -> Adapted:
    """The job, adapted to Linears of odd widths.

    Raises UsageError if a rule decides nothing or splits a fused Linear, if Linears, the output head among them, do not fit the format
    or their group size and nothing can be adapted, if the head cannot be quantized as requested, or if no Linear would be quantized.
    """
    linears = _block_linears(model)
    experts = {name: shape for bank in model.expert_linears.values() for name, shape in bank.items()}
    names = [*linears, *experts]
    require_sound_rules(names, _linear_head(model), config)
    for path, bank in model.expert_linears.items():
        if bank_scheme(path, bank, config) is not None and config.made.input_suffix:
            what, instead = _of_inputs(config)
            raise UsageError(
                f"{what}: stores numbers for inputs, of which experts ({path}) get none; {instead}, or leave experts unquantized with "
                "--skip '.*\\.experts'"
            )
    head = head_scheme(model, config)
    if head is not None:
        linears[model.head_name] = model.head
    candidates = [each for each in map(_candidate, linears, linears.values()) if min(each.m, each.n) >= MIN_FEATURES]
    candidates += [Candidate(name=name, m=e.m, n=e.n, joined=e.joined) for name, e in experts.items()]
    found = adapted(candidates, names, _linear_head(model), config)
    require_fit(candidates, names, _linear_head(model), found.config)
    matrices = (name.removesuffix(".weight") for name, param in model.model.named_parameters() if param.ndim == 2)
    require_distinct(candidates, [*model.linears, *matrices], found.config)
    base = config.base_scheme
    if head is None and all(scheme_for(each.name, base, config.rules) is None for each in candidates):
        raise UsageError("--skip: no Linear would be quantized; give narrower patterns")
    if config.bits_per_weight is None:
        return found
    types = _stored_types(model, candidates)
    groups = mixed_groups(candidates, types, found.config, model.blocks_path, lambda tried: misfits(candidates, tried).keys())
    require_budget(groups, config.bits_per_weight)
    return dataclasses.replace(found, groups=groups)


def bank_scheme(path: str, names: Iterable[str], config: JobConfig) -> QuantScheme | None:
    """The scheme of all experts of a bank; None if they stay unquantized. names: of their matrices.

    Raises UsageError if rules treat them differently: readers take a bank as a whole.
    """
    if not config.rules:
        return config.base_scheme
    first, *others = names
    scheme = scheme_for(first, config.base_scheme, config.rules)
    for name in others:
        if scheme_for(name, config.base_scheme, config.rules) != scheme:
            raise UsageError(
                f"--rule and --skip must treat all matrices of all experts in a bank alike, since readers take it as a whole: {name} "
                f"differs from {first}; use a pattern such as {path}.*"
            )
    return scheme


def _stored_types(model: ModelDescription, candidates: Iterable[Candidate]) -> dict[str, torch.dtype]:
    """The dtype of each Linear's weight in the checkpoint; of experts, that of the blocks' other weights."""
    prefix = f"{model.blocks_path}."
    usual = next((info.dtype for name, info in model.sources.items() if name.startswith(prefix)), torch.float16)
    found = {each.name: model.sources.get(f"{each.name}.weight") for each in candidates}
    return {name: usual if info is None else info.dtype for name, info in found.items()}


def _candidate(name: str, module: nn.Module) -> Candidate:
    m, n = linear_weight(module).shape
    return Candidate(name=name, m=m, n=n, transposed=skeleton.is_transposed(module))


def _block_linears(model: ModelDescription) -> dict[str, nn.Module]:
    """The Linears of all blocks by module name."""
    return {f"{model.blocks_path}.{i}.{name}": m for i, block in enumerate(model.blocks) for name, m in block_linears(block).items()}


def _linear_head(model: ModelDescription) -> str | None:
    """The output head's name, if it is a Linear."""
    head = model.model.get_output_embeddings()  # type: ignore[operator]
    return model.head_name if isinstance(head, nn.Linear) else None


def for_ranks(config: JobConfig, ranks: int, device_type: str) -> JobConfig:
    """A job's settings with what depends on the number of processes: on a CPU one expert for each is solved side by side."""
    if ranks == 1 or device_type != "cpu" or config.experts_at_once is not None:
        return config
    return dataclasses.replace(config, experts_at_once=ranks)


def require_shareable(config: JobConfig, method: Method, *, remote: bool, rows: int, ranks: int) -> None:
    """Raise UsageError if the job has a part that several processes do not share. remote: whether the model stays on a server.

    rows: of calibration.
    """
    alone = {
        f"--method {config.method}": not isinstance(method, CalibratedMethod),
        "--tune-steps": bool(config.tune_steps),
        "--bits-per-weight": config.bits_per_weight is not None,
        "a model that stays on a server": remote,
    }
    for what, there in alone.items():
        if there:
            raise UsageError(f"{what}: {ranks} processes cannot share such a job; start it in one process")
    if rows < ranks:
        raise UsageError(
            f"--samples {rows}: {ranks} processes share the calibration rows, and each needs at least one; "
            f"give at least {ranks}, or start fewer processes"
        )
