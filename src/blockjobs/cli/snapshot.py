"""`blockjobs snapshot`: snapshots inside an image that nobody uses."""

import json
from typing import TYPE_CHECKING, Any

import msgspec

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.cli import render
from blockjobs.cli.image_opts import Image, given_image
from blockjobs.cli.running import run_on_images
from blockjobs.jobs import snapshot_group

if TYPE_CHECKING:
    from blockjobs.block.internal_snapshots import InternalSnapshot, InternalSnapshots
    from blockjobs.block.node import Node
    from blockjobs.cli.arguments import Existing
    from blockjobs.host import ImageHost


def snapshot(
    file: str, existing: "Existing", *, create: str | None, apply: str | None, delete: str | None, as_json: bool
) -> int:
    """Do one of the three, or list the snapshots; returns the exit code.

    Args:
        create: name of a new snapshot of the disk as it is.
        apply: name, or number, of the snapshot that the disk is to be again.
        delete: name of the snapshot to forget.

    Raises:
        BlockjobsError: it could not be done; nothing has changed.
    """
    image = given_image(file, existing.format, image_opts=existing.image_opts)
    if create is None and apply is None and delete is None:
        return _list(image, as_json=as_json)
    if image.format != "qcow2":
        raise UsageError(f"'{file}' is {image.format}, a format without snapshots")

    async def work(host: "ImageHost") -> int:
        node = await image.open(host, name="image", read_only=False, backing=None)
        snapshots = node.driver.internal_snapshots
        assert snapshots is not None
        try:
            async with host.access(node, write=True, resize=True), host.graph.drained(node):
                await _change(host, node, snapshots, create, apply, delete)
        except (BlockjobsError, OSError) as error:
            raise image.named(UsageError(str(error))) from error
        await host.close_nodes(node)
        return 0

    return run_on_images(work)


async def _change(
    host: "ImageHost",
    node: "Node",
    snapshots: "InternalSnapshots",
    create: str | None,
    apply: str | None,
    delete: str | None,
) -> None:
    if create is not None:
        try:
            await snapshots.create(create, date_ns=host.clock.wall_ns())
        except (BlockjobsError, OSError) as error:
            raise UsageError(f"Could not create snapshot '{create}': {error}") from error
    elif apply is not None:
        found = snapshot_group.find(node, apply) or snapshot_group.find(node, None, apply)
        try:
            if found is None:
                raise UsageError("snapshot not found")
            snapshot_group.check_may_apply(node)
            await snapshots.apply(found.id)
        except BlockjobsError as error:
            raise UsageError(f"Could not apply snapshot '{apply}': {error}") from error
    elif delete is not None:
        await snapshots.delete(_deleted(snapshots, delete).id)


def _deleted(snapshots: "InternalSnapshots", name: str) -> "InternalSnapshot":
    """The snapshot of that name; one that nobody is shown, if there is no other."""
    for each in sorted(snapshots.entries, key=lambda entry: not entry.is_shown):
        if each.name == name:
            return each
    raise UsageError(f"Could not delete snapshot '{name}': snapshot not found")


def _list(image: Image, *, as_json: bool) -> int:
    async def work(host: "ImageHost") -> int:
        try:
            described = await host.image_info(image.file(), format=image.format)
        except UsageError as error:
            raise image.named(error) from error
        members: list[dict[str, Any]] = msgspec.to_builtins(described.snapshots or [])
        if as_json:
            print(json.dumps(members, indent=4))
        elif members:
            print("\n".join(["Snapshot list:", *render.snapshot_lines(members)]))
        return 0

    return run_on_images(work)
