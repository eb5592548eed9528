"""`info` and `map`: what an image says of itself, and where its parts are stored."""

import json
import sys
from collections.abc import AsyncIterator, Sequence
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
            runs = _part(host.map(node), start, end)
            if as_json:
                separator = "["
                async for each in runs:
                    sys.stdout.write(separator + json.dumps(map_entry(each)))
                    separator = ",\n"
                if separator == "[":
                    sys.stdout.write(separator + json.dumps(_nothing(start)))
                print("]")
            else:
                print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
                async for each in runs:
                    if each.is_data and not each.zero:
                        unplaced = "compressed" if each.compressed else "enciphered"
                        place = unplaced if each.offset is None else _hex(each.offset)
                        name = printable(each.filename)
                        print(f"{_hex(each.at):<16}{_hex(each.length):<16}{place:<16}{name}")
        return 0

    return run_on_images(work, image_roots=image_roots(roots, *image.folder_of))


def _nothing(at: int) -> dict[str, Any]:
    """How `qemu-img map` says that a disk has nothing from `at` on."""
    return {"start": at, "length": 0, "depth": 0, "present": False, "zero": False, "data": False, "compressed": False}


async def _part(runs: "AsyncIterator[MapRun]", start: int, end: int) -> "AsyncIterator[MapRun]":
    """What of the runs lies in [start, end)."""
    async for each in runs:
        if each.at >= end:
            return
        at, until = max(each.at, start), min(each.at + each.length, end)
        if at < until:
            offset = None if each.offset is None else each.offset + at - each.at
            yield each._replace(at=at, length=until - at, offset=offset)


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
