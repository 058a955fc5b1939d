"""``bigq generate`` on the command line."""

from __future__ import annotations

import argparse
import dataclasses

from bigq.cli.flags import add_device, given, option
from bigq.progress.terminal import keep_quiet, print_piece, read_prompt, tell


def add_generate(p: argparse.ArgumentParser) -> None:
    """Its flags."""
    p.add_argument("model", metavar="MODEL", help="original model or output of bigq, small enough for the device: folder or hub id")
    p.add_argument("--prompt", required=True, metavar="TEXT|-", help="what the model goes on with; - reads it from stdin")
    option(p, "--chat", action="store_true", default=False, help="put the prompt into the tokenizer's chat template")
    option(p, "--max-new-tokens", type=int, default=128, metavar="N", help="tokens to add, at most")
    option(p, "--temperature", type=float, metavar="X", help="draw tokens, the flatter the higher; the most likely ones if not given")
    option(p, "--top-p", type=float, metavar="X", help="draw from the likeliest tokens that have this probability together")
    option(p, "--seed", type=int, default=0, help="of the draw of tokens")
    add_device(p)
    option(p, "--quiet", action="store_true", default=False, help="no line about time and memory")
    p.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> int:
    from bigq.infer.generate import GenerateConfig, generate

    config = GenerateConfig(**given(args, (f.name for f in dataclasses.fields(GenerateConfig))))
    prompt = read_prompt() if args.prompt == "-" else args.prompt
    result = generate(args.model, prompt, config, write=print_piece, say=keep_quiet if args.quiet else tell)
    if not result.text.endswith("\n"):
        print_piece("\n")
    if not args.quiet:
        tell(result.summary())
    return 0
