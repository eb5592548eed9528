"""`info`, `map` and `compare`: looking at images without changing them."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from blockjobs.base.errors import UsageError
from blockjobs.cli import render
from blockjobs.cli.formats import format_of
from blockjobs.cli.images import file_options, image_roots, named, open_image
from blockjobs.cli.progress import BarView
from blockjobs.cli.running import run_in_host

if TYPE_CHECKING:
    from blockjobs.block.chain_map import MapRun
    from blockjobs.host import Host

IDENTICAL, DIFFERENT = 0, 1


def info(file: str, *, format: str | None, as_json: bool) -> int:
    """Print what the headers of an image say; returns the exit code.

    Raises:
        BlockjobsError: it could not be read.
    """
    known = format_of(file, format)

    async def work(host: "Host") -> int:
        try:
            described = await host.image_info(file_options(file), format=known)
        except UsageError as error:
            raise named(file, error) from error
        members: dict[str, Any] = msgspec.to_builtins(described)
        shown = {name: value for name, value in members.items() if value is not None}
        print(json.dumps(shown, indent=4) if as_json else render.info_text(shown))
        return 0

    return run_in_host(work)


def show_map(file: str, *, format: str | None, as_json: bool, roots: Sequence[str] | None) -> int:
    """Print where each run of an image is stored; returns the exit code.

    Raises:
        BlockjobsError: it could not be read.
    """
    known = format_of(file, format)

    async def work(host: "Host") -> int:
        node = await open_image(host, file, known, name="image")
        async with host.access(node):
            runs = host.map(node)
            if as_json:
                separator = "["
                async for each in runs:
                    sys.stdout.write(separator + json.dumps(map_entry(each)))
                    separator = ",\n"
                print("]" if separator != "[" else "[]")
            else:
                print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
                async for each in runs:
                    if each.is_data and not each.zero:
                        unplaced = "compressed" if each.compressed else "enciphered"
                        place = unplaced if each.offset is None else _hex(each.offset)
                        name = render.printable(each.filename)
                        print(f"{_hex(each.at):<16}{_hex(each.length):<16}{place:<16}{name}")
        return 0

    return run_in_host(work, image_roots=image_roots(roots, file))


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"


def map_entry(run: "MapRun") -> dict[str, Any]:
    """A run with the member names of `qemu-img map --output=json`."""
    entry: dict[str, Any] = {
        "start": run.at,
        "length": run.length,
        "depth": run.depth,
        "present": run.present,
        "zero": run.zero,
        "data": run.is_data,
        "compressed": run.compressed,
    }
    if run.offset is not None:
        entry["offset"] = run.offset
    return entry


def compare(
    one: str,
    other: str,
    *,
    format: str | None,
    other_format: str | None,
    strict: bool,
    as_json: bool,
    roots: Sequence[str] | None,
) -> int:
    """Say whether two images read the same; returns `qemu-img compare`'s exit code.

    Raises:
        BlockjobsError: one of them could not be read.
    """
    formats = format_of(one, format), format_of(other, other_format)

    async def work(host: "Host") -> int:
        first = await open_image(host, one, formats[0], name="one")
        second = await open_image(host, other, formats[1], name="other")
        same_size = first.length == second.length
        found = None
        if same_size or not strict:
            found = await _search(host, first, second)
        is_same = found is None and (same_size or not strict)
        if as_json:
            print(json.dumps({"identical": is_same, "same-size": same_size, "first-difference": found}))
        else:
            print("\n".join(render.compare_lines(found, same_size=same_size, strict=strict)))
        return IDENTICAL if is_same else DIFFERENT

    return run_in_host(work, image_roots=image_roots(roots, one, other))


async def _search(host: "Host", first: Any, second: Any) -> int | None:
    if not sys.stderr.isatty():
        return await host.first_difference(first, second)
    total, done = max(first.length, second.length), 0
    with BarView("compare") as view:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            view.show("", done, total)

        return await host.first_difference(first, second, advance=advance)
