"""``bigq quantize`` and ``bigq plan`` on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

from bigq.batch.settings import LISTS, Ending, job_options, read_settings
from bigq.cli.flags import add_option, add_options, given, group_of
from bigq.cli.parser import Parser
from bigq.common_options import OUTPUT, RUN
from bigq.config import JobConfig
from bigq.errors import ResourceError, Stopped
from bigq.machine.memory import without_collection
from bigq.machine.ranks import Place
from bigq.options import Option, table, without_effect
from bigq.progress.display import DONE_FIELDS, Display, Events, to_json
from bigq.progress.terminal import print_result, tell
from bigq.sched.plan.sharing import Assumed
from bigq.scheme import WEIGHTS, QuantScheme, Rule

#: Options of a job that a plan does not need.
ONLY_QUANTIZE = ("grace", "steal_lock", "trace", "allow_ranks")

_KEPT = "If OUT holds a job, options that are not given keep the job's values; otherwise they have their defaults."


def add_quantize(p: Parser) -> None:
    p.description = f"{p.description} {_KEPT}"
    p.add_argument("model", metavar="MODEL", nargs="?", help="folder with safetensors shards, or hub id (owner/name[@revision])")
    p.add_argument("out", metavar="OUT", nargs="?", help="output folder; if it holds the same job unfinished, the job is resumed")
    _add_job(p, job_options())
    add_options(p, table(Ending).values())
    output = group_of(p, OUTPUT)
    output.add_argument("--json", action="store_true", help="print a JSON object on stdout and events on stderr, one per line")
    output.add_argument("--print-config", action="store_true", help="print the job as a YAML file for --config, and do nothing else")
    p.set_defaults(command=_run_quantize, complete=_complete)


def add_plan(p: Parser) -> None:
    p.description = f"{p.description} Exits with 4 if the job does not fit. {_KEPT}"
    model = "folder (its config.json is enough), or hub id (only config and headers are downloaded)"
    p.add_argument("model", metavar="MODEL", nargs="?", help=model)
    p.add_argument("out", metavar="OUT", nargs="?", help="where the output would go, for the free disk space (default: current folder)")
    _add_job(p, (each for each in job_options() if each.name not in ONLY_QUANTIZE))
    add_options(p, table(Assumed).values())
    on = "plan for another machine's GPU: a100, h100 or h200 (default: this)"
    group_of(p, RUN).add_argument("--on", default="this", metavar="DEVICE", help=on)
    group_of(p, OUTPUT).add_argument("--json", action="store_true", help="print one JSON object, and events on stderr")
    p.set_defaults(command=_run_plan, complete=_complete)


def _complete(p: Parser, args: argparse.Namespace) -> None:
    """Add what the file of ``--config`` says and the command line does not. Raises UsageError."""
    if args.config is not None:
        file = read_settings(Path(os.path.expanduser(args.config)))
        for dest, value in {"model": file.model, "out": file.out, **file.values}.items():
            if getattr(args, dest, None) is None:
                setattr(args, dest, value)
    needed = {"model": "MODEL", "out": "OUT"} if args.command is _run_quantize else {"model": "MODEL"}
    missing = [name for dest, name in needed.items() if getattr(args, dest) is None]
    if missing:
        p.error(f"the following arguments are required: {', '.join(missing)}")


def _add_job(p: Parser, options: Iterable[Option]) -> None:
    add_options(p, options)
    weights, rules = group_of(p, WEIGHTS), table(JobConfig)["rules"]
    keys = ", ".join(each.rule_key for each in table(QuantScheme).values() if each.rule_key)
    help = f"another scheme for Linears whose name matches; keys: {keys}; may be repeated"
    rule = dataclasses.replace(rules, help=help, placeholder="REGEX:key=value,…", convert=_rule_text, default=None)
    add_option(weights, rule, action="append")
    help = "leave Linears whose name matches unquantized; may be repeated"
    weights.add_argument("--skip", action="append", metavar="REGEX", help=help)
    help = "YAML file with options by name, model and out; options of the command line take their place"
    group_of(p, RUN).add_argument("--config", metavar="FILE", help=help)


def _rule_text(text: str, _: str) -> Rule:
    return Rule.parse(text)


def job_config(args: argparse.Namespace, before: object = None) -> JobConfig:
    """The job that the arguments of ``bigq quantize`` describe. Options that are not given come from ``before``, else from the defaults.

    before: the settings in the job.json of ``args.out``, if it has one. Raises UsageError, CheckpointError (for ``before``).
    """
    base = JobConfig() if before is None else JobConfig.from_frozen(before, f"{args.out}: its job.json")
    if args.quality is not None:
        base = base.with_quality(args.quality)
    values = given(args, (each.name for each in job_options() if each.name in table(JobConfig)))
    scheme = dataclasses.replace(base.scheme, **given(args, table(QuantScheme)))
    chosen = base.rules[len(base.given_rules) :]
    rules = (*_rules(args, base.given_rules), *chosen)
    return dataclasses.replace(base, scheme=scheme, rules=rules, **values)


def _rules(args: argparse.Namespace, before: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules as given, those that skip first. If a kind is not given, the rules of that kind from ``before``."""
    if args.skip is None and args.rules is None:
        return before
    skips = (rule for rule in before if rule.overrides is None) if args.skip is None else (Rule(pattern, None) for pattern in args.skip)
    others = (rule for rule in before if rule.overrides is not None) if args.rules is None else (Rule.parse(text) for text in args.rules)
    return (*skips, *others)


