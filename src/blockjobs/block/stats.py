"""What nodes have been asked to do so far, as `query-blockstats` shows it (spec/block-layer.md §5).

Requests that come through a node's doors are counted there (`tally`). Bytes that pass a node by on the short way, as
plain system calls planned by a node above, only move the highest offset: that is what tells whoever grows volumes on
demand how far a format has got.
"""

from typing import Annotated, Final

from blockjobs.block.driver import FilterDriver
from blockjobs.block.drivers.file import File
from blockjobs.block.node import Node
from blockjobs.schema.types import Record, qapi

_OWN_CHILD: Final = "file"


def _as_written(name: str) -> str:
    return name


class BlockDeviceTimedStats(Record, kw_only=True, frozen=True, rename=_as_written):
    """Averages over an interval; only devices of virtual machines keep them."""

    interval_length: int
    min_rd_latency_ns: int
    max_rd_latency_ns: int
    avg_rd_latency_ns: int
    min_wr_latency_ns: int
    max_wr_latency_ns: int
    avg_wr_latency_ns: int
    min_flush_latency_ns: int
    max_flush_latency_ns: int
    avg_flush_latency_ns: int
    avg_rd_queue_depth: float
    avg_wr_queue_depth: float


class BlockDeviceStats(Record, kw_only=True, frozen=True, rename=_as_written):
    """Counts since the node was opened. Times are sums in nanoseconds; zeroing counts as writing."""

    rd_bytes: int
    wr_bytes: int
    unmap_bytes: int
    rd_operations: int
    wr_operations: int
    flush_operations: int
    unmap_operations: int
    rd_total_time_ns: int
    wr_total_time_ns: int
    flush_total_time_ns: int
    unmap_total_time_ns: int
    wr_highest_offset: int
    rd_merged: int
    wr_merged: int
    unmap_merged: int
    failed_rd_operations: int
    failed_wr_operations: int
    failed_flush_operations: int
    failed_unmap_operations: int
    invalid_rd_operations: int
    invalid_wr_operations: int
    invalid_flush_operations: int
    invalid_unmap_operations: int
    account_invalid: bool
    account_failed: bool
    timed_stats: list[BlockDeviceTimedStats]


class BlockStatsSpecificFile(Record, kw_only=True, frozen=True, tag_field="driver", tag="file"):
    """What only host files count."""

    discard_nb_ok: int
    discard_nb_failed: int
    discard_bytes_ok: int


class BlockStatsSpecificHostDevice(Record, kw_only=True, frozen=True, tag_field="driver", tag="host_device"):
    """What only host devices count."""

    discard_nb_ok: int
    discard_nb_failed: int
    discard_bytes_ok: int


class BlockStats(Record, kw_only=True, frozen=True):
    """The counts of a node and, inside them, of the node that it stores its bytes in."""

    node_name: str | None = None
    stats: BlockDeviceStats
    driver_specific: (
        Annotated[BlockStatsSpecificFile | BlockStatsSpecificHostDevice, qapi("BlockStatsSpecific")] | None
    ) = None
    parent: "BlockStats | None" = None


def block_stats(node: Node) -> BlockStats:
    """The counts of a node, and of the chain of nodes that it stores its bytes in."""
    below = node.children.get(node.driver.filtered if isinstance(node.driver, FilterDriver) else _OWN_CHILD)
    return BlockStats(
        node_name=node.name,
        stats=_device_stats(node),
        driver_specific=_specific(node),
        parent=None if below is None else block_stats(below),
    )


def _device_stats(node: Node) -> BlockDeviceStats:
    tally = node.tally
    read, write, zero, discard, flush = (tally.of(kind) for kind in ("read", "write", "zero", "discard", "flush"))
    return BlockDeviceStats(
        rd_bytes=read.size_bytes,
        wr_bytes=write.size_bytes + zero.size_bytes,
        unmap_bytes=discard.size_bytes,
        rd_operations=read.operations,
        wr_operations=write.operations + zero.operations,
        flush_operations=flush.operations,
        unmap_operations=discard.operations,
        rd_total_time_ns=read.time_ns,
        wr_total_time_ns=write.time_ns + zero.time_ns,
        flush_total_time_ns=flush.time_ns,
        unmap_total_time_ns=discard.time_ns,
        wr_highest_offset=tally.write_end,
        failed_rd_operations=read.failed,
        failed_wr_operations=write.failed + zero.failed,
        failed_flush_operations=flush.failed,
        failed_unmap_operations=discard.failed,
        rd_merged=0,
        wr_merged=0,
        unmap_merged=0,
        invalid_rd_operations=0,
        invalid_wr_operations=0,
        invalid_flush_operations=0,
        invalid_unmap_operations=0,
        account_invalid=False,
        account_failed=False,
        timed_stats=[],
    )


def _specific(node: Node) -> BlockStatsSpecificFile | BlockStatsSpecificHostDevice | None:
    driver = node.driver
    if not isinstance(driver, File):
        return None
    kind = BlockStatsSpecificFile if driver.is_regular else BlockStatsSpecificHostDevice
    return kind(
        discard_nb_ok=driver.discards_ok,
        discard_nb_failed=driver.discards_failed,
        discard_bytes_ok=driver.discarded_bytes,
    )
