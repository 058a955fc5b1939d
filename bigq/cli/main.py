"""The command line: arguments to configs, results to stdout, errors to one line on stderr and an exit code.

Exit codes: 0 done, 2 usage, 3 bad model or data, 4 environment (memory, disk, device), 75 stopped by a signal; run the same command
again, 130 interrupted, 141 nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bigq.cli.flags import add_device
from bigq.cli.flags import given as _given
from bigq.cli.flags import option as _option
from bigq.cli.folder import add_folder_commands
from bigq.cli.generate import add_generate
from bigq.errors import BigqError, UsageError
from bigq.progress.terminal import abandon_broken_streams, flush_results, one_line, prepare_streams, print_result
from bigq.version import __version__

if TYPE_CHECKING:
    from bigq.config import JobConfig
    from bigq.progress.display import Display
    from bigq.scheme import Rule


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    prepare_streams()
    try:
        return _run(argv)
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    finally:
        abandon_broken_streams()


def _run(argv: Sequence[str] | None) -> int:
    from bigq.progress.display import Display

    display = Display()
    try:
        try:
            args = build_parser().parse_args(argv)
            args.given = list(sys.argv[1:] if argv is None else argv)
            args.display = display = _display(args)
            if spec := os.environ.get("BIGQ_FAULT"):
                from bigq import faults

                faults.arm(spec)
            status: int = args.command(args)
        finally:
            flush_results()
    except BigqError as error:
        display.error(error.exit_code, type(error).__name__, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        display.error(130, "Interrupted", "interrupted; run the same command again to go on")
        return 130
    return status


def _display(args: argparse.Namespace) -> Display:
    """How the command shows what it does, on stderr."""
    from bigq.progress.display import Display, Events

    if args.command is _run_quantize and args.json:
        return Events(sys.stderr, quiet=bool(args.quiet))
    if args.command not in (_run_quantize, _run_eval) or args.quiet:
        return Display()
    from bigq.progress.live_line import display_for

    return display_for(sys.stderr, dumb=os.environ.get("TERM") == "dumb")


class _Parser(argparse.ArgumentParser):
    """Arguments may hold anything, and argparse repeats those that it does not know."""

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bigq", description="GPTQ quantization of language models far larger than the machine.")
    parser.add_argument("--version", action="version", version=f"bigq {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    as_before = "Flags that are not given mean as before where OUT holds a job, and else the default."
    _add_quantize(commands.add_parser("quantize", help="quantize a model", description=f"Quantize a model. {as_before}"))
    what = "memory, disk and time that quantizing a model takes"
    _add_plan(commands.add_parser("plan", help=what, description=f"Tell {what}. {as_before}"))
    what = "perplexity of a model, and its distance to another"
    kept = "Where MODEL is the folder of a finished job, the result is kept in its record, for bigq report."
    _add_eval(commands.add_parser("eval", help=what, description=f"Tell the {what}. {kept}"))
    add_generate(commands.add_parser("generate", help="let a model, original or quantized, go on with a prompt"))
    add_folder_commands(commands)
    _add_demo(commands.add_parser("demo", help="quantize the tiny model that ships with bigq, and show what it costs"))
    return parser


def _add_quantize(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="folder with safetensors shards, or hub id (owner/name[@revision])")
    p.add_argument("out", metavar="OUT", help="output folder; holding an interrupted run of the same job, it is gone on with")
    _add_job(p)
    machine = _add_machine(p)
    _option(
        machine,
        "--grace",
        type=float,
        metavar="SECONDS",
        default=60,
        help="after SIGTERM, SIGINT or SIGUSR1 the job has so long to finish its step",
    )
    _option(machine, "--steal-lock", action="store_true", default=False, help="take over the folder of a job that is dead")
    p.add_argument("--trace", metavar="FILE", help="write the job's timeline there, for chrome://tracing or ui.perfetto.dev")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout at the end, and on stderr one per line for each event")
    p.set_defaults(command=_run_quantize)


def _add_plan(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="folder (its config.json is enough), or hub id (only config and headers are fetched)")
    p.add_argument("out", metavar="OUT", nargs="?", help="where the output would lie, for the free disk space; here if not given")
    p.add_argument("--on", default="this", metavar="DEVICE", help="this machine, or plan for a GPU: a100, h100 or h200 (default: this)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    _add_job(p)
    _add_machine(p)
    p.set_defaults(command=_run_plan)


def _add_job(p: argparse.ArgumentParser) -> None:
    switch = argparse.BooleanOptionalAction
    how = p.add_argument_group("how weights are quantized")
    _option(how, "--bits", type=int, choices=(2, 3, 4, 8), default=4, help="bits per weight")
    _option(how, "--group-size", type=int, default=128, help="inputs that share a scale; -1 for the whole row")
    _option(how, "--sym", dest="symmetric", action=switch, default=True, help="fixed zero point in the middle")
    how.add_argument(
        "--asym", dest="symmetric", action="store_false", default=argparse.SUPPRESS, help="find a zero point with each scale, as --no-sym"
    )
    _option(how, "--act-order", action=switch, default=False, help="quantize columns by decreasing Hessian diagonal, groups as they are")
    _option(how, "--damping", type=float, default=0.01, help="fraction of the mean Hessian diagonal added to it")
    _option(how, "--mse", action=switch, default=False, help="grid search for the scales with the least rounding error")
    _option(
        how, "--mse-power", type=float, metavar="P", help="the power of errors in that search; 4 for 2 and 3 bits, else 2.4, if not given"
    )
    methods = "gptaq makes up for what the Linears before do to the inputs; rtn: plain rounding to nearest, no calibration"
    _option(how, "--method", choices=("gptq", "gptaq", "rtn"), default="gptq", help=methods)
    _option(how, "--alpha", type=float, default=0.5, help="how much of that gptaq makes up for: 0 nothing, 1 all")
    _option(how, "--lm-head", action=switch, default=False, help="quantize the output head too, where readers of the format can")
    _option(how, "--true-sequential", action=switch, default=True, help="Linears see the quantized ones before them in the block")
    _option(
        how,
        "--rule",
        action="append",
        metavar="REGEX:key=value,…",
        help="override bits, group_size, sym, act_order, damping, mse or mse_power for matching Linears; may be repeated",
    )
    _option(how, "--skip", action="append", metavar="REGEX", help="leave matching Linears as they are; may be repeated")
    _option(
        how,
        "--format",
        choices=("gptq", "gptq_v2", "compressed-tensors", "gguf"),
        default="gptq",
        help="gptq stores zero points minus one, gptq_v2 as they are",
    )
    _option(
        how,
        "--scale-bits",
        type=int,
        metavar="7…11",
        help="significant bits of scales; those of the checkpoint's own type (bf16 8, else 11) if not given",
    )
    _option(
        how,
        "--on-nonfinite",
        choices=("stop", "skip"),
        default="stop",
        help="skip leaves Linears whose Hessian is not finite or cannot be factored unquantized, and tokens that are not finite out of "
        "the calibration",
    )
    data = p.add_argument_group("calibration")
    _option(
        data,
        "--calibration",
        metavar="FILE|c4|builtin",
        default="c4",
        help="text, JSONL with a text field, or token ids in safetensors",
    )
    _option(data, "--samples", type=int, default=128, help="rows of tokens")
    _option(data, "--seqlen", type=int, help="tokens per row; 2048 or the model's limit if not given")
    _option(data, "--seed", type=int, default=0, help="of the draw of rows")
    room = p.add_argument_group("budgets")
    _option(room, "--vram", metavar="SIZE", help="device memory the job may take, such as 72GiB; what is free if not given")
    _option(room, "--ram", metavar="SIZE", help="host memory it may take; what is free if not given")
    _option(room, "--disk", metavar="SIZE", help="disk space it may take where OUT lies; what is free if not given")
    _option(
        room,
        "--activations",
        choices=("auto", "gpu", "host", "disk"),
        default="auto",
        help="where calibration activations are kept between blocks; auto is the first that has room, disk is a file in OUT",
    )
    _option(
        room,
        "--read-ahead",
        type=int,
        metavar="BLOCKS",
        help="blocks read while the one before is computed and, unless 0, written beside the next; 1 on a GPU, 0 on a CPU if not given",
    )
    _option(
        room,
        "--checkpoint-every",
        metavar="SECONDS|never",
        default=60,
        help="keep activations on disk so often that going on after a kill replays at most about so many seconds of finished blocks; "
        "0 after every block",
    )


def _add_eval(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="original model or output of bigq: folder or hub id")
    p.add_argument("--data", required=True, metavar="FILE|builtin", help="text, JSONL with a text field, or token ids in safetensors")
    p.add_argument("--baseline", metavar="MODEL", help="also compare with this model: KL divergence per token and top-1 agreement")
    _option(p, "--seqlen", type=int, help="tokens per row; 2048 or the model's limit if not given")
    _option(p, "--samples", type=int, help="rows to evaluate; all of the text if not given")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    _add_machine(p)
    p.set_defaults(command=_run_eval)


def _add_machine(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    machine = p.add_argument_group("machine")
    _option(
        machine,
        "--batch",
        type=int,
        help="rows that go through a block at once; 8 on a GPU and about 1024 tokens on a CPU if not given",
    )
    add_device(machine)
    _option(machine, "--quiet", action="store_true", default=False, help="no progress, no events, no summary")
    return machine


def _add_demo(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", default="bigq-demo", help="folder for the quantized models (default: %(default)s)")
    p.add_argument("--device", default="auto", help="cuda:0, cpu or auto")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    p.set_defaults(command=_run_demo)


def job_config(args: argparse.Namespace, before: object = None) -> JobConfig:
    """The job that ``bigq quantize`` arguments describe: what is not given is as in ``before``, else the default.

    before: the settings in the job.json of ``args.out``, if it has one. Raises UsageError, CheckpointError (for ``before``).
    """
    from bigq.config import JobConfig
    from bigq.progress.sizes import parse_size
    from bigq.scheme import QuantScheme

    base = JobConfig() if before is None else JobConfig.from_frozen(before, f"{args.out}: its job.json")
    given = _given(args, (f.name for f in dataclasses.fields(JobConfig)))
    for name in ("vram", "ram", "disk"):
        if name in given:
            given[name] = parse_size(given[name], f"--{name}")
    if "checkpoint_every" in given:
        given["checkpoint_every"] = _seconds_or_never(given["checkpoint_every"], "--checkpoint-every")
    scheme = dataclasses.replace(base.scheme, **_given(args, (f.name for f in dataclasses.fields(QuantScheme))))
    return dataclasses.replace(base, scheme=scheme, rules=_rules(args, base.rules), **given)


def _rules(args: argparse.Namespace, before: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules as given, those to skip first; of the kind that is not given, those from before."""
    from bigq.scheme import Rule

    if args.skip is None and args.rule is None:
        return before
    skips = (rule for rule in before if rule.overrides is None) if args.skip is None else (Rule(pattern, None) for pattern in args.skip)
    others = (rule for rule in before if rule.overrides is not None) if args.rule is None else (Rule.parse(text) for text in args.rule)
    return (*skips, *others)


