"""What the flags of all commands have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any


def option(group: argparse._ActionsContainer, *flags: str, help: str, default: object = None, **how: Any) -> None:
    """Add a flag that parses to None where it is not given; ``default`` is what that stands for at first, for the help."""
    if isinstance(default, bool):
        default = "on" if default else "off"
    group.add_argument(*flags, default=None, help=help if default is None else f"{help} (default: {default})", **how)


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the arguments that were given."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def add_device(machine: argparse._ActionsContainer) -> None:
    """Flags about where and in which precision a model runs."""
    option(machine, "--device", default="auto", help="cuda:0, cpu or auto")
    option(
        machine,
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the forward passes; auto is the checkpoint's",
    )
    run_code = "run model code that comes with the checkpoint"
    option(machine, "--trust-remote-code", action=argparse.BooleanOptionalAction, default=False, help=run_code)
