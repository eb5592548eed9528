"""`blockjobs-storage-daemon`: takes the place of `qemu-storage-daemon`."""

import sys
from collections.abc import Sequence

from blockjobs import __version__
from blockjobs.base.errors import BlockjobsError
from blockjobs.daemon.options import HELP, PROGRAM, parse_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status.

    Args:
        arguments: without the program's name; the process's own by default.
    """
    try:
        options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        for option in options:
            if option.name == "help":
                print(HELP, end="")
                return 0
            if option.name == "version":
                print(f"{PROGRAM} version {__version__}")
                return 0
        # Not earlier: who asks for the version need not wait for the rest.
        from blockjobs.daemon.serving import serve

        return serve(options)
    except BlockjobsError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
