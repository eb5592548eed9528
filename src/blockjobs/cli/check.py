"""`blockjobs check`: is the image sound? The exit codes and words are those of `qemu-img check`."""

import json
import sys
from typing import TYPE_CHECKING, Final

from blockjobs.base.errors import UsageError
from blockjobs.base.text import printable
from blockjobs.cli import render
from blockjobs.cli.image_opts import given_image
from blockjobs.cli.images import cache_options
from blockjobs.cli.running import run_on_images

if TYPE_CHECKING:
    from blockjobs.block.drivers.qcow2.check import CheckResult
    from blockjobs.cli.arguments import Existing
    from blockjobs.host import ImageHost

SOUND, UNCHECKED, DAMAGED, LEAKY, NO_CHECKS = 0, 1, 2, 3, 63
PROBLEMS_SHOWN: Final = 20


def check(
    file: str,
    existing: "Existing",
    *,
    repair: str | None,
    cache: str,
    force_share: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Check an image, repair it on request, and print what was found; returns the exit code.

    Args:
        file: the image.
        repair: "leaks" if only leaks may be repaired, "all" for whatever reference counts can put right.
        cache: a cache mode of qemu-img.
        force_share: do not ask whether somebody writes to it; not with `repair`.
        quiet: print nothing; problems still go to standard error.
        as_json: print members of QAPI's ImageCheck.

    Raises:
        BlockjobsError: it could not be checked at all, or not be repaired.
    """
    if repair is not None and force_share:
        raise UsageError("-U is for checks only: an image that somebody may be using cannot be repaired")
    image = given_image(file, existing.format, image_opts=existing.image_opts)
    known = image.format
    if known != "qcow2":
        print(f"blockjobs: '{file}' is {known}, a format without metadata that could be checked", file=sys.stderr)
        return NO_CHECKS

    async def work(host: "ImageHost") -> int:
        holder = image.file() | cache_options(cache) | ({"force-share": True} if force_share else {})
        try:
            found = await host.check_image(holder)
            after = found
            if repair == "all" or (repair == "leaks" and found.leaks):
                after = await host.repair_image(holder, leaks_only=repair == "leaks")
        except UsageError as error:
            raise image.named(error) from error
        members = after.members()
        if after is not found:
            members |= _fixed(found, after)
        if as_json and not quiet:
            print(json.dumps({"filename": file, "format": known, **members}, indent=4))
        elif not as_json:
            _show_problems(found)
            if not quiet:
                print("\n".join(render.check_lines(members)))
        return _exit_code(after)

    return run_on_images(work)


def _fixed(found: "CheckResult", after: "CheckResult") -> dict[str, int]:
    fixed = {
        "leaks-fixed": found.leaks - after.leaks,
        "corruptions-fixed": found.corruptions - after.corruptions,
    }
    return {name: count for name, count in fixed.items() if count > 0}


def _show_problems(found: "CheckResult") -> None:
    for problem in found.problems[:PROBLEMS_SHOWN]:
        print(printable(problem), file=sys.stderr)
    hidden = len(found.problems) - PROBLEMS_SHOWN
    if hidden > 0:
        print(f"... and {hidden} more of this kind", file=sys.stderr)


def _exit_code(found: "CheckResult") -> int:
    if found.corruptions:
        return DAMAGED
    if found.check_errors:
        return UNCHECKED
    return LEAKY if found.leaks else SOUND