def _seconds_or_never(text: str, flag: str) -> float | None:
    try:
        return None if text == "never" else float(text)
    except ValueError:
        raise UsageError(f"{flag} {text}: is not a number of seconds; write for instance 60, 0 or never") from None


def _settings_before(out: str) -> object:
    """The settings of the job that OUT holds; None where it holds none. Raises CheckpointError."""
    from bigq.job.journal import read_job

    job = read_job(Path(os.path.expanduser(out)))
    return None if job is None else job.get("settings", {})


def _run_quantize(args: argparse.Namespace) -> int:
    from bigq.job.stop import Stop
    from bigq.progress.display import DONE_FIELDS, Events, to_json

    stop = Stop(notify=args.display.signalled if isinstance(args.display, Events) else None)
    with stop.listen():
        config = job_config(args, _settings_before(args.out))
        stop.grace = config.grace
        from bigq.sched.run import quantize

        report = quantize(args.model, args.out, config, stop, args.display, command=args.given)
    values = report.to_json()
    args.display.event("done", **{name: values[name] for name in DONE_FIELDS})
    if args.json:
        print_result(to_json(values))
    elif not args.quiet:
        print_result(report.summary())
    return 0


def _run_plan(args: argparse.Namespace) -> int:
    # Over in seconds, of which a seventh would go to looking for garbage in what is being imported.
    collecting = gc.isenabled()
    gc.disable()
    try:
        config = job_config(args, None if args.out is None else _settings_before(args.out))
        from bigq.sched.plan.inputs import plan

        result = plan(args.model, args.out or ".", config, args.on)
    finally:
        if collecting:
            gc.enable()
    print_result(json.dumps(result.to_json()) if args.json else result.table())
    return 0


def _run_eval(args: argparse.Namespace) -> int:
    from bigq.infer.evaluate import EvalConfig, evaluate

    config = EvalConfig(**_given(args, (f.name for f in dataclasses.fields(EvalConfig))))
    result = evaluate(args.model, config, baseline=args.baseline, display=args.display)
    values = {k: v for k, v in dataclasses.asdict(result).items() if v is not None}
    if args.json:
        print_result(json.dumps(values))
    else:
        for name, value in values.items():
            print_result(f"{name.replace('_', ' '):20} {value:.6g}" if isinstance(value, float) else f"{name.replace('_', ' '):20} {value}")
    return 0


def _run_demo(args: argparse.Namespace) -> int:
    from bigq.cli.demo import demo

    demo(args.out, args.device, as_json=args.json)
    return 0
