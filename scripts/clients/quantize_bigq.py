#!/usr/bin/env python3
"""``bigq quantize`` in a process of its own, and what it took.

    quantize_bigq.py USED ARGUMENTS OF BIGQ

USED gets JSON as used.py makes it. The bigq that is measured is the one on PYTHONPATH.
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers  # noqa: F401  # imported before the clock starts, as in the scripts of other programs
from used import Used, write

from bigq.cli.main import main

if __name__ == "__main__":
    path, *arguments = sys.argv[1:]
    used = Used()
    status = main(arguments)
    write(used.said("torch", "transformers"), Path(path))
    sys.exit(status)
