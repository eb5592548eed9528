"""What a backup does with a dirty bitmap: which one it takes, and what it leaves in it (spec/jobs.md §4)."""

from msgspec import Struct

from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import NodeBitmap, find_bitmap
from blockjobs.jobs.backup_options import BackupCommon, BitmapSyncMode, MirrorSyncMode


class BackupBitmap(Struct, frozen=True):
    """A bitmap of the source that is frozen while a backup runs; its successor records what guests change meanwhile.

    Attributes:
        selects: only what it held at the start is copied (`sync=bitmap`).
    """

    bitmap: NodeBitmap
    mode: BitmapSyncMode
    selects: bool

    def check_writable(self) -> None:
        """Refuse a bitmap that could not be changed at the end.

        Raises:
            UsageError: it is read-only, in QEMU's words.
        """
        if self.mode is not BitmapSyncMode.NEVER:
            self.bitmap.check()

    def select(self, dirty: DirtyBitmap) -> None:
        """Leave in a copy's map only what is to be copied, in whole clusters of the copy."""
        if self.selects:
            dirty.clear(Span(0, dirty.length))
            dirty.merge_inside(self.bitmap.map)

    def keep(self) -> None:
        """Nothing was copied: the bitmap is what it was, with what changed meanwhile."""
        self.bitmap.reclaim()

    def succeed(self) -> None:
        """All that was to be copied is durable on the target."""
        if self.mode is BitmapSyncMode.NEVER:
            self.bitmap.reclaim()
        else:
            self.bitmap.abdicate()

    def fail(self, left: DirtyBitmap | None) -> None:
        """The job ended early. No bit is lost: what counts as dealt with is durable on the target.

        Args:
            left: what is not on the target; None if nobody knows.
        """
        if self.mode is not BitmapSyncMode.ALWAYS:
            self.bitmap.reclaim()
        elif left is not None:
            self.bitmap.abdicate()
            self.bitmap.map.merge_inside(left)
        else:
            self.bitmap.reclaim()
            if not self.selects:
                self.bitmap.map.set_all()


def find_backup_bitmap(options: BackupCommon, source: Node) -> BackupBitmap | None:
    """The bitmap that the arguments name, after the checks on `sync`, `bitmap` and `bitmap-mode`, in QEMU's order.

    Raises:
        UsageError: the combination makes no sense, or the bitmap is not on the source or cannot be used.
    """
    sync, mode = options.sync, options.bitmap_mode
    if sync in (MirrorSyncMode.INCREMENTAL, MirrorSyncMode.BITMAP):
        if options.bitmap is None:
            raise UsageError(f"must provide a valid bitmap name for '{sync}' sync mode")
        if sync is MirrorSyncMode.INCREMENTAL:
            if mode not in (None, BitmapSyncMode.ON_SUCCESS):
                raise UsageError(
                    f"Bitmap sync mode must be '{BitmapSyncMode.ON_SUCCESS}' when using sync mode '{sync}'"
                )
            mode, sync = BitmapSyncMode.ON_SUCCESS, MirrorSyncMode.BITMAP
    if options.bitmap is None:
        if mode is not None:
            raise UsageError("Cannot specify bitmap sync mode without a bitmap")
        return None
    bitmap = find_bitmap(source.bitmaps, options.bitmap)
    if bitmap is None:
        raise UsageError(f"Bitmap '{options.bitmap}' could not be found")
    if mode is None:
        raise UsageError("Bitmap sync mode must be given when providing a bitmap")
    bitmap.check(may_be_readonly=True)
    if sync is MirrorSyncMode.NONE:
        raise UsageError("sync mode 'none' does not produce meaningful bitmap outputs")
    if mode is BitmapSyncMode.NEVER and sync is not MirrorSyncMode.BITMAP:
        raise UsageError(f"Bitmap sync mode '{mode}' has no meaningful effect when combined with sync mode '{sync}'")
    return BackupBitmap(bitmap, mode, selects=sync is MirrorSyncMode.BITMAP)
