"""Who may do what with a node: rights that users take and share, and the solver over them (spec/block-layer.md §3)."""

from enum import IntFlag
from typing import Final


class Perm(IntFlag):
    """The four rights on an edge of the graph; bit numbers are those of QEMU's file locks (spec/block-layer.md §4)."""

    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8


ALL: Final = Perm.CONSISTENT_READ | Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE
NONE: Final = Perm(0)
