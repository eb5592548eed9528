"""The arguments of `blockdev-mirror` and `drive-mirror` (spec/jobs.md §3)."""

from enum import StrEnum

from blockjobs.jobs.backup_options import MirrorSyncMode
from blockjobs.jobs.new_image import NewImageMode
from blockjobs.lifecycle.error_policy import OnError
from blockjobs.schema.types import Options, UInt32


class MirrorCopyMode(StrEnum):
    """When a mirror copies what a guest writes: later, or before the guest's write completes."""

    BACKGROUND = "background"
    WRITE_BLOCKING = "write-blocking"


class MirrorCommon(Options, frozen=True, kw_only=True):
    """Members of both commands.

    Attributes:
        job_id: default is the device's name, which a node does not have.
        device: the source, by device or node name.
        replaces: the node that the target takes the place of; the source if not given.
        speed: bytes per second, 0 for no limit.
        granularity: bytes per bit of the dirty map.
        buf_size: most bytes in flight through buffers; 0 for the default.
    """

    job_id: str | None = None
    device: str
    replaces: str | None = None
    sync: MirrorSyncMode
    speed: int = 0
    granularity: UInt32 | None = None
    buf_size: int = 0
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    copy_mode: MirrorCopyMode = MirrorCopyMode.BACKGROUND
    auto_finalize: bool = True
    auto_dismiss: bool = True


class BlockdevMirror(MirrorCommon, frozen=True, kw_only=True):
    """Arguments of `blockdev-mirror`.

    Attributes:
        target: the node to copy to, by device or node name.
        target_is_zero: promises that the target reads as zeroes everywhere (QEMU 10.1).
    """

    target: str
    filter_node_name: str | None = None
    target_is_zero: bool = False


class DriveMirror(MirrorCommon, frozen=True, kw_only=True):
    """Arguments of `drive-mirror`.

    Attributes:
        target: file name of the image to copy to.
        format: its format; the source's by default.
        node_name: what to call the target's node.
        mode: whether the file is made or used as it is.
        unmap: whether zeroes may deallocate on the target.
    """

    target: str
    format: str | None = None
    node_name: str | None = None
    mode: NewImageMode = NewImageMode.ABSOLUTE_PATHS
    unmap: bool = True
