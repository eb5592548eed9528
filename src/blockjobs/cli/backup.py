"""`blockjobs backup`: copy an image as a job under QEMU's life cycle, in this process."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.block.nbd_uri import is_export
from blockjobs.cli.arguments import AN_EXISTING, Copying, Existing
from blockjobs.cli.following import Faults, as_dict, follow
from blockjobs.cli.formats import format_for_new, format_of
from blockjobs.cli.image_options import parse_options
from blockjobs.cli.image_opts import given_image
from blockjobs.cli.into_export import IntoExport
from blockjobs.cli.new_copy import NewCopy
from blockjobs.cli.progress import View, choose_view
from blockjobs.monitor.client import QmpError

if TYPE_CHECKING:
    from blockjobs.block.node import Node
    from blockjobs.host import Host


def back_up(
    *,
    source: str,
    target: str,
    copying: Copying,
    existing: Existing,
    target_format: str | None,
    options: Sequence[str] | None,
    as_json: bool,
    quiet: bool,
    replace: bool,
    keep_partial: bool,
    roots: Sequence[str] | None,
) -> int:
    """Carry out what the command line says; returns the exit code. The parameters are as they were typed.

    Raises:
        BlockjobsError: it failed; nothing new is left behind, except on request.
        OSError: likewise.
    """
    known_target = format_for_new(target, target_format)
    _demand_sense(copying, target, known_target)
    if copying.connect is not None and is_export(target):
        raise UsageError(f"--connect: a server makes image files, and '{target}' is an export")
    if copying.connect is not None:
        if options or keep_partial or roots or existing != AN_EXISTING:
            raise UsageError("-f, -o, --image-opts, --keep-partial and --image-root are for images no server has open")
        from blockjobs.cli.backup_there import back_up_there

        return back_up_there(source, target, known_target, copying, replace=replace, as_json=as_json, quiet=quiet)
    members = parse_options(options or (), known_target) | members_for(copying, target)
    image = given_image(source, existing.format, image_opts=existing.image_opts)
    changes_source = copying.bitmap is not None or copying.incremental is not None
    copy: NewCopy | IntoExport
    if is_export(target):
        _check_export(target, copying, members)
        copy = IntoExport(
            source=image,
            target=target,
            target_format=known_target,
            changes_source=changes_source,
            roots=roots,
        )
    else:
        copy = NewCopy(
            source=image,
            target=target,
            target_format=known_target,
            options=members,
            sync=copying.sync,
            changes_source=changes_source,
            roots=roots,
            replace=replace,
            keep_partial=keep_partial,
        )
    view = choose_view("backup", as_json=as_json, quiet=quiet)
    return copy.make(lambda host: _copy(host, copy, copying, view, as_json=as_json), as_json=as_json)


def _demand_sense(copying: Copying, target: str, target_format: str) -> None:
    """Refuse what contradicts itself, before anything is opened.

    Raises:
        UsageError: naming the options.
    """
    needs_qcow2 = {
        "--compress": copying.compress is not None,
        "--sync top": copying.sync == "top",
        "--incremental": copying.incremental is not None,
    }
    for option, is_given in needs_qcow2.items():
        if is_given and target_format != "qcow2":
            raise UsageError(f"{option} needs a qcow2 target, and '{target}' is to be {target_format}: add -O qcow2")
    if copying.incremental is not None:
        if copying.bitmap is not None or copying.sync != "full":
            raise UsageError("--incremental goes without --bitmap and --sync")
        if copying.base is None:
            raise UsageError(
                "--incremental copies only what has changed: name the backup that it builds on with --base"
            )
    elif copying.base is not None:
        raise UsageError("--base goes with --incremental")


def members_for(copying: Copying, target: str) -> dict[str, str]:
    """Creation options of the target that follow from how it is to be filled.

    Raises:
        UsageError: the base of an incremental backup is not there.
    """
    members: dict[str, str] = {}
    if copying.compress:
        members["compression_type"] = copying.compress
    if copying.base is not None:
        members["backing_fmt"] = format_of(copying.base, None)
        folder = os.path.dirname(os.path.realpath(target))
        path = os.path.realpath(copying.base)
        members["backing_file"] = os.path.basename(path) if os.path.dirname(path) == folder else path
    return members


def _check_export(target: str, copying: Copying, options: dict[str, Any]) -> None:
    if options:
        raise UsageError(f"'{target}' is there already, so it takes no options (-o, --compress, --base)")
    if copying.sync == "top":
        raise UsageError(f"--sync top makes an overlay, and '{target}' is there already")


async def _copy(host: "Host", copy: NewCopy | IntoExport, copying: Copying, view: View, *, as_json: bool) -> int:
    async with copy.opened(host) as (source, target):
        faults = Faults(copy.source.given, copy.place)
        with view, host.bus.listening(faults.note):
            try:
                await _prepare_bitmap(host, source, copying)
                job = await host.backup(source, target, id="backup", **_arguments(copying))
            except (UsageError, QmpError) as error:
                raise copy.source.named(error) from error
            outcome = await follow(job, view, faults)
            if outcome.error is None or as_json:
                view.done(as_dict(outcome))
        if outcome.error is not None:
            raise BlockjobsError(f"backup of '{copy.source.given}' failed: '{faults.where}': {outcome.error}")
    return 0


async def _prepare_bitmap(host: "Host", source: "Node", copying: Copying) -> None:
    """Have the bitmap that the backup works with.

    Raises:
        UsageError: an incremental backup has none, or one that cannot be trusted.
    """
    names = [bitmap.name for bitmap in source.bitmaps]
    if copying.incremental is not None and copying.incremental not in names:
        wanted = copying.incremental
        raise UsageError(f"there is no bitmap '{wanted}' yet: a full backup with --bitmap {wanted} makes it")
    if copying.bitmap is not None and copying.bitmap not in names:
        from blockjobs.monitor.local import LocalClient

        async with LocalClient(host) as client:
            await client.execute("block-dirty-bitmap-add", node=source.name, name=copying.bitmap, persistent=True)


def _arguments(copying: Copying) -> dict[str, Any]:
    bitmap = copying.incremental or copying.bitmap
    mode: dict[str, str] = {"bitmap": bitmap, "bitmap_mode": "on-success"} if bitmap is not None else {}
    return {
        **mode,
        "sync": "incremental" if copying.incremental is not None else copying.sync,
        "compress": copying.compress is not None,
        "level": copying.level,
        "speed_bytes_per_s": copying.speed,
        "on_source_error": copying.on_source_error,
        "on_target_error": copying.on_target_error,
    }
