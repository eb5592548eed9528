"""How a load of several disks can be taken back, by the job itself or by whoever opens the images after a crash."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final

from blockjobs.base.errors import BlockjobsError
from blockjobs.block.internal_snapshots import InternalSnapshot, InternalSnapshots, Stage
from blockjobs.jobs.snapshot_group import marks, snapshots_of

if TYPE_CHECKING:
    from blockjobs.block.node import Node

UNDO_NAME: Final = "blockjobs: before a load"
"""Name of the snapshots that a load can be undone by; nobody is shown them."""

log = logging.getLogger(__name__)


class UndoableLoad:
    """The disks as they are before a load, kept in one more snapshot of each.

    All methods want drained nodes, and wait for I/O. Those after `prepare` and `decide` never raise.

    Args:
        nodes: the disks; the first decides (docs/adr/0015), and takes the machine's state.
        group: a name that no other change has.
    """

    def __init__(self, nodes: Sequence["Node"], group: str) -> None:
        self._nodes, self._marks = nodes, marks(nodes, Stage.UNDO, group)
        self._kept: list[tuple[Node, InternalSnapshot]] = []

    async def prepare(self, *, date_ns: int, vm_state_bytes: int) -> None:
        """Keep the disks, and the first bytes of the first one's vm state area. From here on a crash undoes.

        Raises:
            UsageError, IoFailure: some are kept; `apply` and `take_back` must follow.
        """
        for node, mark in zip(self._nodes, self._marks, strict=True):
            await node.flush()
            length = 0 if self._kept else vm_state_bytes
            kept = await snapshots_of(node).create(UNDO_NAME, date_ns=date_ns, vm_state_bytes=length, mark=mark)
            self._kept.append((node, kept))

    @property
    def machine_state(self) -> "tuple[Node, InternalSnapshot] | None":
        """What the machine was before the load, if that was kept."""
        return self._kept[0] if self._kept else None

    async def decide(self) -> None:
        """The load has come about: from here on a crash does not undo it.

        Raises:
            UsageError, IoFailure: it has not; `apply` and `take_back` must follow.
        """
        node, kept = self._kept[0]
        await snapshots_of(node).mark(kept.id, self._marks[0].at(Stage.LOADED))

    async def forget(self) -> None:
        """Give the space back that the undoing would have needed, after `decide`; the first disk's last."""
        try:
            for node, kept in [*self._kept[1:], *self._kept[:1]]:
                await snapshots_of(node).delete(kept.id)
        except BlockjobsError as error:
            log.warning("node '%s' keeps what it was before the load, unseen: %s", node.name, error)

    async def apply(self) -> None:
        """Make the disks what they were. One that cannot be does not take any more writes until it is opened anew.

        If that is the first, nobody knows what its file says, and all are left for the next open to decide.
        """
        await self._everywhere(lambda snapshots, id: snapshots.apply(id))

    async def take_back(self) -> None:
        """After `apply`: nothing is in doubt any more, with the first disk before the others."""
        await self._everywhere(lambda snapshots, id: snapshots.delete(id))

    async def _everywhere(self, do: Callable[[InternalSnapshots, str], Awaitable[None]]) -> None:
        for place, (node, kept) in enumerate(list(self._kept)):
            try:
                await do(snapshots_of(node), kept.id)
            except BlockjobsError as error:
                # What the disk is now must not be written over before the next open has decided.
                given_up = self._kept[place:] if place == 0 else [(node, kept)]
                for other, _ in given_up:
                    snapshots_of(other).refuse_changes()
                    log.error("node '%s' must be opened anew to be what it was: %s", other.name, error)
                self._kept = [each for each in self._kept if each not in given_up]
                if place == 0:
                    return
