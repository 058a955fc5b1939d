"""A model card for the hub: README.md of a finished job's folder. Pure text; what comes from records is quoted.

Paths of the machine that made it are left out: a card is published.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bigq import __version__
from bigq.command import flags
from bigq.config import JobConfig
from bigq.errors import CheckpointError
from bigq.io.json_file import open_regular
from bigq.sched.finish import CARD_MARK, CARD_NAME
from bigq.sched.history import History, Judged
from bigq.sizes import show_size

#: Bytes of the source's README that are looked at: front matter comes first.
MAX_README = 2**20
#: Linears that are named.
WORST = 5
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{7,64})/?$")
_LICENCE = re.compile(r"""^(license|license_name|license_link):[ \t]*["']?([A-Za-z0-9][\w./:#?=&%+-]{0,200})["']?[ \t]*$""", re.MULTILINE)


def source_readme(out: Path, history: History) -> str:
    """The source model's own README, as far as it is needed; that of ``out``, which is a copy, where the source is gone."""
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
    """The card of a finished job. readme: of the source, for its licence."""
    name = history.out.rpartition("/")[2]
    base, revision = base_model(history)
    parts = [_front_matter(history, base, readme), f"{CARD_MARK}\n", f"# {_plain(name)}\n", _what(history, base, revision)]
    parts += _made(history, base, revision)
    parts += _results(history)
    parts += _loading(history, name)
    return "\n".join(parts)


def base_model(history: History) -> tuple[str | None, str | None]:
    """Hub id and revision of the source; None where it is not from the hub, as far as anybody can tell."""
    if not history.runs:
        return None, None
    run = history.runs[-1]
    snapshot = _SNAPSHOT.search(run.folder or "")
    if snapshot is not None:
        name = snapshot[1].replace("--", "/", 1)
        return (name, snapshot[2]) if _HUB_NAME.fullmatch(name) else (None, None)
    return None, None


def licence_lines(readme: str) -> list[str]:
    """What the YAML front matter of a README states of the licence, line by line; nothing where it has none."""
    head = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", readme, re.DOTALL)
    return [] if head is None else [f"{key}: {json.dumps(value)}" for key, value in _LICENCE.findall(head[1].replace("\r", ""))]


def _front_matter(history: History, base: str | None, readme: str) -> str:
    bits = [] if history.config is None else [f"{history.config.scheme.bits}-bit"]
    lines = ["---"]
    if base is not None:
        lines += [f"base_model: {base}", "base_model_relation: quantized"]
    lines += ["library_name: transformers", "pipeline_tag: text-generation", *licence_lines(readme)]
    lines += ["tags:", *(f"- {tag}" for tag in ("gptq", *bits, "bigq")), "---", ""]
    return "\n".join(lines)


def _what(history: History, base: str | None, revision: str | None) -> str:
    of = (
        "a language model"
        if base is None
        else f"[{base}](https://huggingface.co/{base})" + (f" (revision `{revision[:12]}`)" if revision else "")
    )
    method = "round-to-nearest" if history.config is not None and history.config.method == "rtn" else "GPTQ"
    text = f"This is {of}, quantized with bigq ({method}).\n"
    rows = []
    if history.source_bytes:
        rows.append(("size before", show_size(history.source_bytes)))
    rows.append(("size", show_size(history.output_bytes)))
    if history.linear_bits is not None:
        rows.append(("bits per weight of the quantized Linears, with scales and zero points", f"{history.linear_bits:.2f}"))
    if history.all_bits is not None:
        rows.append(("bits per parameter of the whole checkpoint", f"{history.all_bits:.2f}"))
    rows.append(("Linears quantized", str(len(history.linears))))
    if history.left_out:
        rows.append(("Linears in the blocks that stay as they were", str(len(history.left_out))))
    return text + "\n" + _table(("what", "how much"), rows)


def _made(history: History, base: str | None, revision: str | None) -> Iterator[str]:
    yield "## How it was made\n"
    if history.config is not None:
        yield _table(("setting", "value"), list(_settings(history.config)))
    worst = history.worst(WORST)
    if worst:
        yield "Largest relative errors of outputs on the calibration text (squared norms):\n"
        yield _table(("Linear", "block", "error"), [(_code(each.name), str(each.block), f"{each.error:.2e}") for each in worst])
    if history.config is not None:
        yield "### Reproducing\n"
        model = shlex.quote(f"{base}@{revision}" if base and revision else base or "MODEL")
        command = " ".join(["bigq quantize", model, "OUT", *map(shlex.quote, flags(history.config))])
        yield _block(command, "sh")
        if base is None:
            yield "SOURCE is the source model.\n"
        versions = history.runs[-1].versions if history.runs else {"bigq": __version__}
        told = ", ".join(f"{_plain(name)} {_plain(version)}" for name, version in versions.items())
        machine = _plain(history.runs[-1].machine) if history.runs else "unknown"
        yield f"Made with {told}, on {machine}. Other versions, devices or batches may round differently.\n"


def _settings(config: JobConfig) -> Iterator[tuple[str, str]]:
    scheme = config.scheme
    yield "bits", str(scheme.bits)
    yield "group size", "whole rows" if scheme.group_size == -1 else str(scheme.group_size)
    yield "zero points", "symmetric" if scheme.symmetric else "asymmetric"
    if config.method != "rtn":
        yield "act-order", "on, groups in natural order" if scheme.act_order else "off"
        yield "damping", f"{scheme.damping:g}"
        yield "order within a block", "true-sequential" if config.true_sequential else "all at once"
        text = config.calibration.rpartition("/")[2]
        yield "calibration", f"{config.samples} × {config.seqlen} tokens of {_code(text)}, seed {config.seed}"
    if scheme.mse:
        yield "scales", "grid search for the least rounding error"
    for rule in config.rules:
        what = "left as they are" if rule.overrides is None else ", ".join(f"{k} {v}" for k, v in rule.overrides.items())
        yield f"Linears that match {_code(rule.pattern)}", what
    yield "checkpoint format", _code(config.format)


def _results(history: History) -> Iterator[str]:
    if not history.evaluations:
        return
    yield "## Results\n"
    newest = {(each.data, each.samples, each.seqlen): each for each in history.evaluations}
    headings = ("text", "tokens", "perplexity before", "perplexity", "KL per token", "same top token")
    yield _table(headings, [_result(each) for each in newest.values()])
    yield "Measured with `bigq eval`: perplexity per token on whole rows of the text; KL divergence from the source model in nats.\n"


def _result(judged: Judged) -> tuple[str, ...]:
    text = _code(judged.data.rpartition("/")[2])
    return (
        f"{text}, {judged.samples} × {judged.seqlen}",
        str(judged.tokens),
        "–" if judged.baseline_perplexity is None else f"{judged.baseline_perplexity:.4g}",
        f"{judged.perplexity:.4g}",
        "–" if judged.kl is None else f"{judged.kl:.3g}",
        "–" if judged.top1_agreement is None else f"{100 * judged.top1_agreement:.1f} %",
    )


def _loading(history: History, name: str) -> Iterator[str]:
    """What readers of the format need, as far as the settings decide it."""
    config = history.config
    yield "## Loading\n"
    yield "`MODEL` is this repository's id, or a folder that holds its files.\n"
    yield "With transformers (`pip install transformers optimum gptqmodel`):\n"
    yield _block(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("MODEL")\n'
        'model = AutoModelForCausalLM.from_pretrained("MODEL", device_map="auto")',
        "python",
    )
    if config is None:
        return
    yield "With vLLM:\n"
    yield _block("vllm serve MODEL" + ("" if _fits_marlin(config) else " --dtype float16"), "sh")
    if config.format == "gptq_v2":
        yield "The checkpoint format is `gptq_v2`. Readers that do not know it take it for `gptq`, and every zero point for another.\n"
    if any(rule.overrides for rule in config.rules):
        mixed = "Some Linears have other bits or groups than the rest (`dynamic` in config.json)."
        yield f"{mixed} Readers that fuse q/k/v or gate/up want the same for all of those.\n"


def _fits_marlin(config: JobConfig) -> bool:
    """Whether the kernels that take any precision of activations know all weights: 4 or 8 bits, symmetric, usual groups."""
    base: dict[str, Any] = {"bits": config.scheme.bits, "group_size": config.scheme.group_size, "sym": config.scheme.symmetric}
    schemes = [base, *({**base, **rule.overrides} for rule in config.rules if rule.overrides)]
    return all(scheme["bits"] in (4, 8) and scheme["group_size"] in (-1, 32, 64, 128) and scheme["sym"] for scheme in schemes)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    return (
        "\n".join([line(headings), line(["---"] * len(headings)), *(line([cell.replace("|", "\\|") for cell in row]) for row in rows)])
        + "\n"
    )


def _block(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}\n"


def _code(text: str) -> str:
    """A text as it is, in a line of Markdown."""
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _plain(text: str) -> str:
    """A text in which no character means anything to Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|&!~$])", r"\\\1", text)
