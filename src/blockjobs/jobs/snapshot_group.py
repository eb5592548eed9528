"""One snapshot of several images: all of them have it or none, also after a crash (docs/adr/0015).

The first image is the group's coordinator. Its snapshot is made first and settled first: that is the one write that
decides. Until then nobody is shown any of them; afterwards those in the other images are settled as well, at the latest
by the next job that looks at them.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.block.internal_snapshots import InternalSnapshot, InternalSnapshots

if TYPE_CHECKING:
    from blockjobs.block.node import Node

NAME_BYTES_MAX: Final = 255
"""Longer names are cut, as in QEMU."""

log = logging.getLogger(__name__)


def snapshots_of(node: "Node") -> InternalSnapshots:
    """Those of a node that can have some."""
    found = node.driver.internal_snapshots
    assert found is not None, node.name
    return found


def cut(name: str) -> str:
    """A name as it is stored."""
    return name.encode("utf-8", "surrogateescape")[:NAME_BYTES_MAX].decode("utf-8", "surrogateescape")


def find(node: "Node", name: str | None, id: str | None = None) -> InternalSnapshot | None:
    """The first snapshot of a node with that name, that id, or both, that exists for sure."""
    for each in snapshots_of(node).entries:
        if each.is_settled and name in (None, each.name) and id in (None, each.id):
            return each
    return None


def check_may_apply(node: "Node") -> None:
    """Refuse to make a disk what it was while bitmaps tell how it has changed since: they would be wrong.

    Raises:
        UsageError: in QEMU's words.
    """
    if node.bitmaps:
        raise UsageError("Device has active dirty bitmaps")


async def take(
    nodes: Sequence["Node"], name: str, *, group: bytes, date_ns: int, vm_clock_ns: int, vm_state_bytes: int
) -> None:
    """Make a snapshot of each node, or of none.

    Args:
        nodes: drained; the first has the vm state in its area.
        group: a name that no other group has.
        vm_state_bytes: length of the state.

    Raises:
        UsageError, IoFailure: none has it; what could not be deleted stays unsettled.
    Waits: I/O. Checkpoint: no.
    """
    made: list[tuple[Node, str]] = []
    try:
        for node in nodes:
            entry = await snapshots_of(node).create(
                cut(name),
                date_ns=date_ns,
                vm_clock_ns=vm_clock_ns,
                vm_state_bytes=0 if made else vm_state_bytes,
                group=group if len(nodes) > 1 else None,
            )
            made.append((node, entry.id))
        if len(nodes) > 1:
            await snapshots_of(nodes[0]).settle(made[0][1])
    except BaseException:
        for node, id in reversed(made):
            await _forget(node, id)
        raise
    for node, id in made[1:]:
        try:
            await snapshots_of(node).settle(id)
        except BlockjobsError as error:
            # It is decided: the next look at the image settles it.
            log.warning("snapshot '%s' of node '%s' is settled later: %s", name, node.name, error)


async def _forget(node: "Node", id: str) -> None:
    try:
        await snapshots_of(node).delete(id)
    except BlockjobsError as error:
        log.warning("an incomplete snapshot stays in the image of node '%s', unseen: %s", node.name, error)


async def recover(nodes: Sequence["Node"]) -> None:
    """Settle or delete what a crash has left unsettled on `nodes`, as far as they know what was decided.

    An unsettled snapshot is settled if a settled one of its group is on another of the nodes, and deleted with its
    group's coordinator, which is the first that was made, if that is here and unsettled too.

    Raises:
        UsageError, IoFailure: an image could not be changed; another try may succeed.
    Waits: I/O. Checkpoint: no.
    """
    settled = {each.group for node in nodes for each in snapshots_of(node).entries if each.is_settled and each.group}
    for node in reversed(nodes):
        for each in list(snapshots_of(node).entries):
            if each.is_settled or each.group is None:
                continue
            if each.group in settled:
                await snapshots_of(node).settle(each.id)
            elif _coordinator_is_among(nodes, each.group):
                await snapshots_of(node).delete(each.id)


def _coordinator_is_among(nodes: Sequence["Node"], group: bytes) -> bool:
    """Whether the first image of an unsettled group is one of `nodes`: it alone has the machine's state."""
    return any(each.group == group and each.vm_state_bytes for node in nodes for each in snapshots_of(node).entries)
