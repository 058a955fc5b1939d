"""``bigq eval`` on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from bigq.cli.flags import add_option, add_options, given, group_of
from bigq.cli.parser import Parser
from bigq.common_options import OUTPUT
from bigq.errors import REPEAT
from bigq.infer.options import TEXT, EvalConfig
from bigq.machine.ranks import Place
from bigq.options import table
from bigq.progress.display import Display
from bigq.progress.terminal import print_result, tell

if TYPE_CHECKING:
    from bigq.infer.results import Evaluation

#: Seconds in which a process that is asked to stop ends by itself. Nothing is saved, so there is nothing to wait for.
GRACE = 10.0


def add_eval(p: Parser) -> None:
    p.description = f"{p.description} If MODEL is the folder of a finished job, the result is recorded there for bigq report."
    p.add_argument("model", metavar="MODEL", help="original model or output of bigq: folder or hub id")
    options = table(EvalConfig)
    # The API's default text is the shipped one; a command names its text.
    add_option(group_of(p, TEXT), dataclasses.replace(options["data"], default=None), required=True)
    add_options(p, (each for name, each in options.items() if name != "data"))
    baseline = "also compare with this model: KL divergence per token and top-1 agreement"
    group_of(p, TEXT).add_argument("--baseline", metavar="MODEL", help=baseline)
    group_of(p, OUTPUT).add_argument("--json", action="store_true", help="print one JSON object")
    p.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> int:
    config = EvalConfig(**given(args, table(EvalConfig)))
    place: Place | None = args.place
    if place is None:
        args.display.reading(args.model)
        from bigq.infer.evaluate import evaluate

        result = evaluate(args.model, config, baseline=args.baseline, display=args.display)
    else:
        result = _shared(args, config, place)
        if place.index > 0:
            return 0
    values = {name: value for name, value in dataclasses.asdict(result).items() if value is not None}
    if args.json:
        print_result(json.dumps(values))
    else:
        for name, value in values.items():
            print_result(f"{name.replace('_', ' '):20} {value:.6g}" if isinstance(value, float) else f"{name.replace('_', ' '):20} {value}")
    return 0


def _shared(args: argparse.Namespace, config: EvalConfig, place: Place) -> Evaluation:
    """The evaluation by several processes. The first one shows the progress of all."""
    from bigq.job.stop import Stop

    display = args.display if place.index == 0 else Display()
    stop = Stop(GRACE, advice=REPEAT)

    def pause() -> None:
        if stop.requested:
            raise stop.error("before it was done")

    with stop.listen():
        display.reading(args.model)
        from bigq.infer.evaluate import evaluate
        from bigq.machine.process_group import joined_group

        with joined_group(place, lambda text: tell(f"bigq: {text}"), pause, stop.exit_code, stop.advice) as ranks:
            return evaluate(args.model, config, baseline=args.baseline, display=display, ranks=ranks, pause=pause)
