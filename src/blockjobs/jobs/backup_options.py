"""The arguments of `blockdev-backup` and `drive-backup` (spec/jobs.md §4)."""

from enum import StrEnum

from blockjobs.block.drivers.copy_before_write import OnCbwError
from blockjobs.jobs.new_image import NewImageMode
from blockjobs.lifecycle.error_policy import OnError
from blockjobs.schema.types import Options, Size


class MirrorSyncMode(StrEnum):
    """What a copy starts from."""

    TOP = "top"
    FULL = "full"
    NONE = "none"
    INCREMENTAL = "incremental"
    BITMAP = "bitmap"


class BitmapSyncMode(StrEnum):
    """What becomes of the bitmap when the job ends."""

    ON_SUCCESS = "on-success"
    NEVER = "never"
    ALWAYS = "always"


class CompressLevel(StrEnum):
    """How hard to compress; our own extension (`x-compress-level`)."""

    FAST = "fast"
    DEFAULT = "default"
    BEST = "best"


class BackupPerf(Options, frozen=True, kw_only=True):
    """Tuning (QAPI `BackupPerf`, unstable).

    Attributes:
        use_copy_range: accepted for compatibility; kernel copies are always used where they can be.
        max_workers: requests in flight at most.
        max_chunk: bytes per request at most; 0 means no limit of the user's.
        min_cluster_size: copy in units of at least so many bytes, a power of two (QEMU 9.2).
    """

    use_copy_range: bool = False
    max_workers: int = 64
    max_chunk: int = 0
    min_cluster_size: Size = 0


class BackupCommon(Options, frozen=True, kw_only=True):
    """Members of both commands.

    Attributes:
        job_id: default is the device's name, which a node does not have.
        device: the source, by device or node name.
        speed: bytes per second, 0 for no limit.
        discard_source: give back on the source what was copied (QEMU 9.1).
        on_cbw_error: who suffers when old content cannot be saved before a guest's write (QEMU 10.1).
        x_compress_level: ours: how hard to compress.
    """

    job_id: str | None = None
    device: str
    sync: MirrorSyncMode
    speed: int = 0
    bitmap: str | None = None
    bitmap_mode: BitmapSyncMode | None = None
    compress: bool = False
    discard_source: bool = False
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    auto_finalize: bool = True
    auto_dismiss: bool = True
    filter_node_name: str | None = None
    x_perf: BackupPerf | None = None
    x_compress_level: CompressLevel = CompressLevel.DEFAULT


class BlockdevBackup(BackupCommon, frozen=True, kw_only=True):
    """Arguments of `blockdev-backup`.

    Attributes:
        target: the node to copy to, by device or node name.
    """

    target: str


class DriveBackup(BackupCommon, frozen=True, kw_only=True):
    """Arguments of `drive-backup`.

    Attributes:
        target: file name of the image to copy to.
        format: its format; the source's by default.
        mode: whether the file is made or used as it is.
    """

    target: str
    format: str | None = None
    mode: NewImageMode = NewImageMode.ABSOLUTE_PATHS
