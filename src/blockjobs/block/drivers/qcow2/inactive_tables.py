"""The L2 tables of snapshots by place, for whoever wants nothing written over them (`overlap-check=all`).

They are read from the file, from every snapshot's L1 table, when a writer begins and when a snapshot was deleted or
applied: what they say is the one thing that is known without the reference counts, against whose lies they are guarded.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Final

from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block.driver import Child
from blockjobs.block.drivers.qcow2.image import GUARDED_TABLES_MAX
from blockjobs.wire.qcow2_tables import OFFSET, decode_table

L1_BYTES_READ_MAX: Final = 128 * MiB
"""Of all snapshots together: 8000 of a terabyte with 64 KiB clusters. More than that is not looked at."""
_PIECE_BYTES: Final = 64 * KiB
"""Looked at in one go on the loop: a millisecond or two."""


async def l2_clusters(file: Child, l1_tables: Iterable[Span], cluster_size: int) -> set[int]:
    """Host clusters of the L2 tables that these L1 tables name, up to GUARDED_TABLES_MAX of them.

    Args:
        l1_tables: places in the file; what is past its end counts for nothing.
        cluster_size: bytes.

    Raises:
        IoFailure: an L1 table could not be read.
    Waits: reads. Checkpoint: no.
    """
    found: set[int] = set()
    seen: set[int] = set()  # snapshots share most of their tables
    left = L1_BYTES_READ_MAX
    for table in l1_tables:
        inside = Span(table.at, max(0, min(table.end, file.length) - table.at) // 8 * 8)
        for piece in inside.split(_PIECE_BYTES):
            left -= piece.length
            if left < 0 or len(found) >= GUARDED_TABLES_MAX or len(seen) > GUARDED_TABLES_MAX:
                return found
            new = set(decode_table(await file.read(piece.at, piece.length))) - seen
            seen |= new
            add_clusters(found, new, cluster_size)
    return found


def add_clusters(found: set[int], words: Iterable[int], cluster_size: int) -> None:
    """Add the clusters, of `cluster_size` bytes, that these L1 entries name, as long as there are not too many."""
    new = {(word & OFFSET) // cluster_size for word in words if word & OFFSET} - found
    found.update(islice(new, max(0, GUARDED_TABLES_MAX - len(found))))
