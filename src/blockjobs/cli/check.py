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


def check(file: str, *, repair: str | None, format: str | None, as_json: bool) -> int:
    """Check an image, repair it on request, and print what was found; returns the exit code.

    Args:
        file: the image.
        repair: "leaks" if only leaks may be repaired, "all" for whatever reference counts can put right.
        format: qcow2 or raw; None to find out.
        as_json: print members of QAPI's ImageCheck.

    Raises:
        BlockjobsError: it could not be checked at all, or not be repaired.
    """
    known = format_of(file, format)
    if known != "qcow2":
        print(f"blockjobs: '{file}' is {known}, a format without metadata that could be checked", file=sys.stderr)
        return NO_CHECKS

    async def work(host: "Host") -> int:
        try:
            found = await host.check_image(file_options(file))
            after = found
            if repair == "all" or (repair == "leaks" and found.leaks and not found.corruptions):
                after = await host.repair_image(file_options(file))
        except UsageError as error:
            raise named(file, error) from error
        members = after.members()
        if after is not found:
            members |= _fixed(found, after)
        if as_json:
            print(json.dumps({"filename": file, "format": known, **members}, indent=4))
        else:
            _show_problems(found)
            print("\n".join(render.check_lines(members)))
        return _exit_code(after)

    return run_in_host(work)


def _fixed(found: "CheckResult", after: "CheckResult") -> dict[str, int]:
    fixed = {
        "leaks-fixed": found.leaks - after.leaks,
        "corruptions-fixed": found.corruptions - after.corruptions,
    }
    return {name: count for name, count in fixed.items() if count > 0}


def _show_problems(found: "CheckResult") -> None:
    for problem in found.problems[:PROBLEMS_SHOWN]:
        print(render.printable(problem), file=sys.stderr)
    hidden = len(found.problems) - PROBLEMS_SHOWN
    if hidden > 0:
        print(f"... and {hidden} more of this kind", file=sys.stderr)


def _exit_code(found: "CheckResult") -> int:
    if found.corruptions:
        return DAMAGED
    if found.check_errors:
        return UNCHECKED
    return LEAKY if found.leaks else SOUND
