"""A model card for the hub: the README.md of a finished folder. Pure text; values from records are quoted.

It holds no paths of the machine that made it, since cards are published.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from bigq.config import JobConfig
from bigq.data.given import GIVEN
from bigq.data.spec import is_named, without_folders
from bigq.errors import CheckpointError
from bigq.inspect.evaluations import EvaluationResult, current_results
from bigq.inspect.history import History
from bigq.io.json_file import open_regular
from bigq.job.command import flags
from bigq.job.finish import CARD_MARK, CARD_NAME
from bigq.job.manifest import GGUF_NAME
from bigq.kernels.grid_spec import PointsName
from bigq.mixed.record import read_bits
from bigq.progress.sizes import show_size
from bigq.reports.loading import loading, loads_with_transformers
from bigq.reports.markdown import block, code, plain, table
from bigq.reports.method import method_text
from bigq.version import __version__
from bigq.vocabulary import OrderName, ScalesName

#: Bytes of the source's README that are read: front matter comes first.
MAX_README = 2**20
#: Linears that the card names.
WORST = 5
#: What options of a scheme mean.
ORDERS: Mapping[OrderName, str] = {
    "natural": "from left to right",
    "activation": "by decreasing Hessian diagonal, groups in natural order",
    "group": "group by group, by decreasing Hessian diagonal",
}
POINTS: Mapping[PointsName, str] = {
    "nf4": "4-bit NormalFloat (NF4)",
    "fp4": "4-bit floats (FP4 of bitsandbytes)",
    "e2m1": "4-bit floats (E2M1)",
    "e4m3": "8-bit floats (E4M3)",
}
SCALES: Mapping[ScalesName, str] = {"minmax": "each spans all weights of its group", "search": "searched for the least error"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{7,64})/?$")
_LICENCE = re.compile(r"""^(license|license_name|license_link):[ \t]*["']?([A-Za-z0-9][\w./:#?=&%+-]{0,200})["']?[ \t]*$""", re.MULTILINE)


def source_readme(out: Path, history: History) -> str:
    """The beginning of the source model's README; where the source is gone, of its copy in ``out``."""
    folders = [Path(history.runs[-1].folder)] if history.runs and history.runs[-1].folder else []
    for folder in (*folders, out):
        try:
            file, _ = open_regular(folder / CARD_NAME)
        except (OSError, ValueError, CheckpointError):
            continue
        with file:
            return file.read(MAX_README).decode("utf-8", "replace")
    return ""


def model_card(history: History, readme: str) -> str:
    """The card of a finished folder. readme: of the source, for its licence."""
    base, revision = base_model(history)
    parts = [
        _front_matter(history, base, readme),
        f"{CARD_MARK}\n",
        f"# {plain(history.name)}, quantized\n",
        _summary(history, base, revision),
    ]
    parts += _provenance(history, base, revision)
    parts += _results(history)
    parts += loading(history)
    return "\n".join(parts)


def base_model(history: History) -> tuple[str | None, str | None]:
    """Hub id and revision of the source; None where the records do not show that it is from the hub."""
    if not history.runs:
        return None, None
    run = history.runs[-1]
    snapshot = _SNAPSHOT.search(run.folder or "")
    if snapshot is not None:
        name = snapshot[1].replace("--", "/", 1)
        return (name, snapshot[2]) if _HUB_NAME.fullmatch(name) else (None, None)
    return None, None


def licence_lines(readme: str) -> list[str]:
    """The lines about the licence in the YAML front matter of a README; none where it has no front matter."""
    head = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", readme, re.DOTALL)
    return [] if head is None else [f"{key}: {json.dumps(value)}" for key, value in _LICENCE.findall(head[1].replace("\r", ""))]


def _front_matter(history: History, base: str | None, readme: str) -> str:
    lines = ["---"]
    if base is not None:
        lines += [f"base_model: {base}", "base_model_relation: quantized"]
    lines += ["library_name: transformers"] if loads_with_transformers(history) else []
    lines += ["pipeline_tag: text-generation", *licence_lines(readme)]
    lines += ["tags:", *(f"- {tag}" for tag in _tags(history.config)), "---", ""]
    return "\n".join(lines)


def _tags(config: JobConfig | None) -> Iterator[str]:
    """The hub's names of the formats, then the others."""
    if config is not None:
        if config.format == "gguf":
            yield "gguf"
        yield config.made.tag
        yield f"{config.scheme.bits}-bit"
    yield "bigq"


def _summary(history: History, base: str | None, revision: str | None) -> str:
    of = (
        "a language model"
        if base is None
        else f"[{base}](https://huggingface.co/{base})" + (f" (revision `{revision[:12]}`)" if revision else "")
    )
    how = "" if history.config is None else f" ({plain(method_text(history.config).title)})"
    text = f"This is {of}, quantized with bigq{how}.\n"
    if history.conversion is not None:
        text = text if history.config is not None else f"This is {of}, quantized by another tool.\n"
        text += f"bigq converted it from the format {code(history.conversion.format_before)} to {code(history.conversion.format)}.\n"
    rows = []
    if history.source_bytes:
        rows.append(("size before", show_size(history.source_bytes)))
    if history.gguf_bytes is None:
        rows.append(("size", show_size(history.output_bytes)))
    else:
        rows.append((f"size of {GGUF_NAME}", show_size(history.gguf_bytes)))
        rows.append(("size of the safetensors shards, which hold the same model", show_size(history.output_bytes - history.gguf_bytes)))
    of_shards = " (safetensors)" if history.gguf_bytes is not None else ""
    if history.linear_bits is not None:
        label = f"bits per weight of the quantized Linears, with scales and zero points{of_shards}"
        rows.append((label, f"{history.linear_bits:.2f}"))
    if history.all_bits is not None:
        rows.append((f"bits per parameter of the whole checkpoint{of_shards}", f"{history.all_bits:.2f}"))
    rows.append(("Linears quantized", str(len(history.linears)) + ("" if history.head is None else ", the output head among them")))
    left_out = [left for left in history.left_out if left.block is not None]
    if left_out:
        rows.append(("unquantized Linears in the blocks", str(len(left_out))))
    return text + "\n" + table(("what", "how much"), rows)


def _provenance(history: History, base: str | None, revision: str | None) -> Iterator[str]:
    yield "## How it was made\n"
    if history.config is not None:
        yield table(("setting", "value"), list(_settings(history, history.config)))
    worst = history.largest_errors(WORST)
    if worst:
        yield f"The Linears with the largest errors. {plain(method_text(history.config).error_meaning)}\n"
        rows = [(code(each.name), "–" if each.block is None else str(each.block), f"{each.error:.2e}") for each in worst]
        yield table(("Linear", "block", "error"), rows)
    if history.config is not None:
        yield "### Reproducing\n"
        model = shlex.quote(f"{base}@{revision}" if base and revision else base or "SOURCE")
        yield block("\n".join(_commands(history, history.config, model)), "sh")
        named = ["`SOURCE` is the source model"] if base is None else []
        text, calibrated = without_folders(history.config.calibration), method_text(history.config).calibrated
        if calibrated and text == GIVEN:
            named.append("`DATA` stands for the calibration data, which was given in Python")
        elif calibrated and not is_named(text):
            named.append(f"{code(text)} is the calibration text")
        yield f"{', '.join([*named, '`OUT` is a folder that bigq makes'])}.\n"
        versions = history.runs[-1].versions if history.runs else {"bigq": __version__}
        made_with = ", ".join(f"{plain(name)} {plain(version)}" for name, version in versions.items())
        machine = plain(history.runs[-1].machine) if history.runs else "unknown"
        yield f"Made with {made_with}, on {machine}. Other versions, devices or batches may round differently.\n"


def _commands(history: History, config: JobConfig, model: str) -> Iterator[str]:
    """The commands that make the folder again. model: as the shell reads it."""
    converted = history.conversion
    if converted is None:
        yield " ".join(["bigq quantize", model, "OUT", *map(shlex.quote, flags(_effective_config(config)))])
        return
    before = dataclasses.replace(config, format=converted.job_format or config.format)
    yield " ".join(["bigq quantize", model, "QUANTIZED", *map(shlex.quote, flags(_effective_config(before)))])
    yield f"bigq convert QUANTIZED OUT --to {converted.format}"


def _effective_config(config: JobConfig) -> JobConfig:
    """The config without settings that have no effect on the output of its method."""
    names = [] if config.method == "gptaq" else ["alpha"]
    names += [] if method_text(config).calibrated else ["calibration", "text_field", "samples", "seqlen", "seed", "batch"]
    default = JobConfig()
    config = dataclasses.replace(config, calibration="DATA") if config.calibration == GIVEN else config
    return dataclasses.replace(config, **{name: getattr(default, name) for name in names})


def _settings(history: History, config: JobConfig) -> Iterator[tuple[str, str]]:
    scheme, method = config.scheme, method_text(config)
    yield "method", plain(method.title)
    if config.bits_per_weight is None:
        yield "bits", str(scheme.bits)
    else:
        yield from _chosen_bits(history, config)
    yield "group size", "whole rows" if scheme.group_size == -1 else str(scheme.group_size)
    if config.made.points == "int":
        yield "zero points", "symmetric" if scheme.symmetric else "asymmetric"
    else:
        yield "numbers", POINTS[config.made.points]
    if config.made.quantized_inputs == "e2m1":
        yield "scales of inputs", "one for 16 inputs of a token, with one number for each Linear from its largest calibration input"
    elif config.made.input_suffix:
        yield "scales of inputs", "static: one for each Linear, from its largest calibration input"
    elif config.made.quantized_inputs:
        yield "scales of inputs", "dynamic: one for each token"
    if scheme.scale_bits is not None:
        yield "significant bits of scales", str(scheme.scale_bits)
    yield "scales", SCALES[scheme.scales]
    if config.method == "gptaq":
        yield "correction of the upstream error (alpha)", str(config.alpha)
    if method.calibrated:
        yield "order of columns", ORDERS[scheme.order]
        if scheme.sweeps:
            yield "sweeps of coordinate descent", str(scheme.sweeps)
        yield "damping", str(scheme.damping)
        yield "order within a block", "true-sequential" if config.true_sequential else "all at once"
        text = without_folders(config.calibration)
        of = "data given in Python" if config.calibration == GIVEN else code(text)
        yield "calibration", f"{config.samples} × {config.seqlen} tokens of {of}, seed {config.seed}"
        if config.attention == "fused":
            yield "attention", "fused"
    if config.rotate:
        yield "rotation", "folded into the weights: the residual stream, and the values of attention heads"
    for rule in config.given_rules:
        what = "unquantized" if rule.overrides is None else ", ".join(f"{k} {v}" for k, v in rule.overrides.items())
        yield f"Linears that match {code(rule.pattern)}", what
    yield "output head", _head(history, config)
    yield "checkpoint format", code(config.output_format) + (f": {GGUF_NAME}, and shards in `gptq_v2`" if config.format == "gguf" else "")


def _chosen_bits(history: History, config: JobConfig) -> Iterator[tuple[str, str]]:
    """What ``bits_per_weight`` has led to. Scales and zero points count. A converted folder does not know what was reached."""
    chosen = read_bits(Path(history.out))
    of = f"at most {config.bits_per_weight:g}" if chosen is None else f"{chosen.reached:.4g} of {chosen.budget:g}"
    yield "bits per quantized weight, with scales and zero points", of
    counts = Counter[int]()
    for linear in history.linears:
        counts[linear.bits] += linear.count
    yield "bits", ", ".join(f"{count} Linears at {bits}" for bits, count in sorted(counts.items()))


def _head(history: History, config: JobConfig) -> str:
    if history.head is not None:
        return f"quantized ({code(history.head.name)})"
    failed = next((left.reason for left in history.left_out if left.block is None), None)
    if failed is not None:
        return f"unquantized, as it failed: {plain(failed)}"
    return "unquantized" + (", by a rule" if config.lm_head else "")


def _results(history: History) -> Iterator[str]:
    if not history.evaluations:
        return
    results = current_results(history.evaluations)
    yield "## Results\n"
    headings = ("text", "tokens", "perplexity", "baseline", "perplexity of the baseline", "KL per token", "same top token")
    yield table(headings, [_result(each) for each in results])
    note = "Measured with `bigq eval`: perplexity per token"
    if any(each.baseline is not None for each in results):
        note += "; KL divergence from the baseline in nats; how often both models rank the same token first"
    yield f"{note}.\n"


def _result(result: EvaluationResult) -> tuple[str, ...]:
    text = code(result.data.rpartition("/")[2])
    name = result.baseline_name
    return (
        f"{text}, {result.samples} × {result.seqlen}" + ("" if result.dtype == "auto" else f", {plain(result.dtype)}"),
        str(result.tokens),
        "over 1e12" if result.perplexity == math.inf else f"{result.perplexity:.4g}",
        "–" if result.baseline is None else name if result.of_source else code(name),
        "–" if result.baseline_perplexity is None else f"{result.baseline_perplexity:.4g}",
        "–" if result.kl is None else f"{result.kl:.3g}",
        "–" if result.top1_agreement is None else f"{100 * result.top1_agreement:.1f} %",
    )
