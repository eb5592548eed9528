"""`drive-backup`: a backup to a file that the command makes or finds, and that is closed when the job ends."""

from blockjobs.base.errors import UsageError
from blockjobs.block.node import Node
from blockjobs.block.options import BlockdevOptions
from blockjobs.jobs.backup import prepare_backup
from blockjobs.jobs.backup_options import DriveBackup, MirrorSyncMode
from blockjobs.jobs.block_job import JobHost
from blockjobs.jobs.new_image import NewImageMode, format_of, make_image, refuse_unknown, target_file
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.spec import Group
from blockjobs.schema.command import convert


async def prepare_drive_backup(host: JobHost, options: DriveBackup, *, group: Group | None = None) -> JobHandle:
    """Make or find the target, open it, and go on as `prepare_backup`.

    The new image's backing file is the source's own for `sync=top`, the source itself for `sync=none`, else none. An
    existing image is opened with whatever backing file it names, but on the source for `sync=none`.

    Raises:
        UsageError: with QEMU's text. A file that was made stays; nothing stays open.
    Waits: as `prepare_backup`, and for I/O on the target. Checkpoint: no.
    """
    source = host.graph.find(options.device)
    format_name = options.format or format_of(source)
    refuse_unknown(format_name)
    file = target_file(options.target, is_new=options.mode is not NewImageMode.EXISTING)
    source.check_op("backup-source")
    backing = _backing_for(source, options.sync)
    if options.mode is not NewImageMode.EXISTING:
        await make_image(host.graph, options.target, format_name, source.length, backing)
    elif options.sync is not MirrorSyncMode.NONE:
        backing = None
    described: dict[str, object] = {
        "driver": format_name,
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "file": file,
    }
    if backing is not None and format_name != "raw":
        described["backing"] = backing.name
    target = await host.graph.open(convert(described, BlockdevOptions), monitor_owned=False)
    try:
        if backing is not None and "backing" not in target.children:
            raise UsageError(f"Driver '{format_name}' of node '{target.name}' does not support backing files")
        return await prepare_backup(host, options, source, target, group=group)
    except BaseException:
        await host.graph.close_unused(target)
        raise


def _backing_for(source: Node, sync: MirrorSyncMode) -> Node | None:
    if sync is MirrorSyncMode.NONE:
        return source
    return source.backing if sync is MirrorSyncMode.TOP else None
