"""Reading an image's tables for a check: what lies past the end of the file is zeroes, and neighbours go together."""

import asyncio
from typing import Final

from blockjobs.base.errors import IoFailure, first_failure
from blockjobs.block.driver import Child
from blockjobs.wire.qcow2 import Header

READ_BYTES: Final = 1 << 20
"""So many tables are read at once, neighbours in one go, and counted in one worker hop."""


async def read_padded(file: Child, at: int, length: int) -> bytes:
    """Bytes of the file; what lies past its end is zeroes. Checkpoint: no. Waits: a read."""
    inside = max(0, min(length, file.length - at))
    found = await file.read(at, inside) if inside else b""
    return found if inside == length else found.ljust(length, b"\0")


async def read_clusters(file: Child, header: Header, places: list[int]) -> list[bytes]:
    """The clusters at `places`, in that order; neighbours are read in one go. Checkpoint: no. Waits: reads."""
    size = header.cluster_size
    runs: list[tuple[int, int]] = []
    for at in places:
        if runs and runs[-1][0] + runs[-1][1] == at:
            runs[-1] = runs[-1][0], runs[-1][1] + size
        else:
            runs.append((at, size))
    try:
        async with asyncio.TaskGroup() as tasks:
            reads = [tasks.create_task(read_padded(file, *run)) for run in runs]
    except* IoFailure as failures:
        raise first_failure(failures) from None
    return [raw[at : at + size] for raw in (read.result() for read in reads) for at in range(0, len(raw), size)]
