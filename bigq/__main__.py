"""``python3 -m bigq``."""

import sys

from bigq.cli.main import main

sys.exit(main())
