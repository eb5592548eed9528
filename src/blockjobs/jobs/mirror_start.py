"""Starting mirrors between nodes: the checks in QEMU's order, the filter, the map and the rights (spec/jobs.md §3)."""

from dataclasses import replace
from typing import Final

from blockjobs.base.errors import ParameterError, UsageError
from blockjobs.base.units import KiB, MiB
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.copier import CLUSTERS_MAX
from blockjobs.block.driver import FilterDriver, FormatDriver
from blockjobs.block.drivers.mirror_top import MirrorTop, MirrorTopOptions
from blockjobs.block.mirror_copy import ChangeMap, MirrorCopy
from blockjobs.block.node import Node
from blockjobs.jobs.backup_options import MirrorSyncMode
from blockjobs.jobs.block_job import JobHost, check_root
from blockjobs.jobs.mirror import MirrorJob, MirrorSetup, set_chunks
from blockjobs.jobs.mirror_options import BlockdevMirror, MirrorCommon
from blockjobs.jobs.mirror_pivot import Backing, find_replaced
from blockjobs.lifecycle.handle import JobHandle

GRANULARITY_MIN: Final = 512
GRANULARITY_MAX: Final = 64 * MiB
DEFAULT_MIN: Final = 4 * KiB
DEFAULT_MAX: Final = 64 * KiB


async def start_blockdev_mirror(host: JobHost, options: BlockdevMirror) -> JobHandle:
    """Start a mirror between two nodes that exist.

    Raises:
        UsageError: with QEMU's text; nothing has changed.
    Waits: for drains and for opening the filter. Checkpoint: no.
    """
    source = find_root(host, options.device)
    target = host.graph.find(options.target)
    setup = check_mirror(host, options, source, target)
    setup = replace(setup, is_target_zero=options.target_is_zero)
    return await start_mirror(host, setup, options, filter_name=options.filter_node_name)


def find_root(host: JobHost, name: str) -> Node:
    """The node to mirror, which no other node may use.

    Raises:
        UsageError: there is none, or it is used.
    """
    node = host.graph.find(name)
    check_root(node)
    return node


def check_mirror(host: JobHost, options: MirrorCommon, source: Node, target: Node) -> MirrorSetup:
    """All checks before a job exists.

    Raises:
        UsageError: with QEMU's text, in QEMU's order of checks.
    """
    granularity = options.granularity or 0
    if granularity and not GRANULARITY_MIN <= granularity <= GRANULARITY_MAX:
        raise ParameterError.expects("granularity", "a value in range [512B, 64MB]")
    if granularity & (granularity - 1):
        raise ParameterError.expects("granularity", "a power of 2")
    source.check_op("mirror-source")
    target.check_op("mirror-target")
    replaced = find_replaced(host.graph, source, options.replaces)
    if options.replaces is not None and replaced.length != source.length:
        raise UsageError("cannot replace image with a mirror image of different size")
    if options.sync in (MirrorSyncMode.INCREMENTAL, MirrorSyncMode.BITMAP):
        raise UsageError(f"Sync mode '{options.sync}' not supported")
    if options.buf_size < 0:
        raise UsageError("Invalid parameter 'buf-size'")
    return MirrorSetup(
        source=source,
        target=target,
        sync=options.sync,
        granularity=granularity or default_granularity(target),
        buffer_bytes=options.buf_size,
        replaces=options.replaces,
        copy_mode=options.copy_mode,
        on_source_error=options.on_source_error,
        on_target_error=options.on_target_error,
    )


def default_granularity(target: Node) -> int:
    """Bytes per bit of a mirror's map: the target's cluster, within limits."""
    return max(DEFAULT_MIN, min(DEFAULT_MAX, target.cluster_size or DEFAULT_MAX))


async def start_mirror(
    host: JobHost, setup: MirrorSetup, options: "MirrorCommon", *, filter_name: str | None
) -> JobHandle:
    """`launch` with what both commands have in common. Raises, Waits: as `launch`. Checkpoint: no."""
    return await launch(
        host,
        MirrorJob,
        setup,
        filter_name=filter_name,
        job_id=options.job_id,
        speed_bytes_per_s=options.speed,
        auto_finalize=options.auto_finalize,
        auto_dismiss=options.auto_dismiss,
    )


