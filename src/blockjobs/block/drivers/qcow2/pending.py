"""Space on its way to being free: nothing is reused, punched or counted down before the file has durably let go of it.

QEMU 7.2 hands out a freed cluster while the L2 table in the file still points at it; after a crash two places share it
(spec/durability.md §1, I3). Here every freed cluster waits for the commit that makes its release durable.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Freed(NamedTuple):
    """`length` clusters from `cluster` on, each to lose one reference.

    Attributes:
        discards: hand the space back to the file system too, if this was the last reference.
        is_table: an L2 table was here; forget it then.
    """

    cluster: int
    length: int
    discards: bool = False
    is_table: bool = False


def joined(frees: Iterable[Freed]) -> list[Freed]:
    """The same in the order of the file, neighbours together: what a guest sees scattered mostly lies in a row there.

    References to the same clusters stay apart.
    """
    runs: list[Freed] = []
    for freed in sorted(frees):
        last = runs[-1] if runs else None
        if last is not None and last.cluster + last.length == freed.cluster and last[2:] == freed[2:]:
            runs[-1] = last._replace(length=last.length + freed.length)
        else:
            runs.append(freed)
    return runs


class PendingFrees:
    """References that are gone in memory and not yet in the file."""

    def __init__(self) -> None:
        self._freed: list[Freed] = []

    def __len__(self) -> int:
        return len(self._freed)

    def __bool__(self) -> bool:
        return bool(self._freed)

    def add(self, cluster: int, length: int, *, discards: bool = False, is_table: bool = False) -> None:
        """A reference to each of these clusters is gone in memory."""
        if self._freed:
            last = self._freed[-1]
            if last[0] + last[1] == cluster and last[2:] == (discards, is_table):
                self._freed[-1] = Freed(last.cluster, last.length + length, discards, is_table)
                return
        self._freed.append(Freed(cluster, length, discards, is_table))

    def take(self) -> list[Freed]:
        """All of them: a commit that makes them durable begins."""
        taken, self._freed = self._freed, []
        return taken

    def put_back(self, freed: list[Freed]) -> None:
        """That commit failed."""
        self._freed[:0] = freed
