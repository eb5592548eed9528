"""`blockjobs measure`: how large an image would become. Numbers and words are those of `qemu-img measure`."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockjobs.base.errors import UsageError
from blockjobs.cli.image_options import data_file_as_node, parse_options
from blockjobs.cli.image_opts import given_image
from blockjobs.cli.images import image_roots
from blockjobs.cli.running import run_on_images

if TYPE_CHECKING:
    from blockjobs.host import ImageHost


def measure(
    file: str | None,
    *,
    size: int | None,
    format: str | None,
    target_format: str,
    options: Sequence[str],
    force_share: bool,
    snapshot: str | None,
    image_opts: bool,
    as_json: bool,
    roots: Sequence[str] | None,
) -> int:
    """Print how large an image of `target_format` would be; returns the exit code.

    Args:
        file: the image that would be copied there, or
        size: the length of an empty disk.
        snapshot: one inside the image that would be copied instead.
        image_opts: `file` is the options of a node.

    Raises:
        BlockjobsError: there can be no such image, or the source could not be read.
    """
    if (file is None) == (size is None):
        if file is None:
            raise UsageError("Either --size N or one filename must be specified.")
        raise UsageError("--size N cannot be used together with a filename.")
    if file is None and format is not None:
        raise UsageError("-f requires a filename argument: it is the format of the image to be copied")
    if file is None and (snapshot is not None or image_opts):
        raise UsageError("-l and --image-opts require a filename argument")
    image = None if file is None else given_image(file, format, image_opts=image_opts)
    members = data_file_as_node(parse_options(options, target_format))

    async def work(host: "ImageHost") -> int:
        source = None
        length = size or 0
        if image is not None:
            more = {"force-share": True} if force_share else {}
            source, length = await image.open_snapshot(host, snapshot, name="source", **more)
        found = await host.measure(target_format, length, source=source, **members)
        if as_json:
            shown = {"bitmaps": found.bitmaps, "required": found.required, "fully-allocated": found.fully_allocated}
            print(json.dumps({name: value for name, value in shown.items() if value is not None}, indent=4))
        else:
            print(f"required size: {found.required}\nfully allocated size: {found.fully_allocated}")
            if found.bitmaps is not None:
                print(f"bitmaps size: {found.bitmaps}")
        return 0

    return run_on_images(work, image_roots=image_roots(roots, *(() if image is None else image.folder_of)))