def _settings_before(out: str) -> object:
    """The settings of the job that OUT holds; None where it holds none. Raises CheckpointError."""
    from bigq.job.journal import read_job

    job = read_job(Path(os.path.expanduser(out)))
    return None if job is None else job.get("settings", {})


def idle_options(args: argparse.Namespace, config: JobConfig, device: str) -> list[str]:
    """Notes about options that have no effect. device: "cpu", "cuda", or "" for not known yet. Raises UsageError."""
    options = job_options()
    notes = without_effect(given(args, (each.name for each in options)), options, config, device)
    if args.device is not None and getattr(args, "on", "this") != "this":
        notes.append(f"--device: no effect with --on {args.on}")
    return notes


def _begin(args: argparse.Namespace, config: JobConfig) -> None:
    """Show the first lines of a job, if possible before torch is imported. Raises UsageError, ResourceError for the device."""
    idle_options(args, config, "")
    args.display.reading(args.model)
    device = "cpu" if config.device == "cpu" else ""
    if getattr(args, "on", "this") != "this":
        device = "cuda"
    elif args.vram is not None and not device:
        from bigq.machine.device import choose_device

        device = choose_device(config.device).type
    for note in idle_options(args, config, device):
        args.display.say(f"note: {note}")


def _run_quantize(args: argparse.Namespace) -> int:
    from bigq.job.stop import Stop

    if args.print_config:
        _print_config(args)
        return 0
    place: Place | None = args.place
    notify = args.display.signalled if isinstance(args.display, Events) else None
    stop = Stop(notify=notify, exit_code=args.exit_code_on_stop or Stopped.exit_code)
    with stop.listen():
        config = job_config(args, _settings_before(args.out))
        stop.grace = config.grace
        _begin(args, config)
        with without_collection():
            from bigq.job.settle import require_fixed
            from bigq.sched.run import quantize

        require_fixed(config, given(args, table(QuantScheme)))
        how = {"command": args.given, "started": args.started}
        if place is None:
            report = quantize(args.model, args.out, config, stop, args.display, **how)
        else:
            from bigq.machine.process_group import joined_group

            # The first rank shows the progress of all.
            args.display = args.display if place.index == 0 else Display()
            with joined_group(place, lambda text: tell(f"bigq: {text}"), stop.check, stop.exit_code) as ranks:
                report = quantize(args.model, args.out, config, stop, args.display, **how, ranks=ranks)
            if place.index > 0:
                return 0
    values = report.to_json()
    args.display.event("done", **{name: values[name] for name in DONE_FIELDS})
    if args.json:
        print_result(to_json(values))
    elif not args.quiet:
        print_result(report.summary())
    return 0


def _print_config(args: argparse.Namespace) -> None:
    from bigq.batch.text import settings_text

    config = job_config(args, _settings_before(args.out))
    idle_options(args, config, "")
    names = [*(each.name for each in (*job_options(), *table(Ending).values())), *LISTS.values()]
    print_result(settings_text(args.model, args.out, given(args, names), config))


def _run_plan(args: argparse.Namespace) -> int:
    with without_collection():
        assumed = Assumed(**given(args, table(Assumed)))
        config = job_config(args, None if args.out is None else _settings_before(args.out))
        _begin(args, config)
        from bigq.job.settle import require_fixed
        from bigq.sched.plan.inputs import plan

        require_fixed(config, given(args, table(QuantScheme)))
        result = plan(args.model, args.out or ".", config, args.on, assumed)
    print_result(json.dumps(result.to_json()) if args.json else result.table())
    if result.shortages:
        raise ResourceError(f"{args.model}: the job does not fit: {'; '.join(result.shortages)}")
    return 0
