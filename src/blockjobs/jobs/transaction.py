"""`transaction`: actions that take effect together or not at all (spec/jobs.md §8, spec/lifecycle.md §6).

A single `blockdev-backup` or `drive-backup` is a transaction of one: that is why its job shows a paused/running pair
before the command is answered.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Final, TypeAlias

from blockjobs.base.errors import UsageError
from blockjobs.jobs.backup import prepare_blockdev_backup
from blockjobs.jobs.backup_options import BlockdevBackup, DriveBackup
from blockjobs.jobs.block_job import JobHost
from blockjobs.jobs.drive_backup import prepare_drive_backup
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.spec import Group
from blockjobs.schema.types import Options
from blockjobs.schema.union import OpenUnion


class ActionCompletionMode(StrEnum):
    """Whether the jobs of a transaction succeed or fail one by one or together."""

    INDIVIDUAL = "individual"
    GROUPED = "grouped"


class TransactionProperties(Options, frozen=True, kw_only=True):
    """Options of a transaction as a whole."""

    completion_mode: ActionCompletionMode = ActionCompletionMode.INDIVIDUAL


class Prepared(ABC):
    """An action that can no longer fail and has not taken effect yet.

    Attributes:
        job: what it starts, if it is a job.
    """

    job: JobHandle | None = None

    @abstractmethod
    async def commit(self) -> None:
        """Take effect; must not fail."""

    @abstractmethod
    async def abort(self) -> None:
        """Undo the preparation; must not fail."""

    def release(self) -> None:
        """All actions are committed and the drained section is about to end: let what was begun go on."""


class Action(Options, frozen=True, kw_only=True, tag_field="type"):
    """One action of a transaction; a new kind is a subclass added to `actions`.

    Attributes:
        can_group: whether `completion-mode=grouped` is allowed.
    """

    can_group: ClassVar[bool] = False

    async def prepare(self, host: JobHost, group: Group | None) -> Prepared:
        """Do all that can fail, inside the transaction's drained section.

        Raises:
            UsageError: the command's error; nothing is left of the attempt.
        """
        raise AssertionError(f"{type(self).__name__} does not prepare")


_HOMES: Final = {
    "abort": "blockjobs.jobs.transaction",
    "blockdev-backup": "blockjobs.jobs.transaction",
    "drive-backup": "blockjobs.jobs.transaction",
    "block-dirty-bitmap-add": "blockjobs.jobs.bitmap_actions",
    "block-dirty-bitmap-remove": "blockjobs.jobs.bitmap_actions",
    "block-dirty-bitmap-clear": "blockjobs.jobs.bitmap_actions",
    "block-dirty-bitmap-enable": "blockjobs.jobs.bitmap_actions",
    "block-dirty-bitmap-disable": "blockjobs.jobs.bitmap_actions",
    "block-dirty-bitmap-merge": "blockjobs.jobs.bitmap_actions",
    "blockdev-snapshot": "blockjobs.jobs.snapshot",
    "blockdev-snapshot-sync": "blockjobs.jobs.snapshot",
    "blockdev-snapshot-internal-sync": "blockjobs.jobs.internal_snapshot_sync",
}

actions: Final = OpenUnion("TransactionAction", base=Action, homes=_HOMES)

if TYPE_CHECKING:
    TransactionAction: TypeAlias = Action
else:
    TransactionAction = actions.type


@actions.add
class AbortAction(Action, frozen=True, kw_only=True, tag="abort"):
    """Fails, for tests of everybody's rollback."""

    can_group: ClassVar[bool] = True

    class Abort(Options, frozen=True, kw_only=True):
        """No arguments."""

    data: Abort

    async def prepare(self, host: JobHost, group: Group | None) -> Prepared:
        """See `Action`."""
        raise UsageError("Transaction aborted using Abort action")


class _PreparedBackup(Prepared):
    """A job that is held like everything else in the drained section in which it was made."""

    def __init__(self, handle: JobHandle) -> None:
        self.job = self._handle = handle
        handle.quiesce_begin()

    async def commit(self) -> None:
        self._handle.start()

    async def abort(self) -> None:
        await self._handle.cancel(force=True)

    def release(self) -> None:
        self._handle.quiesce_end()


@actions.add
class BlockdevBackupAction(Action, frozen=True, kw_only=True, tag="blockdev-backup"):
    """Starts a backup to a node."""

    can_group: ClassVar[bool] = True

    data: BlockdevBackup

    async def prepare(self, host: JobHost, group: Group | None) -> Prepared:
        """See `Action`."""
        return _PreparedBackup(await prepare_blockdev_backup(host, self.data, group=group))


@actions.add
class DriveBackupAction(Action, frozen=True, kw_only=True, tag="drive-backup"):
    """Starts a backup to a file."""

    can_group: ClassVar[bool] = True

    data: DriveBackup

    async def prepare(self, host: JobHost, group: Group | None) -> Prepared:
        """See `Action`."""
        return _PreparedBackup(await prepare_drive_backup(host, self.data, group=group))


async def run_transaction(
    host: JobHost, wanted: Sequence[Action], properties: TransactionProperties | None = None
) -> list[JobHandle]:
    """Drain everything, prepare the actions in order, then commit them all, or undo all in reverse order.

    Returns:
        The jobs that were started, in the order of their actions.

    Raises:
        UsageError: of the first action that failed; all is as before.
    Waits: for requests in flight on every node, and for what the actions do. Checkpoint: no.
    """
    mode = (properties or TransactionProperties()).completion_mode
    group = host.jobs.new_group() if mode is ActionCompletionMode.GROUPED else None
    prepared: list[Prepared] = []
    async with host.graph.drained(None):
        try:
            for action in wanted:
                if group is not None and not action.can_group:
                    raise UsageError(
                        f"Action '{action.__struct_config__.tag}' does not support Transaction property "
                        f"completion-mode = {mode}"
                    )
                prepared.append(await action.prepare(host, group))
        except BaseException:
            for done in reversed(prepared):
                await done.abort()
            raise
        for done in prepared:
            await done.commit()
        for done in prepared:
            done.release()
    return [done.job for done in prepared if done.job is not None]
