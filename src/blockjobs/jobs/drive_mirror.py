"""`drive-mirror`: a mirror to a file that the command makes or finds; its node lives as long as somebody uses it."""

from dataclasses import replace

from blockjobs.base.errors import UsageError
from blockjobs.block.node import Node
from blockjobs.block.options import BlockdevOptions, driver_named
from blockjobs.jobs.backup_options import MirrorSyncMode
from blockjobs.jobs.block_job import JobHost
from blockjobs.jobs.mirror_options import DriveMirror
from blockjobs.jobs.mirror_pivot import Backing
from blockjobs.jobs.mirror_start import check_mirror, find_root, start_mirror
from blockjobs.jobs.new_image import NewImageMode, format_of, make_image, refuse_unknown, target_file
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.schema.command import convert


async def start_drive_mirror(host: JobHost, options: DriveMirror) -> JobHandle:
    """Make or find the target, open it without its backing file, and start the mirror.

    A new image's backing file is the source's own for `sync=top`, the source itself for `sync=none`, else none; the
    node of it is attached when the job ends.

    Raises:
        UsageError: with QEMU's text. A file that was made stays; nothing stays open.
    Waits: for drains, and for I/O on the target. Checkpoint: no.
    """
    source = find_root(host, options.device)
    is_new = options.mode is not NewImageMode.EXISTING
    sync = MirrorSyncMode.FULL if options.sync is MirrorSyncMode.TOP and source.backing is None else options.sync
    if options.replaces is not None and options.node_name is None:
        raise UsageError("a node-name must be provided when replacing a named node of the graph")
    format_name = options.format or format_of(source)
    if is_new:
        refuse_unknown(format_name)
        target_file(options.target, is_new=True)
        backing = {MirrorSyncMode.TOP: source.backing, MirrorSyncMode.NONE: source}.get(sync)
        await make_image(host.graph, options.target, format_name, source.length, backing)
    target = await _open(host, options, format_name)
    try:
        setup = check_mirror(host, options, source, target)
        setup = replace(
            setup,
            sync=sync,
            is_target_zero=is_new,
            backing=Backing.SOURCE if is_new else Backing.OWN,
        )
        return await start_mirror(host, setup, options, filter_name=None)
    except BaseException:
        await host.graph.close_unused(target)
        raise


async def _open(host: JobHost, options: DriveMirror, format_name: str) -> Node:
    driver = driver_named(format_name)
    if driver is None:
        raise UsageError(f"Unknown driver '{format_name}'")
    described: dict[str, object] = {"driver": format_name}
    described["file"] = target_file(options.target, is_new=False)
    if format_name != "raw":
        described["backing"] = None
    if options.unmap:
        described["discard"] = "unmap"
    if options.node_name is not None:
        described["node-name"] = options.node_name
    return await host.graph.open(convert(described, BlockdevOptions), monitor_owned=False)
