"""`blockjobs dd`: part of an image becomes a new one, with the operands of `qemu-img dd`."""

import sys
from collections.abc import Sequence

from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import parse_size
from blockjobs.cli.convert import convert
from blockjobs.cli.convert_options import Converting

BLOCK_BYTES = 512
BLOCK_BYTES_MAX = (1 << 31) - 1


def dd(operands: Sequence[str], converting: Converting) -> int:
    """Copy the blocks `skip` to `count` of `if=` to a new image `of=`; returns the exit code.

    Args:
        operands: `if=`, `of=`, `bs=`, `count=`, `skip=`. As in qemu-img, `count` counts from the start of the image,
            the blocks that are skipped included, and the new disk ends at a whole sector.
        converting: formats, and whether the image may be in use.

    Raises:
        BlockjobsError, OSError: it failed; the target is as before.
    """
    given = _read(operands)
    if "if" not in given or "of" not in given:
        raise UsageError("Must specify both input and output files: add if=IMAGE and of=IMAGE")
    block = _number(given, "bs", BLOCK_BYTES)
    if not 1 <= block <= BLOCK_BYTES_MAX:
        raise UsageError(f"Invalid bs specified. Must be between 1 and {BLOCK_BYTES_MAX}.")
    count = _number(given, "count", 0) if "count" in given else None
    skip = _number(given, "skip", 0)

    def part(length: int) -> Span:
        end = length if count is None else min(length, count * block)
        if skip * block > end:
            print(f"blockjobs: {given['if']}: cannot skip to specified offset", file=sys.stderr)
        start = min(skip * block, end)
        return Span(start, end - start)

    return convert([given["if"]], given["of"], converting, part=part)


def _read(operands: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for operand in operands:
        name, equals, value = operand.partition("=")
        if not equals or name not in ("if", "of", "bs", "count", "skip"):
            raise UsageError(f"unrecognized operand {name}: use if=, of=, bs=, count=, skip=")
        given[name] = value
    return given


def _number(given: dict[str, str], name: str, default: int) -> int:
    if name not in given:
        return default
    try:
        return parse_size(given[name])
    except ValueError as error:
        raise UsageError(f"Invalid {name} specified: {error}") from error
