"""The command line: arguments to configs, results to stdout, errors to one line on stderr and an exit code.

Exit codes: 0 done, 2 usage, 3 bad model or data, 4 environment (memory, disk, device), 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bigq import __version__
from bigq.errors import BigqError

if TYPE_CHECKING:
    from bigq.config import JobConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        status: int = args.command(args)
    except BigqError as error:
        print(f"bigq: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("bigq: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return status


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bigq", description="GPTQ quantization of language models far larger than the machine.")
    parser.add_argument("--version", action="version", version=f"bigq {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_quantize(commands.add_parser("quantize", help="quantize a model", formatter_class=argparse.ArgumentDefaultsHelpFormatter))
    _add_plan(
        commands.add_parser(
            "plan", help="memory, disk and time that quantizing a model takes", formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
    )
    _add_eval(
        commands.add_parser(
            "eval", help="perplexity of a model, and its distance to another", formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
    )
    _add_demo(commands.add_parser("demo", help="quantize the tiny model that ships with bigq, and show what it costs"))
    return parser


def _add_quantize(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="folder with safetensors shards, or hub id (owner/name[@revision])")
    p.add_argument("out", metavar="OUT", help="output folder; holding an interrupted run of the same job, it is gone on with")
    _add_job(p)
    _add_machine(p)
    p.add_argument("--trace", metavar="FILE", help="write the job's timeline there, for chrome://tracing or ui.perfetto.dev")
    p.set_defaults(command=_run_quantize)


def _add_plan(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="folder (its config.json is enough), or hub id (only config and headers are fetched)")
    p.add_argument("out", metavar="OUT", nargs="?", default=".", help="where the output would lie; for the free disk space")
    p.add_argument("--on", default="this", metavar="DEVICE", help="this machine, or plan for a GPU: a100, h100 or h200")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    _add_job(p)
    _add_machine(p)
    p.set_defaults(command=_run_plan)


def _add_job(p: argparse.ArgumentParser) -> None:
    how = p.add_argument_group("how weights are quantized")
    how.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    how.add_argument("--group-size", type=int, default=128, help="inputs that share a scale; -1 for the whole row")
    how.add_argument("--sym", action=argparse.BooleanOptionalAction, default=True, help="fixed zero point in the middle")
    how.add_argument("--asym", dest="sym", action="store_false", default=argparse.SUPPRESS, help="find a zero point with each scale")
    how.add_argument("--act-order", action="store_true", help="quantize columns by decreasing Hessian diagonal, groups as they are")
    how.add_argument("--damping", type=float, default=0.01, help="fraction of the mean Hessian diagonal added to it")
    how.add_argument("--mse", action="store_true", help="grid search for the scales with the least rounding error")
    how.add_argument("--method", default="gptq", choices=("gptq", "rtn"), help="rtn: plain rounding to nearest, no calibration")
    how.add_argument(
        "--true-sequential",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Linears see the quantized ones before them in the block",
    )
    how.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="REGEX:key=value,…",
        help="override bits, group_size, sym, act_order, damping or mse for matching Linears",
    )
    how.add_argument("--skip", action="append", default=[], metavar="REGEX", help="leave matching Linears as they are")
    how.add_argument("--format", default="gptq", choices=("gptq", "gptq_v2"))
    data = p.add_argument_group("calibration")
    data.add_argument(
        "--calibration", default="c4", metavar="FILE|c4|builtin", help="text, JSONL with a text field, or token ids in safetensors"
    )
    data.add_argument("--samples", type=int, default=128)
    data.add_argument("--seqlen", type=int, help="tokens per sample; 2048 or the model's limit if not given")
    data.add_argument("--seed", type=int, default=0)
    room = p.add_argument_group("budgets")
    room.add_argument("--vram", metavar="SIZE", help="device memory the job may take, such as 72GiB; what is free if not given")
    room.add_argument("--ram", metavar="SIZE", help="host memory it may take; what is free if not given")
    room.add_argument("--disk", metavar="SIZE", help="disk space it may take where OUT lies; what is free if not given")
    room.add_argument(
        "--activations",
        default="auto",
        choices=("auto", "gpu", "host", "disk"),
        help="where calibration activations are kept between blocks; auto is the first that has room, disk is a file in OUT",
    )
    room.add_argument(
        "--read-ahead",
        type=int,
        metavar="BLOCKS",
        help="blocks read while the one before is computed and, unless 0, written beside the next; 1 on a GPU, 0 on a CPU if not given",
    )


def _add_eval(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="original model or output of bigq: folder or hub id")
    p.add_argument("--data", required=True, metavar="FILE|builtin", help="text, JSONL with a text field, or token ids in safetensors")
    p.add_argument("--baseline", metavar="MODEL", help="also compare with this model: KL divergence per token and top-1 agreement")
    p.add_argument("--seqlen", type=int, help="tokens per row; 2048 or the model's limit if not given")
    p.add_argument("--samples", type=int, help="rows to evaluate; all of the text if not given")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    _add_machine(p)
    p.set_defaults(command=_run_eval)


def _add_machine(p: argparse.ArgumentParser) -> None:
    machine = p.add_argument_group("machine")
    machine.add_argument(
        "--batch", type=int, help="rows that go through a block at once; 8 on a GPU and about 1024 tokens on a CPU if not given"
    )
    machine.add_argument("--device", default="auto", help="cuda:0, cpu or auto")
    machine.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the forward passes; auto is the checkpoint's",
    )
    machine.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint")
    machine.add_argument("--quiet", action="store_true", help="no progress, no summary")


def _add_demo(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", default="bigq-demo", help="folder for the quantized models (default: %(default)s)")
    p.add_argument("--device", default="auto", help="cuda:0, cpu or auto")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    p.set_defaults(command=_run_demo)


def job_config(args: argparse.Namespace) -> JobConfig:
    """The job that ``bigq quantize`` arguments describe. Raises UsageError."""
    from bigq.config import JobConfig
    from bigq.scheme import QuantScheme, Rule
    from bigq.sizes import parse_size

    def size(flag: str) -> int | None:
        text = getattr(args, flag)
        return None if text is None else parse_size(text, f"--{flag}")

    scheme = QuantScheme(
        bits=args.bits, group_size=args.group_size, symmetric=args.sym, act_order=args.act_order, damping=args.damping, mse=args.mse
    )
    return JobConfig(
        scheme=scheme,
        rules=(*(Rule(pattern, None) for pattern in args.skip), *(Rule.parse(text) for text in args.rule)),
        method=args.method,
        format=args.format,
        true_sequential=args.true_sequential,
        calibration=args.calibration,
        samples=args.samples,
        seqlen=args.seqlen,
        seed=args.seed,
        batch=args.batch,
        activations=args.activations,
        read_ahead=args.read_ahead,
        vram=size("vram"),
        ram=size("ram"),
        disk=size("disk"),
        trace=getattr(args, "trace", None),
        device=args.device,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        quiet=args.quiet,
    )


def _run_quantize(args: argparse.Namespace) -> int:
    config = job_config(args)
    from bigq.sched.pipeline import quantize

    report = quantize(args.model, args.out, config)
    if not args.quiet:
        print(report.summary())
    return 0


def _run_plan(args: argparse.Namespace) -> int:
    # Over in seconds, of which a seventh would go to looking for garbage in what is being imported.
    collecting = gc.isenabled()
    gc.disable()
    try:
        config = job_config(args)
        from bigq.sched.planning import plan

        result = plan(args.model, args.out, config, args.on)
    finally:
        if collecting:
            gc.enable()
    print(json.dumps(result.to_json()) if args.json else result.table())
    return 0


def _run_eval(args: argparse.Namespace) -> int:
    from bigq.sched.evaluate import EvalConfig, evaluate

    config = EvalConfig(
        data=args.data,
        seqlen=args.seqlen,
        samples=args.samples,
        batch=args.batch,
        device=args.device,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        quiet=args.quiet,
    )
    result = evaluate(args.model, config, baseline=args.baseline)
    values = {k: v for k, v in dataclasses.asdict(result).items() if v is not None}
    if args.json:
        print(json.dumps(values))
    else:
        for name, value in values.items():
            print(f"{name.replace('_', ' '):20} {value:.6g}" if isinstance(value, float) else f"{name.replace('_', ' '):20} {value}")
    return 0


def _run_demo(args: argparse.Namespace) -> int:
    from bigq.demo import demo

    demo(args.out, args.device, as_json=args.json)
    return 0
