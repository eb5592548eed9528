"""What a crash has left in doubt, decided: a change of several images is in all of them or in none (docs/adr/0015).

Every image notes in one of its snapshots that it is prepared, and who is the first image of the change. The first one
notes the decision, before anything is done that cannot be taken back. So an image that is only prepared asks the first
one, which may be open already or be a file beside it: no decision there means that it never came.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeAlias

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.block.internal_snapshots import GroupMark, InternalSnapshot, InternalSnapshots, Stage
from blockjobs.block.open_context import OpenContext

Peer: TypeAlias = Callable[[str], Awaitable[Sequence[InternalSnapshot]]]
"""The snapshots in the image of that name; raises BlockjobsError if nobody can tell."""

_VERBS: Final = {Stage.SAVING: "save", Stage.UNDO: "load", Stage.DOOMED: "delete"}

log = logging.getLogger(__name__)


async def settle_opened(snapshots: InternalSnapshots, context: OpenContext) -> None:
    """Decide what is in doubt in an image that was just opened, and that nobody has read yet.

    An image that is read-only stays as it is, but shows the disk that a writer would find. One whose headers alone
    are looked at shows what they say.

    Raises:
        UsageError: the image is to be written, and the first image of its change cannot be asked.
        IoFailure, ImageCorrupt: it could not be read or written.
    Waits: I/O. Checkpoint: no.
    """
    if context.looks_only:
        return
    try:
        await _settle(snapshots, context.peer_snapshots, read_only=context.read_only)
    except UsageError as error:
        if not context.read_only:
            raise
        log.warning("node '%s': %s", context.node_name, error)


async def finish_decided(snapshots: InternalSnapshots, peer: Peer) -> None:
    """Finish what failing requests have left in an image whose disk has been in use since: what was decided only.

    Raises:
        UsageError, IoFailure: the image could not be changed; another try may succeed.
    Waits: I/O. Checkpoint: no.
    """
    for each in list(snapshots.entries):
        mark = each.mark
        if mark is None or (mark.stage.decision is not None and not await _is_known(mark, peer)):
            continue
        if mark.stage is not Stage.UNDO or await _is_decided(mark, peer):
            await _finish(snapshots, each, mark, peer)


async def _settle(snapshots: InternalSnapshots, peer: Peer, *, read_only: bool) -> None:
    for each in list(snapshots.entries):
        mark = each.mark
        if mark is None:
            continue
        if not read_only:
            await _finish(snapshots, each, mark, peer)
        elif mark.stage is Stage.UNDO and not await _is_decided(mark, peer):
            await snapshots.view(each.id)


async def _finish(snapshots: InternalSnapshots, entry: InternalSnapshot, mark: GroupMark, peer: Peer) -> None:
    """Do in one image what was decided, or undo what was not."""
    match mark.stage:
        case Stage.SAVED:
            return
        case Stage.LOADED | Stage.DELETED:
            if mark.is_first and not await _others_have_followed(mark, peer):
                return
            await snapshots.delete(entry.id)
        case Stage.SAVING if await _is_decided(mark, peer):
            await snapshots.mark(entry.id, mark.at(Stage.SAVED))
        case Stage.DOOMED if not await _is_decided(mark, peer):
            await snapshots.mark(entry.id, None)
        case Stage.UNDO if not await _is_decided(mark, peer):
            await snapshots.apply(entry.id)
            await snapshots.delete(entry.id)
        case _:
            await snapshots.delete(entry.id)


async def _is_decided(mark: GroupMark, peer: Peer) -> bool:
    """Whether what is prepared here is to be.

    Raises:
        UsageError: the first image cannot be asked.
    """
    if mark.is_first:
        return False
    if not mark.peers:
        raise UsageError("The image is in the middle of a change of several images, and does not know of which")
    name = mark.peers[0]
    try:
        known = await peer(name)
    except BlockjobsError as error:
        raise UsageError(
            f"The image is in the middle of a snapshot-{_VERBS[mark.stage]} of several images, and only '{name}' knows "
            f"whether it came about: open that one first ({error})"
        ) from error
    decision = mark.stage.decision
    return any(each.mark is not None and (each.mark.group, each.mark.stage) == (mark.group, decision) for each in known)


async def _is_known(mark: GroupMark, peer: Peer) -> bool:
    try:
        await _is_decided(mark, peer)
    except UsageError:
        return False
    return True


async def _others_have_followed(mark: GroupMark, peer: Peer) -> bool:
    """Whether nobody needs the decision of this first image any more."""
    try:
        for name in mark.peers:
            found = [each.mark for each in await peer(name) if each.mark is not None]
            if any(each.group == mark.group and each.stage.decision is mark.stage for each in found):
                return False
    except BlockjobsError:
        return False
    return True
