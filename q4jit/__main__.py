"""Run the command `q4jit` as `python -m q4jit`."""

import sys

from q4jit.tools.cli.main import main

sys.exit(main())
