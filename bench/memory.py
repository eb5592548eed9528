"""The machine's memory before a run: nothing left to write out, and as much of it at hand as the run will fill.

A virtual machine gives memory that nobody uses back to its host, after a second on ours; to get it again costs three
times as much as copying into it, whoever copies, and ratios drown in that.
"""

import mmap
import os
from pathlib import Path

MARGIN = 256 << 20


def settle(source: Path) -> None:
    """Write out what is in the page cache, and have free what a copy of `source` fills, in use a moment ago."""
    os.sync()
    length = source.stat().st_blocks * 512 + MARGIN
    with mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        pass
