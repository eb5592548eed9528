"""`python -m blockjobs` is the command `blockjobs`."""

import sys

from blockjobs.cli.main import main

sys.exit(main())
