"""`blockjobs check`: is the image sound? The exit codes and words are those of `qemu-img check`."""

import json
import sys
from typing import TYPE_CHECKING, Final

from blockjobs.base.errors import UsageError
from blockjobs.cli import render
from blockjobs.cli.formats import format_of
from blockjobs.cli.images import file_options, named
from blockjobs.cli.running import run_in_host

if TYPE_CHECKING:
    from blockjobs.block.drivers.qcow2.check import CheckResult
    from blockjobs.host import Host

SOUND, UNCHECKED, DAMAGED, LEAKY, NO_CHECKS = 0, 1, 2, 3, 63
PROBLEMS_SHOWN: Final = 20


def check(file: str, *, format: str | None, as_json: bool) -> int:
    """Check an image and print what was found; returns the exit code.

    Raises:
        BlockjobsError: it could not be checked at all.
    """
    known = format_of(file, format)
    if known != "qcow2":
        print(f"blockjobs: '{file}' is {known}, a format without metadata that could be checked", file=sys.stderr)
        return NO_CHECKS

    async def work(host: "Host") -> int:
        try:
            found = await host.check_image(file_options(file))
        except UsageError as error:
            raise named(file, error) from error
        if as_json:
            print(json.dumps({"filename": file, "format": known, **found.members()}, indent=4))
        else:
            for problem in found.problems[:PROBLEMS_SHOWN]:
                print(render.printable(problem), file=sys.stderr)
            hidden = found.corruptions + found.leaks - PROBLEMS_SHOWN
            if hidden > 0:
                print(f"... and {hidden} more of this kind", file=sys.stderr)
            print("\n".join(render.check_lines(found.members())))
        return _exit_code(found)

    return run_in_host(work)


def _exit_code(found: "CheckResult") -> int:
    if found.corruptions:
        return DAMAGED
    if found.check_errors:
        return UNCHECKED
    return LEAKY if found.leaks else SOUND
