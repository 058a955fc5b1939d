"""The settings of a job, as one frozen value; the command line and the Python API both build it. Imports no torch.

Each field is declared here once, as an option: ``bigq.options`` says what follows from the declaration.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigq.common_options import (
    BUDGETS,
    CALIBRATION,
    NEVER,
    OUTPUT,
    RUN,
    batch_option,
    device_option,
    dtype_option,
    fold_option,
    input_scales_option,
    quiet_option,
    seconds_or_never,
    seed_option,
    seqlen_option,
    text_field_option,
    trust_option,
)
from bigq.data.given import calibration_source
from bigq.data.spec import is_named
from bigq.errors import CheckpointError, UsageError
from bigq.io.json_file import show_name
from bigq.options import Converted, Effect, Range, Resume, at_least, checked, option, path, require_names, settle, shown, table
from bigq.presets import PRESETS
from bigq.scheme import CALIBRATED, WEIGHTS, QuantScheme, Rule, frozen_rules, scheme_fields
from bigq.size_options import budget_option, size_given
from bigq.vocabulary import (
    AttentionName,
    DtypeName,
    FetchChoice,
    FoldName,
    FormatName,
    InputScalesName,
    MethodName,
    OnNonfinite,
    QualityName,
    TierChoice,
)

if TYPE_CHECKING:
    from bigq.io.formats import Format

#: The formats of jobs that are given none. Of models with experts, transformers and vLLM both read this one.
DEFAULT_FORMAT: FormatName = "gptq"
FORMAT_WITH_EXPERTS: FormatName = "compressed-tensors"

CORRECTED = Effect(unless="without --method gptaq", holds=lambda job, _: job.method == "gptaq", refused=True)
NEEDS_ROWS = dataclasses.replace(CALIBRATED, refused=True)
ON_RECORDS = Effect(unless="on texts by name", holds=lambda job, _: not is_named(job.calibration))
STREAMED = Effect(unless="with --fetch download", holds=lambda job, _: job.fetch != "download")
ON_GPU = Effect(unless="on a CPU", holds=lambda _, device: device != "cpu")

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """One quantization job. docs/options.md lists the fields with units and defaults.

    Sizes are numbers of bytes or strings with a unit ("72GiB"), paths are strings or ``Path``, scheme may be a dict of QuantScheme's
    fields, and rules may hold strings ("REGEX:bits=8"). Raises UsageError, naming the field, for a value that cannot be used.
    """

    scheme: Converted[QuantScheme, QuantScheme | Mapping[str, Any]] = option(
        help="how Linears are quantized",
        group=WEIGHTS,
        factory=QuantScheme,
        flag=None,
        resume=Resume.REFUSED,
        convert=lambda given, _: QuantScheme.of(given, "JobConfig: scheme"),
    )
    rules: Converted[tuple[Rule, ...], Sequence[Rule | str]] = option(
        (),
        help="other schemes for some Linears, or skips; the first rule that matches decides",
        group=WEIGHTS,
        flag="--rule",
        opposite="--skip",
        resume=Resume.REFUSED,
        convert=lambda given, _: Rule.all_of(given),
    )
    bits_per_weight: float | None = option(
        None,
        help="budget: 2, 3, 4 or 8 bits for each Linear, so that codes, scales and zero points take at most this per quantized weight",
        group=WEIGHTS,
        placeholder="X",
        unset="all Linears get --bits",
        resume=Resume.REFUSED,
        added=True,
        range=Range(must="be above 2 and at most 16", holds=lambda bits: 2 < bits <= 16),
        effects=(NEEDS_ROWS,),
    )
    chosen_rules: int = option(
        0,
        help="how many of the last rules were chosen for --bits-per-weight",
        group=WEIGHTS,
        flag=None,
        resume=Resume.FREE,
        added=True,
        range=at_least(0),
    )
    method: MethodName = option(
        "gptq",
        help="gptaq also corrects the error that earlier Linears add to the inputs; awq rounds to nearest after scaling inputs; "
        "rtn rounds to nearest without calibration",
        group=WEIGHTS,
        resume=Resume.REFUSED,
    )
    fold: FoldName | None = fold_option(group=WEIGHTS, resume=Resume.REFUSED, added=True, effects=(NEEDS_ROWS,))
    alpha: float = option(
        0.5,
        help="fraction of the upstream error that gptaq corrects",
        group=WEIGHTS,
        placeholder="X",
        resume=Resume.REFUSED,
        range=Range(must="be between 0 and 1", holds=lambda alpha: 0 <= alpha <= 1),
        effects=(CORRECTED,),
    )
    tune_steps: int = option(
        0,
        help="steps by gradients that fit a block's scales to the original block's outputs, once its Linears are solved",
        group=WEIGHTS,
        unit="steps",
        resume=Resume.REFUSED,
        added=True,
        range=Range(must="not be negative", holds=lambda steps: steps >= 0),
        effects=(CORRECTED,),
    )
    format: FormatName | None = option(
        None,
        help="output format; gguf writes gptq_v2 shards and one file for llama.cpp",
        group=WEIGHTS,
        unset=f"{DEFAULT_FORMAT}; {FORMAT_WITH_EXPERTS} for models with experts, images or audio",
        resume=Resume.REFUSED,
    )
    input_scales: InputScalesName = input_scales_option(group=WEIGHTS, resume=Resume.REFUSED, added=True)
    lm_head: bool = option(
        False,
        help="quantize the output head too",
        group=WEIGHTS,
        resume=Resume.REFUSED,
    )
    rotate: bool = option(
        False,
        help="rotate the model first, so that no weight stands out; what it computes stays the same",
        group=WEIGHTS,
        resume=Resume.REFUSED,
        added=True,
    )
    allow_partial: bool = option(
        False,
        help="also take a job in which more than half of the weights in blocks would stay unquantized without a rule that says so",
        group=WEIGHTS,
        resume=Resume.FREE,
        added=True,
    )
    true_sequential: bool = option(
        True,
        help="solve a block level by level, so that each Linear sees the quantized ones before it",
        group=WEIGHTS,
        resume=Resume.REFUSED,
        effects=(CALIBRATED,),
    )
    calibration: Converted[str, Any] = option(
        "c4",
        help="file or pattern: text, JSON records, parquet, or token ids in safetensors; or c4, wikitext2, ultrachat, code, builtin; "
        "commas join several, with weights: c4:0.7,ultrachat:0.3",
        group=CALIBRATION,
        placeholder="FILE|NAME",
        resume=Resume.FREE,  # the tokens are compared instead, wherever the text lies
        convert=calibration_source,
        effects=(CALIBRATED,),
    )
    text_field: str | None = text_field_option(
        group=CALIBRATION,
        resume=Resume.FREE,  # as for calibration
        added=True,
        effects=(CALIBRATED, ON_RECORDS),
    )
    samples: int = option(
        128,
        help="rows of calibration tokens",
        group=CALIBRATION,
        unit="rows",
        resume=Resume.REFUSED,
        range=at_least(1),
        effects=(CALIBRATED,),
    )
    seqlen: int | None = seqlen_option(group=CALIBRATION, resume=Resume.REFUSED, effects=(CALIBRATED,))
    seed: int = seed_option(help="random seed for choosing rows", group=CALIBRATION, resume=Resume.REFUSED, effects=(CALIBRATED,))
    batch: int | None = batch_option(resume=Resume.WARNED, effects=(CALIBRATED,))
    attention: AttentionName = option(
        "model",
        help="fused computes the attention of BLOOM and MPT without a matrix of scores; its last bits differ from the model's own",
        group=RUN,
        resume=Resume.REFUSED,
        added=True,
        effects=(CALIBRATED,),
    )
    experts_at_once: int | None = option(
        None,
        help="experts of a layer that are solved side by side",
        group=RUN,
        unit="experts",
        unset="up to 8 for each process on a GPU, fewer if memory is short; on a CPU 1",
        resume=Resume.WARNED,
        added=True,
        range=at_least(1),
        effects=(CALIBRATED,),
    )
    activations: TierChoice = option(
        "auto",
        help="where activations are kept between blocks; auto is the first place with room, disk is a file in OUT",
        group=BUDGETS,
        effects=(CALIBRATED,),
    )
    read_ahead: int | None = option(
        None,
        help="blocks to prefetch while one is computed; 0 turns off write-behind too",
        group=BUDGETS,
        unit="blocks",
        unset="1 on a GPU, 0 on a CPU",  # there, files take little of the time, and prefetched blocks much of the memory
        range=Range(must="not be negative", holds=lambda blocks: blocks >= 0),
    )
    vram: Converted[int | None, int | str | None] = budget_option("GPU memory that the job may use, such as 72GiB", effects=(ON_GPU,))
    ram: Converted[int | None, int | str | None] = budget_option("host memory that the job may use")
    disk: Converted[int | None, int | str | None] = budget_option("disk space that the job may use on OUT's file system")
    fetch: FetchChoice = option(
        "auto",
        help="a model on the hub: download it, or stream what each block needs; auto streams where the disk cannot hold it",
        group=BUDGETS,
    )
    fetch_cache: Converted[int | None, int | str | None] = option(
        None,
        help="disk space on OUT's file system for what is streamed",
        group=BUDGETS,
        unit="bytes",
        placeholder="SIZE",
        unset="two blocks, at least 1 GiB; less if the disk is short",
        convert=size_given,
        range=Range(must="be 32 MiB or more", holds=lambda size: size >= 32 * 2**20),
        effects=(STREAMED,),
    )
    bandwidth: Converted[int | None, int | str | None] = option(
        None,
        help="what the network delivers per second, for the plan's time, such as 500MB",
        group=BUDGETS,
        unit="bytes per second",
        placeholder="SIZE",
        unset="125 MB, which is 1 Gbit/s",
        convert=size_given,
        range=at_least(1),
    )
    push: str | None = option(
        None,
        help="upload each shard to this model repository on the hub while the job runs; a new one is private",
        group=OUTPUT,
        placeholder="OWNER/NAME",
        unset="nothing is uploaded",
        resume=Resume.FREE,
        added=True,
        range=Range(must="be owner/name, a repository on the hub", holds=lambda name: _REPOSITORY.fullmatch(name) is not None),
    )
    push_drop: bool = option(
        False,
        help="remove each shard from OUT once the hub has it",
        group=OUTPUT,
        resume=Resume.FREE,
        added=True,
    )
    trace: Converted[str | None, str | os.PathLike[str] | None] = option(
        None,
        help="write a timeline of the job, for chrome://tracing or ui.perfetto.dev",
        group=OUTPUT,
        placeholder="FILE",
        convert=path,
    )
    checkpoint_every: Converted[float | None, float | str | None] = option(
        60.0,
        help="save activations so often that a resumed job repeats about this much work at most; 0: after every block",
        group=RUN,
        unit="seconds",
        placeholder="SECONDS|never",
        unset=NEVER,
        range=Range(
            must="be 0 or more seconds, or never",
            holds=lambda every: math.isfinite(every) and every >= 0,
        ),
        convert=seconds_or_never,
        effects=(CALIBRATED,),
    )
    grace: float = option(
        60.0,
        help="time to finish the current step after SIGTERM, SIGINT or SIGUSR1",
        group=RUN,
        unit="seconds",
        range=Range(must="be above 0", holds=lambda grace: math.isfinite(grace) and grace > 0),
    )
    allow_ranks: bool = option(False, help="resume with another number of processes than the job was begun with", group=RUN, opposite=None)
    steal_lock: bool = option(False, help="take over the folder of a job that is dead", group=RUN, opposite=None)
    # Not kept: a request records the device that was chosen.
    device: str = device_option(resume=Resume.WARNED, kept=False)
    dtype: DtypeName = dtype_option(resume=Resume.REFUSED)
    trust_remote_code: bool = trust_option(resume=Resume.REFUSED)
    on_nonfinite: OnNonfinite = option(
        "stop",
        help="skip drops tokens with NaN or Inf, and leaves a Linear unquantized if its Hessian is not finite or cannot be factored",
        group=WEIGHTS,
        resume=Resume.FREE,  # both do the same until "stop" ends a job
    )
    quiet: bool = quiet_option()

    def __post_init__(self) -> None:
        settle(self)
        if self.push_drop and self.push is None:
            raise UsageError("--push-drop: no effect without --push; add that, or leave out --push-drop")
        if self.push_drop and self.format == "gguf":
            raise UsageError("--push-drop: removes the shards that a GGUF file is made from; leave out --push-drop")

    def with_quality(self, quality: QualityName) -> JobConfig:
        """The job with the method, order, scales and sweeps that a quality stands for (``bigq.presets``).

        Raises UsageError for an unknown one.
        """
        if quality not in PRESETS:
            raise UsageError(f"quality: must be one of {', '.join(PRESETS)}, not {shown(quality)}")
        preset = PRESETS[quality]
        return dataclasses.replace(self, scheme=dataclasses.replace(self.scheme, **preset.of_scheme), **preset.of_job)

    def blocks_ahead(self, device_type: str) -> int:
        """``read_ahead``, or its default on a type of device."""
        return self.read_ahead if self.read_ahead is not None else int(device_type == "cuda")

    @property
    def output_format(self) -> FormatName:
        """``format``; before it is settled (``bigq.job.settle``), the default of models without experts."""
        return self.format or DEFAULT_FORMAT

    @property
    def given_rules(self) -> tuple[Rule, ...]:
        """The rules without those that were chosen for ``bits_per_weight``."""
        return self.rules[: len(self.rules) - self.chosen_rules]

    @property
    def base_scheme(self) -> QuantScheme:
        """The scheme, with the smallest zero point that the output format can store, its points and its form of scales."""
        made = self.made
        return dataclasses.replace(self.scheme, min_zero=made.min_zero, points=made.points, scale_form=made.scale_form)

    @property
    def made(self) -> Format:
        """The format of the shards."""
        from bigq.io.formats import format_of  # here: it needs torch

        return format_of("gptq_v2" if self.format == "gguf" else self.output_format, self.input_scales)

    def frozen(self) -> dict[str, Any]:
        """The fields that are kept with a job, as plain JSON values."""
        whole = dataclasses.asdict(self)
        return {name: whole[name] for name in FROZEN_FIELDS}

    @classmethod
    def from_frozen(cls, settings: Any, where: str = "job.json") -> JobConfig:
        """The config from which ``frozen`` made ``settings``; fields that are not kept have their defaults.

        where: the file of the settings, for messages. Raises CheckpointError, naming the setting that is missing, unknown or wrong.
        """
        try:
            present = [name for name in FROZEN_FIELDS if not table(cls)[name].added or (isinstance(settings, dict) and name in settings)]
            require_names("settings", settings, present)
            values = {name: checked(f"settings.{name}", settings[name], table(cls)[name]) for name in present if name not in _NESTED}
            given = settings["scheme"]
            of_scheme = [name for name, each in table(QuantScheme).items() if not each.added or (isinstance(given, dict) and name in given)]
            scheme = QuantScheme(**scheme_fields("settings.scheme", given, of_scheme))
            return cls(scheme=scheme, rules=frozen_rules(settings["rules"]), **values)
        except UsageError as error:
            raise CheckpointError(
                f"{where}: {show_name(str(error))}; the file is damaged or from another version of bigq; "
                "start the job again in another folder"
            ) from None


#: Fields that are kept with a job: a resumed job uses them unless others are given.
FROZEN_FIELDS = tuple(name for name, each in table(JobConfig).items() if each.kept)
_NESTED = ("scheme", "rules")
