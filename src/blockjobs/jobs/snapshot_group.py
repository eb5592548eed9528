"""Snapshots of several images: made or deleted in all of them or in none, also after a crash (docs/adr/0015).

Every image is prepared first. Then the first image notes the decision, in one write, and the others follow. Whoever
opens one after a crash finishes what was decided, and takes back what was not (`block.group_doubt`).
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.block.internal_snapshots import GroupMark, InternalSnapshot, InternalSnapshots, Stage
from blockjobs.block.peer_images import image_name

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
    """The first snapshot of a node with that name, that id, or both, that users are shown."""
    for each in snapshots_of(node).entries:
        if each.is_shown and name in (None, each.name) and id in (None, each.id):
            return each
    return None


def check_may_apply(node: "Node") -> None:
    """Refuse to make a disk what it was while bitmaps tell how it has changed since: they would be wrong.

    Raises:
        UsageError: in QEMU's words.
    """
    if node.bitmaps:
        raise UsageError("Device has active dirty bitmaps")


def marks(nodes: Sequence["Node"], stage: Stage, group: str) -> list[GroupMark]:
    """What each image notes of a change of all of them; the first decides (docs/adr/0015)."""
    first, *others = [image_name(node) for node in nodes]
    mark = GroupMark(stage=stage, group=group, is_first=True, peers=tuple(others))
    return [mark, *(replace(mark, is_first=False, peers=(first,)) for _ in others)]


async def take(
    nodes: Sequence["Node"], name: str, *, group: str, date_ns: int, vm_clock_ns: int, vm_state_bytes: int
) -> None:
    """Make a snapshot of each node, or of none.

    Args:
        nodes: drained; the first has the vm state in its area.
        group: a name that no other group has.
        vm_state_bytes: length of the state.

    Raises:
        UsageError, IoFailure: none has it; what could not be deleted stays undecided.
    Waits: I/O. Checkpoint: no.
    """
    made: list[tuple[Node, str]] = []
    saving = marks(nodes, Stage.SAVING, group)
    try:
        for node, mark in zip(nodes, saving, strict=True):
            entry = await snapshots_of(node).create(
                cut(name),
                date_ns=date_ns,
                vm_clock_ns=vm_clock_ns,
                vm_state_bytes=0 if made else vm_state_bytes,
                mark=mark if len(nodes) > 1 else None,
            )
            made.append((node, entry.id))
        if len(nodes) > 1:
            await snapshots_of(nodes[0]).mark(made[0][1], saving[0].at(Stage.SAVED))
    except BaseException:
        await _forget_all(made)
        raise
    for (node, id), mark in zip(made[1:], saving[1:], strict=True):
        try:
            await snapshots_of(node).mark(id, mark.at(Stage.SAVED))
        except BlockjobsError as error:
            # It is decided: the next look at the image finishes it.
            log.warning("snapshot '%s' of node '%s' is there later: %s", name, node.name, error)


async def _forget_all(made: "list[tuple[Node, str]]") -> None:
    """Delete what was made in vain: the first image first, so that no decision can turn up any more."""
    try:
        for node, id in made:
            await snapshots_of(node).delete(id)
    except BlockjobsError as error:
        log.warning("an incomplete snapshot stays in the image of node '%s', unseen: %s", node.name, error)


async def delete(nodes: Sequence["Node"], name: str, *, group: str) -> None:
    """Delete the first snapshot of that name on each node that has one, on all or on none.

    Args:
        nodes: drained.
        group: a name that no other group has.

    Raises:
        UsageError, IoFailure: all have theirs; or it is decided, and what is still there goes with the next try.
    Waits: I/O. Checkpoint: no.
    """
    there = [(node, entry.id) for node in nodes if (entry := find(node, name)) is not None]
    if len(there) > 1:
        await _doom(there, group)
    failure: BlockjobsError | None = None
    # The first keeps the decision until all others have followed.
    for node, id in [*there[1:], *there[:1]]:
        try:
            if failure is None or node is not there[0][0]:
                await snapshots_of(node).delete(id)
        except BlockjobsError as error:
            failure = failure or error
    if failure is not None:
        raise failure


async def _doom(there: "list[tuple[Node, str]]", group: str) -> None:
    """Decide that all of them go."""
    doomed = marks([node for node, _ in there], Stage.DOOMED, group)
    try:
        for (node, id), mark in zip(there, doomed, strict=True):
            await snapshots_of(node).mark(id, mark)
        await snapshots_of(there[0][0]).mark(there[0][1], doomed[0].at(Stage.DELETED))
    except BaseException:
        try:
            for node, id in there:
                await snapshots_of(node).mark(id, None)
        except BlockjobsError as error:
            log.warning("a snapshot of node '%s' stays marked: %s", node.name, error)
        raise
