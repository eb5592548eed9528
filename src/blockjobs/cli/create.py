"""`blockjobs create`: make an empty image."""

import json
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from blockjobs.base.errors import UsageError
from blockjobs.base.units import format_bytes
from blockjobs.cli.formats import FORMATS, format_for_new, local_name
from blockjobs.cli.image_options import data_file_as_node, option_lines, parse_options, readers_for, wants_help
from blockjobs.cli.images import image_roots, open_image
from blockjobs.cli.running import new_image_host, run
from blockjobs.cli.targets import Partial

if TYPE_CHECKING:
    from blockjobs.host import ImageHost


def create(
    file: str,
    length: int | None,
    *,
    format: str | None,
    options: list[str] | None,
    backing: str | None,
    backing_format: str | None,
    unchecked: bool,
    replace: bool,
    quiet: bool,
    as_json: bool,
    roots: Sequence[str] | None,
) -> int:
    """Make an image; returns the exit code.

    Args:
        unchecked: do not look at the backing file; then the length must be known.
        quiet: say nothing.

    Raises:
        BlockjobsError, OSError: it could not be made, and nothing is left behind.
    """
    known = format_for_new(file, format)
    file = local_name(file)
    if wants_help(options or ()):
        print("\n".join(["Supported options:", *option_lines(readers_for(known))]))
        return 0
    members = parse_options(options or (), known)
    if backing is not None:
        members["backing_file"] = backing if unchecked else local_name(backing)
    if backing_format is not None:
        members["backing_fmt"] = backing_format
    if unchecked and length is None:
        raise UsageError("SIZE is missing: with -u nobody asks the backing file for its size")
    base = None if unchecked else _check_backing(file, known, members)
    if length is None and base is None:
        raise UsageError("SIZE is missing: only an image with a backing file (-b) can do without")
    with Partial(file, replace=replace) as partial:
        made: list[int] = []

        async def work() -> int:

            async with new_image_host(image_roots=image_roots(roots, *([base] if base else []))) as host:
                made.append(await _make(host, partial, known, length, members, base))
            return 0

        code = run(work)
        if code:
            return code
        partial.complete()
    if quiet:
        return 0
    if as_json:
        print(json.dumps({"filename": file, "format": known, "virtual-size": made[0]}))
    else:
        print(f"Created '{file}': {known}, {format_bytes(made[0])} ({made[0]} bytes)")
    return 0


async def _make(
    host: "ImageHost", partial: Partial, format: str, length: int | None, members: dict[str, Any], base: str | None
) -> int:
    await partial.demand_unused(host)
    if length is None:
        assert base is not None
        node = await open_image(host, base, members["backing_fmt"], name="backing")
        length = node.length
        partial.demand_other_than(host.open_files())
        await host.close_nodes(node)
    partial.claim_name()
    if "data_file" in members:
        partial.claim_data_file(members["data_file"])
    await host.create_image(partial.path, format, length, durably=False, **data_file_as_node(members))
    return length


def _check_backing(file: str, format: str, members: dict[str, Any]) -> str | None:
    """The backing file's path as seen from here; None if there is none.

    Raises:
        UsageError: it is not there, is the image itself, or its format is not said.
    """
    backing = members.get("backing_file")
    if backing is None:
        if "backing_fmt" in members:
            raise UsageError("-F is the format of a backing file: name one with -b")
        return None
    if format != "qcow2":
        raise UsageError(f"{format} images cannot have a backing file: add -f qcow2")
    if members.get("backing_fmt") not in FORMATS:
        raise UsageError("-b needs the backing file's format: add -F qcow2 or -F raw")
    path = os.path.join(os.path.dirname(file), backing)
    try:
        found = os.stat(path)
    except OSError as error:
        where = "" if os.path.isabs(backing) else " (names of backing files count from the folder of the new image)"
        raise UsageError(f"-b: Could not open '{path}': {error.strerror}{where}") from error
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        raise UsageError(f"-b: '{path}' is neither a file nor a block device")
    if os.path.exists(file) and os.path.samefile(path, file):
        raise UsageError(f"-b: '{backing}' is the new image itself")
    return path
