"""`drive-backup`: a backup to a file that the command makes or finds, and that is closed when the job ends."""

from blockjobs.base.errors import UsageError
from blockjobs.block.driver import FormatDriver
from blockjobs.block.node import Node
from blockjobs.block.options import BlockdevOptions, driver_named
from blockjobs.jobs.backup import prepare_backup
from blockjobs.jobs.backup_options import DriveBackup, MirrorSyncMode, NewImageMode
from blockjobs.jobs.block_job import JobHost
from blockjobs.jobs.create import create_image
from blockjobs.jobs.create_options import BlockdevCreateOptions
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.spec import Group
from blockjobs.schema.command import convert


async def prepare_drive_backup(host: JobHost, options: DriveBackup, *, group: Group | None = None) -> JobHandle:
    """Make or find the target, open it, and go on as `prepare_backup`.

    The new image's backing file is the source's own for `sync=top`, the source itself for `sync=none`, else none.

    Raises:
        UsageError: with QEMU's text. A file that was made stays; nothing stays open.
    Waits: as `prepare_backup`, and for I/O on the target. Checkpoint: no.
    """
    source = host.graph.find(options.device)
    format_name = options.format or _format_of(source)
    driver = driver_named(format_name)
    if driver is None:
        raise UsageError(f"Unknown file format '{format_name}'")
    if not issubclass(driver, FormatDriver):
        raise UsageError(f"Format driver '{format_name}' does not support image creation")
    protocol, colon, _ = options.target.partition(":")
    if colon and "/" not in protocol:
        raise UsageError(f"Unknown protocol '{protocol}'")  # hardly a file of that name
    source.check_op("backup-source")
    backing = _backing_for(source, options.sync)
    if options.mode is not NewImageMode.EXISTING:
        await _make(host, options.target, format_name, source.length, backing)
    described: dict[str, object] = {
        "driver": format_name,
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "file": {"driver": "file", "filename": options.target},
    }
    if backing is not None:
        described["backing"] = backing.name
    target = await host.graph.open(convert(described, BlockdevOptions), monitor_owned=False)
    try:
        return await prepare_backup(host, options, source, target, group=group)
    except BaseException:
        await host.graph.close_unused(target)
        raise


async def _make(host: JobHost, filename: str, format_name: str, size: int, backing: Node | None) -> None:
    """Make the target file, and the image in it if the format has metadata."""
    bare = format_name == "raw"
    if bare and backing is not None:
        raise UsageError(f"Backing file not supported for file format '{format_name}'")
    described: dict[str, object] = {"driver": "file", "filename": filename, "size": size if bare else 0}
    await create_image(host.graph, convert(described, BlockdevCreateOptions))
    if bare:
        return
    described = {"driver": format_name, "file": {"driver": "file", "filename": filename}, "size": size}
    if backing is not None:
        described |= {"backing-file": backing.filename, "backing-fmt": _format_of(backing)}
    await create_image(host.graph, convert(described, BlockdevCreateOptions))


def _backing_for(source: Node, sync: MirrorSyncMode) -> Node | None:
    if sync is MirrorSyncMode.NONE:
        return source
    return source.backing if sync is MirrorSyncMode.TOP else None


def _format_of(node: Node) -> str:
    """The format to give in headers; what has none is raw."""
    return node.storage.driver_name if isinstance(node.storage.driver, FormatDriver) else "raw"
