"""`info` and `map`: what an image says of itself, and where its parts are stored."""

import json
import sys
from collections.abc import AsyncIterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec

from blockjobs.base.errors import UsageError
from blockjobs.base.text import printable
from blockjobs.cli import render
from blockjobs.cli.arguments import Existing
from blockjobs.cli.image_opts import Image, given_image
from blockjobs.cli.images import file_options, image_roots
from blockjobs.cli.running import run_on_images

if TYPE_CHECKING:
    from blockjobs.block.chain_map import MapRun
    from blockjobs.host import ImageHost


def info(file: str, existing: Existing, *, backing_chain: bool, as_json: bool, roots: Sequence[str] | None) -> int:
    """Print what the headers of an image, or of a whole chain, say; returns the exit code.

    Raises:
        BlockjobsError: it could not be read.
    """
    image = given_image(file, existing.format, image_opts=existing.image_opts)

    async def work(host: "ImageHost") -> int:
        try:
            described = [await host.image_info(image.file(), format=image.format)]
            if backing_chain:
                for path, format in await _below(host, image):
                    described.append(await host.image_info(file_options(path), format=format))
        except UsageError as error:
            raise image.named(error) from error
        shown = [_said(msgspec.to_builtins(each)) for each in described]
        if as_json:
            print(json.dumps(shown if backing_chain else shown[0], indent=4))
        else:
            print("\n\n".join(render.info_text(each) for each in shown))
        return 0

    return run_on_images(work, image_roots=image_roots(roots, *image.folder_of))


def _said(members: dict[str, Any]) -> dict[str, Any]:
    """Without the members of which an image says nothing."""
    return {
        name: _said(value) if isinstance(value, dict) else value for name, value in members.items() if value is not None
    }


async def _below(host: "ImageHost", image: Image) -> list[tuple[str, str]]:
    """Path and format of the images below one, from the top down."""
    node = top = await image.open(host, name="top", **{"force-share": True})
    chain: list[tuple[str, str]] = []
    while node.backing is not None:
        node = node.backing
        chain.append((node.filename, node.driver_name))
    await host.close_nodes(top)
    return chain


def show_map(
    file: str,
    existing: Existing,
    *,
    start: int,
    length_max: int | None,
    force_share: bool,
    as_json: bool,
    roots: Sequence[str] | None,
) -> int:
    """Print where each run of an image is stored; returns the exit code.

    Args:
        start, length_max: the part of the disk that matters, in bytes; None for all the rest.

    Raises:
        BlockjobsError: it could not be read.
    """
    image = given_image(file, existing.format, image_opts=existing.image_opts)

    async def work(host: "ImageHost") -> int:
        node = await image.open(host, name="image", **({"force-share": True} if force_share else {}))
        end = node.length if length_max is None else min(node.length, start + length_max)
        async with host.access(node):
            batches = _part(host.map_in_batches(node), start, end)
            if as_json:
                separator = "["
                async for batch in batches:
                    sys.stdout.write(separator + ",\n".join(map(_json_text, batch)))
                    separator = ",\n"
                if separator == "[":
                    sys.stdout.write(separator + json.dumps(_nothing(start)))
                print("]")
            else:
                print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
                async for batch in batches:
                    sys.stdout.write("".join([_line(run) for run in batch if run.is_data and not run.zero]))
        return 0

    return run_on_images(work, image_roots=image_roots(roots, *image.folder_of))


def _nothing(at: int) -> dict[str, Any]:
    """How `qemu-img map` says that a disk has nothing from `at` on."""
    return {"start": at, "length": 0, "depth": 0, "present": False, "zero": False, "data": False, "compressed": False}


async def _part(batches: "AsyncIterator[list[MapRun]]", start: int, end: int) -> "AsyncIterator[list[MapRun]]":
    """What of the runs lies in [start, end), without empty batches."""
    async for batch in batches:
        if batch[0].at >= end:
            return
        if batch[0].at >= start and batch[-1].at + batch[-1].length <= end:
            yield batch
        elif inside := [part for run in batch if (part := _clipped(run, start, end)).length > 0]:
            yield inside


def _clipped(run: "MapRun", start: int, end: int) -> "MapRun":
    at, until = max(run.at, start), min(run.at + run.length, end)
    offset = None if run.offset is None else run.offset + at - run.at
    return run._replace(at=at, length=until - at, offset=offset)


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"


@cache
def _json_status(depth: int, present: bool, zero: bool, data: bool, compressed: bool) -> str:
    members = {"depth": depth, "present": present, "zero": zero, "data": data, "compressed": compressed}
    return json.dumps(members)[1:-1]


def _json_text(run: "MapRun") -> str:
    """A run with the member names of `qemu-img map --output=json`. Not by `json`: there may be millions."""
    at, length, depth, present, zero, data, compressed, offset, _ = run
    status = _json_status(depth, present, zero, data, compressed)
    if offset is None:
        return f'{{"start": {at}, "length": {length}, {status}}}'
    return f'{{"start": {at}, "length": {length}, {status}, "offset": {offset}}}'


def _line(run: "MapRun") -> str:
    """A run of stored data as a line of `qemu-img map`."""
    at, length, _, _, _, _, compressed, offset, filename = run
    unplaced = "compressed" if compressed else "enciphered"
    place = unplaced if offset is None else _hex(offset)
    return f"{_hex(at):<16}{_hex(length):<16}{place:<16}{_printable(filename)}\n"


_printable = cache(printable)
