"""The Python API: the functions of ``import bigq``. Each imports its modules when it is called, since torch alone takes seconds.

Paths are strings or ``Path``, and ``~`` is expanded. All arguments are checked before anything is written. Errors are those of
``bigq.errors``; each message is one line that says what to do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigq.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bigq.config import JobConfig
    from bigq.conversion.convert import Conversion
    from bigq.infer.generate import Generation
    from bigq.infer.options import EvalConfig, GenerateConfig
    from bigq.infer.results import Evaluation
    from bigq.inspect.status import Status
    from bigq.job.stop import Stop
    from bigq.progress.callback import ProgressEvent
    from bigq.progress.display import Display
    from bigq.progress.records import Report
    from bigq.quantized_weight import QuantizedWeight
    from bigq.sched.plan.planner import Plan
    from bigq.scheme import QuantScheme

StrPath = str | os.PathLike[str]
Callback = Callable[["ProgressEvent"], object]


def plan(
    model: StrPath,
    out: StrPath = ".",
    config: JobConfig | None = None,
    on: str = "this",
    *,
    ranks: int = 1,
    hosts: int = 1,
    disk_rate: int | str | None = None,
) -> Plan:
    """Predict the memory, disk space and time of a job. No weights are read and nothing is written.

    model: a folder (its config.json is enough), or a hub id, of which only config and headers are downloaded.
    out: where the output would go, for the free disk space. config: defaults to ``JobConfig()``.
    on: "this" machine, or a GPU to plan for: "a100", "h100" or "h200".
    ranks: processes that share the job, on ``hosts`` machines; the plan is of one of them.
    disk_rate: bytes per second that a machine reads and writes, or a size such as "40GB"; by default 3 GB.

    Returns a ``Plan``: ``.cost.host`` and ``.cost.device`` (peak bytes), ``.disk`` (bytes), ``.shortages`` (one line each; empty if
    the job fits), ``.table()`` (text), ``.to_json()``.
    Raises UsageError, CheckpointError, UnsupportedModelError, ResourceError.

    >>> bigq.plan("meta-llama/Llama-3.1-8B", on="h100").shortages
    ()
    """
    from bigq.config import JobConfig
    from bigq.sched.plan.inputs import plan as run
    from bigq.sched.plan.sharing import Assumed

    _require_type("config", config, JobConfig)
    _require_text("on", on)
    assumed = Assumed(ranks=ranks, hosts=hosts, disk_rate=disk_rate)
    return run(_model("model", model), _path("out", out), config, on, assumed)


def quantize(
    model: StrPath,
    out: StrPath,
    config: JobConfig | None = None,
    stop: Stop | None = None,
    display: Display | None = None,
    *,
    progress: Callback | None = None,
    command: Sequence[str] = (),
) -> Report:
    """Quantize a model into the folder ``out``, or resume the job that ``out`` holds.

    model: a folder with safetensors shards, or a hub id ("owner/name" or "owner/name@revision").
    config: defaults to that of the job in ``out``, or to ``JobConfig()`` if there is none.
    progress: called with a ``ProgressEvent`` for each step; then nothing is printed. See ``bigq.progress.callback``.
    stop, display: a ``bigq.job.stop.Stop`` and a ``bigq.progress.display.Display``, as the command line uses them.
    command: arguments to record as the command of this run.

    Returns a ``Report``: ``.linears`` (one record per quantized Linear), ``.seconds``, ``.output_bytes``, ``.summary()``, …
    Raises UsageError, DataError, ResourceError; Stopped if ``stop`` received a request, after which the same call resumes the job.
    After an error ``out`` holds no config.json, unless only its GGUF file is missing.

    >>> scheme = bigq.QuantScheme(bits=4, group_size=64)
    >>> config = bigq.JobConfig(scheme=scheme, calibration="builtin", samples=16, seqlen=128)
    >>> report = bigq.quantize("bigq/assets/tiny-llama", "out", config, progress=lambda event: print(event.kind, event.block))
    """
    from bigq.config import JobConfig
    from bigq.job.stop import Stop
    from bigq.progress.display import DONE_FIELDS, Display

    source, folder = _model("model", model), _path("out", out)
    _require_type("config", config, JobConfig)
    _require_type("stop", stop, Stop)
    _require_type("display", display, Display)
    _require_words("command", command)
    shown = _display(progress, display)

    from bigq.sched.run import quantize as run

    report = run(source, folder, config, stop, shown, command=command)
    if progress is not None and shown is not None:
        values = report.to_json()
        shown.event("done", **{name: values[name] for name in DONE_FIELDS})
    return report


def evaluate(
    model: StrPath,
    config: EvalConfig | None = None,
    *,
    baseline: StrPath | None = None,
    progress: Callback | None = None,
    display: Display | None = None,
) -> Evaluation:
    """Measure the perplexity of a model, original or quantized, and its distance from another model.

    The model is run block by block, so it may be larger than the device.
    model, baseline: folders or hub ids. config: the text and its rows; defaults to all of the built-in held-out text.
    progress, display: as for ``quantize``.

    Returns an ``Evaluation``: ``.perplexity``, ``.tokens``, and with a baseline ``.baseline_perplexity``, ``.kl`` (mean KL divergence
    per token, in nats), ``.kl_stderr`` (its standard error by row; None with one row) and ``.top1_agreement`` (0 to 1).
    If ``quantize`` or ``convert`` wrote the folder ``model``, the result is recorded there for ``report``.
    Raises UsageError, DataError, ResourceError.

    >>> data = bigq.EvalConfig(data="builtin", samples=16, seqlen=128)
    >>> bigq.evaluate("out", data, baseline="bigq/assets/tiny-llama").kl
    0.0029
    """
    from bigq.infer.evaluate import evaluate as run
    from bigq.infer.options import EvalConfig
    from bigq.progress.display import Display

    _require_type("config", config, EvalConfig)
    _require_type("display", display, Display)
    other = None if baseline is None else _model("baseline", baseline)
    return run(_model("model", model), config, baseline=other, display=_display(progress, display))


def generate(
    model: StrPath,
    prompt: str,
    config: GenerateConfig | None = None,
    *,
    write: Callable[[str], None] = lambda text: None,
    say: Callable[[str], None] = lambda line: None,
) -> Generation:
    """Continue a prompt with a model, original or quantized, that fits the device.

    model: a folder or hub id. config: how tokens are chosen; defaults to at most 128 tokens, always the most likely one.
    write: receives the text piece by piece while it is generated. say: receives warnings.

    Returns a ``Generation``: ``.text`` (without the prompt), ``.new_tokens``, ``.seconds``, ``.summary()``, …
    Raises UsageError (an empty or too long prompt, no chat template), CheckpointError, UnsupportedModelError; ResourceError if the
    model does not fit the device.

    >>> bigq.generate("llama-4bit", "The answer is", bigq.GenerateConfig(max_new_tokens=8)).text
    ' 42.'
    """
    from bigq.infer.generate import generate as run
    from bigq.infer.options import GenerateConfig

    _require_text("prompt", prompt)
    _require_type("config", config, GenerateConfig)
    _require_callable("write", write)
    _require_callable("say", say)
    return run(_model("model", model), prompt, config, write=write, say=say)


def convert(
    model: StrPath, out: StrPath, to: str, *, trust_remote_code: bool = False, say: Callable[[str], None] = lambda line: None
) -> Conversion:
    """Write a packed checkpoint in another format, with the same codes, scales and zero points.

    model: the folder of a packed checkpoint, written by bigq or another tool. out: the folder to write; for "gguf" the file.
    to: "gptq", "gptq_v2", "compressed-tensors" or "gguf". say: receives a line per shard.

    Returns a ``Conversion``: ``.format_before``, ``.format``, ``.linears`` (how many), ``.bytes_before``, ``.bytes``.
    Raises UsageError if the format cannot hold the weights exactly, CheckpointError, UnsupportedModelError, ResourceError. After an
    error ``out`` is unchanged.

    >>> bigq.convert("llama-4bit", "llama-ct", "compressed-tensors").linears
    224
    """
    _require_text("to", to)
    _require_flag("trust_remote_code", trust_remote_code)
    _require_callable("say", say)
    source, place = _path("model", model), _path("out", out)

    from bigq.conversion.convert import convert as run

    return run(source, place, to, trust_remote_code=trust_remote_code, say=say)


def verify(out: StrPath, *, trust_remote_code: bool = False) -> list[str]:
    """Check every byte of an output folder of ``quantize`` or ``convert`` against its records, and its tensors against the model.

    trust_remote_code: run model code in ``out``, if its config needs it.

    Returns the problems, one line each that names the file or tensor; an empty list if the folder is complete and intact.
    Raises UsageError if ``out`` is not such a folder, ResourceError if it cannot be read.

    >>> bigq.verify("llama-4bit")
    []
    """
    _require_flag("trust_remote_code", trust_remote_code)
    folder = _path("out", out)

    from bigq.inspect.verify import verify as run

    return run(folder, trust_remote_code=trust_remote_code)


def status(out: StrPath) -> Status:
    """The state of a job, running or not, or of a converted folder. Reads only records, and does not disturb a running job.

    Returns a ``Status``: ``.state`` ("not begun", "running", "unknown", "stopped", "failed", "killed" or "finished"), ``.resumable``,
    ``.blocks_done``, ``.blocks``, ``.bytes_written``, ``.eta_seconds``, ``.damaged``, ``.text()``, …
    Raises UsageError if ``out`` is neither empty nor a folder that bigq wrote, ResourceError if it cannot be read.

    >>> bigq.status("llama-4bit").state
    'finished'
    """
    folder = _path("out", out)

    from bigq.inspect.status import status as run

    return run(folder)


def report(out: StrPath, file: StrPath | None = None) -> Path:
    """Write an HTML report of a job, finished or not, or of a converted folder. Needs matplotlib (``pip install bigq[report]``).

    file: defaults to OUT-report.html next to ``out``.

    Returns the path of the report.
    Raises UsageError if bigq did not write ``out`` or ``file`` cannot be written, ResourceError if writing fails or matplotlib is missing.

    >>> bigq.report("llama-4bit", "report.html")
    PosixPath('report.html')
    """
    folder, place = _path("out", out), None if file is None else _path("file", file)

    from bigq.reports.write import write_report as run

    return run(folder, place)


def model_card(out: StrPath) -> Path:
    """Write OUT/README.md, a model card for the hub, in place of the source's README.

    Returns the path of the card.
    Raises UsageError if ``out`` is not a finished folder of bigq or a job is writing to it, CheckpointError if its manifest is damaged,
    ResourceError if writing fails.

    >>> bigq.model_card("llama-4bit")
    PosixPath('llama-4bit/README.md')
    """
    folder = _path("out", out)

    from bigq.reports.write import write_model_card as run

    return run(folder)


def load_model(
    model: StrPath, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False, packed: bool | None = None
) -> nn.Module:
    """Load a model, original or quantized, as a transformers model in evaluation mode.

    model: a folder or hub id. device: "auto", "cpu" or "cuda:N". dtype: "auto", "float32", "bfloat16" or "float16".
    packed: whether quantized Linears stay packed; defaults to True on a GPU, and on a CPU only if the dequantized weights do not fit.

    Returns the model, an ``nn.Module`` with ``generate``.
    Raises UsageError, CheckpointError, UnsupportedModelError; ResourceError if it does not fit the device.

    >>> logits = bigq.load_model("llama-4bit", device="cpu")(input_ids=torch.tensor([[1, 2, 3]])).logits  # [1, 3, vocabulary]
    """
    source = _model("model", model)
    _require_text("device", device)
    _require_text("dtype", dtype)
    _require_flag("trust_remote_code", trust_remote_code)
    if packed is not None:
        _require_flag("packed", packed)

    from bigq.infer.load import load_model as run

    return run(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code, packed=packed)


def quantize_linear(
    weight: Tensor, hessian: Tensor, scheme: QuantScheme, cross: Tensor | None = None, alpha: float = 1.0
) -> QuantizedWeight:
    """Quantize the weight of one Linear with GPTQ, or with GPTAQ if a cross matrix is given.

    weight: [m, n], any floating type. hessian: symmetric [n, n], ``2/T · XᵀX`` of the inputs X [T, n]; any positive multiple gives the
    same codes. It is not changed. cross: ``2/T · (X₀ − X)ᵀX`` [n, n], where X₀ are the inputs in the unquantized model; scaled like the
    Hessian. scheme: bits, groups and damping. alpha: the fraction of the upstream error that is corrected, 0 to 1.
    Computes in fp64 if weight or Hessian is fp64, else in fp32.

    Returns a ``QuantizedWeight``: ``.codes`` uint8 [m, n], ``.scales`` fp16 [m, G], ``.zeros`` uint8 [m, G], ``.loss``,
    ``.dequantize()`` [m, n].
    Raises UsageError if shapes or the group size do not fit, NumericsError if a value is not finite or the Hessian cannot be factored.

    >>> bigq.quantize_linear(torch.randn(64, 128), torch.eye(128), bigq.QuantScheme(bits=4)).codes.shape
    torch.Size([64, 128])
    """
    import torch

    from bigq.scheme import QuantScheme
    from bigq.solver.gptq import quantize_linear as run

    for name, value in (("weight", weight), ("hessian", hessian), *((("cross", cross),) if cross is not None else ())):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim != 2:
            raise UsageError(f"{name}: must be a matrix of a floating type, not {_kind(value)}")
    if not isinstance(scheme, QuantScheme):
        raise UsageError(f"scheme: must be a QuantScheme, not {_kind(scheme)}")
    if type(alpha) not in (int, float) or not 0 <= alpha <= 1:
        raise UsageError(f"alpha: must be a number from 0 to 1, not {alpha!r}")
    return run(weight, hessian, scheme, cross, float(alpha))


# Checks of arguments.


def _display(progress: Callback | None, display: Display | None) -> Display | None:
    if progress is None:
        return display
    _require_callable("progress", progress)
    if display is not None:
        raise UsageError("progress and display: give one of them")
    from bigq.progress.callback import CallbackDisplay

    return CallbackDisplay(progress)


def _model(name: str, value: Any) -> str:
    """A folder or hub id."""
    if isinstance(value, str | os.PathLike) and (text := os.fspath(value)) and isinstance(text, str):
        return os.path.expanduser(text)
    raise UsageError(f"{name}: must be a folder or a hub id, as a string or Path, not {_kind(value)}")


def _path(name: str, value: Any) -> Path:
    if isinstance(value, str | os.PathLike) and (text := os.fspath(value)) and isinstance(text, str):
        return Path(os.path.expanduser(text))
    raise UsageError(f"{name}: must be a path, as a string or Path, not {_kind(value)}")


def _require_type(name: str, value: Any, kind: type) -> None:
    """Raise UsageError unless a value is of a type, or None."""
    if value is not None and not isinstance(value, kind):
        raise UsageError(f"{name}: must be a {kind.__name__}, not {_kind(value)}")


def _require_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise UsageError(f"{name}: must be a string, not {_kind(value)}")


def _require_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UsageError(f"{name}: must be True or False, not {_kind(value)}")


def _require_words(name: str, value: Any) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(word, str) for word in value):
        raise UsageError(f"{name}: must be a list of strings, not {_kind(value)}")


def _require_callable(name: str, value: Any) -> None:
    if not callable(value):
        raise UsageError(f"{name}: must be a function, not {_kind(value)}")


def _kind(value: Any) -> str:
    """A value in a message: short values as they are written, others by their type."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__name__} of {getattr(value, 'dtype', '?')} {list(shape)}"
    return repr(value) if value is None or (isinstance(value, str | int | float | bool) and len(repr(value)) < 40) else type(value).__name__
