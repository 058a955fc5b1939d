"""``bigq generate`` on the command line."""

from __future__ import annotations

import argparse

from bigq.cli.flags import add_options, given, group_of
from bigq.cli.parser import Parser
from bigq.common_options import OUTPUT
from bigq.infer.options import GenerateConfig
from bigq.options import table, without_effect
from bigq.progress.terminal import keep_quiet, print_piece, read_prompt, tell


def add_generate(p: Parser) -> None:
    p.add_argument("model", metavar="MODEL", help="original model or output of bigq that fits the device: folder or hub id")
    p.add_argument("--prompt", required=True, metavar="TEXT|-", help="text that the model continues; - reads it from stdin")
    add_options(p, table(GenerateConfig).values())
    group_of(p, OUTPUT).add_argument("--quiet", action="store_true", help="print only the text and errors")
    p.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> int:
    options = table(GenerateConfig)
    values = given(args, options)
    config = GenerateConfig(**values)
    notes = without_effect(values, options.values(), config, "")
    prompt = read_prompt() if args.prompt == "-" else args.prompt
    args.display.reading(args.model)
    for note in notes:
        args.display.say(f"note: {note}")
    from bigq.infer.generate import generate

    result = generate(args.model, prompt, config, write=print_piece, say=keep_quiet if args.quiet else tell)
    if not result.text.endswith("\n"):
        print_piece("\n")
    if not args.quiet:
        tell(result.summary())
    return 0