async def launch(
    host: JobHost,
    job_class: type[MirrorJob],
    setup: MirrorSetup,
    *,
    filter_name: str | None,
    job_id: str | None,
    speed_bytes_per_s: int,
    auto_finalize: bool,
    auto_dismiss: bool,
) -> JobHandle:
    """Put the filter in place, take the rights and start the job.

    Raises:
        UsageError: with QEMU's text; nothing has changed. If the job existed already, its events say so.
    Waits: for drains and for opening the filter. Checkpoint: no.
    """
    source, target = setup.source, setup.target
    _check_pair(source, target)
    filter_node = await _insert_filter(host, source, filter_name, commits=setup.base is not None)
    copy = _make_copy(host, setup)
    job = job_class(host, setup, filter_node, copy)
    try:
        handle = host.jobs.create(
            job.type_name,
            job,
            id=job_id or "",
            auto_finalize=auto_finalize,
            auto_dismiss=auto_dismiss,
            speed_bytes_per_s=speed_bytes_per_s,
        )
    except BaseException:
        await job.dismantle()
        raise
    try:
        await _take_rights(host, job, setup, handle, filter_node)
    except BaseException:
        handle.discard()
        await job.dismantle()
        raise
    handle.start()
    return handle


async def _take_rights(host: JobHost, job: MirrorJob, setup: MirrorSetup, handle: JobHandle, filter_node: Node) -> None:
    job.handle = handle
    needs, shares = Perm.WRITE, Perm.WRITE_UNCHANGED
    if setup.base is not None:
        shares |= Perm.CONSISTENT_READ | Perm.WRITE
        needs |= Perm.RESIZE if setup.target.length < setup.source.length else Perm(0)
    job.claim = await host.graph.claim(
        "an unnamed block device", setup.target, needs=needs, shares=shares, follows=False
    )
    fixed = ALL & ~Perm.RESIZE
    await job.hold(filter_node, handle, name="main node", needs=Perm.CONSISTENT_READ, shares=fixed)
    await job.hold(setup.source, handle, name="source", shares=fixed)
    await job.hold(setup.target, handle, name="target")
    for between in _between(setup):
        job.forbid(between)


def _between(setup: MirrorSetup) -> list[Node]:
    """The nodes of the chain between the source and the base of an active commit."""
    nodes: list[Node] = []
    node: Node | None = setup.source if setup.base is not None else None
    while node is not None and node is not setup.base:
        if node is not setup.source:
            nodes.append(node)
        driver = node.driver
        node = node.children[driver.filtered] if isinstance(driver, FilterDriver) else node.children.get("backing")
    return nodes


def _check_pair(source: Node, target: Node) -> None:
    if source is target or source.storage is target.storage:
        raise UsageError("Can't mirror node into itself")
    if isinstance(target.driver, FilterDriver) and _is_in_chain(source, target.storage):
        raise UsageError("Cannot mirror to a filter on top of a node in the source's backing chain")


def _is_in_chain(source: Node, node: Node) -> bool:
    below = source.backing
    while below is not None:
        if below.storage is node:
            return True
        below = below.backing
    return False


async def _insert_filter(host: JobHost, source: Node, name: str | None, *, commits: bool) -> Node:
    described = MirrorTopOptions(node_name=name, backing=source.name)
    async with host.graph.edit() as edit:
        node = await edit.insert(above=source, filter=described, implicit=name is None)
        assert isinstance(node.driver, MirrorTop)
        node.driver.guards, node.driver.commits = True, commits
        return node


def _make_copy(host: JobHost, setup: MirrorSetup) -> MirrorCopy:
    """The engine, with its map attached to the source."""
    source, granularity = setup.source, setup.granularity
    while source.length > CLUSTERS_MAX * granularity:
        granularity *= 2  # the map must stay within bounds
    changes = ChangeMap(map=DirtyBitmap(source.length, granularity))
    copy = MirrorCopy(
        source=source,
        target=setup.target,
        changes=changes,
        unit=max(granularity, _unit_of(setup.target)),
        offload=host.graph.offload,
        clock=host.graph.clock,
        base=setup.base,
    )
    set_chunks(copy, setup.buffer_bytes)
    source.attach_bitmap(changes)
    return copy


def _unit_of(target: Node) -> int:
    """Bytes that must be copied together: whole clusters where the target gets a backing node only in the end.

    Until then it could not fill up a cluster that is written to in part.
    """
    driver = target.storage.driver
    names_backing = isinstance(driver, FormatDriver) and any(
        child.name == "backing" for child in driver.implied_children()
    )
    return (target.cluster_size or 1) if names_backing and target.backing is None else 1


__all__ = ["Backing", "check_mirror", "find_root", "launch", "start_blockdev_mirror", "start_mirror"]
