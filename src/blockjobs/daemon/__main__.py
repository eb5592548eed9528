"""`python -m blockjobs.daemon` is `blockjobs-storage-daemon`."""

import sys

from blockjobs.daemon.main import main

if __name__ == "__main__":
    sys.exit(main())
