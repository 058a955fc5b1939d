"""``python3 -m bigq``."""

import sys

from bigq.cli import main

sys.exit(main())
