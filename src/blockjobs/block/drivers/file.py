"""The `file` driver: a regular file of this host; `host_device` is the same on a block device."""

import asyncio
import errno
import logging
import os
import stat
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Final, Self, TypeVar, TypeVarTuple

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.offload import Offload
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, NONE, Perm, Rights
from blockjobs.block.driver import Child, OpenContext, ProtocolDriver
from blockjobs.block.drivers.file_medium import CACHED_READ_BYTES_MAX, FileMedium
from blockjobs.block.drivers.locks import ImageLock, are_supported
from blockjobs.block.medium import Medium
from blockjobs.block.options import NodeOptions, driver, tag_of
from blockjobs.block.vocabulary import Kind, Segment, ZeroMode

if TYPE_CHECKING:
    from blockjobs.block.drivers.file_reopen import FileSwitch

log = logging.getLogger(__name__)

T = TypeVar("T")
Args = TypeVarTuple("Args")


SECTOR: Final = 512


class OnOffAuto(StrEnum):
    """A switch that may be left to the program."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class BlockdevAioOptions(StrEnum):
    """How QEMU submits requests; accepted for compatibility, requests always go to worker threads here."""

    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


class FileOptions(NodeOptions, frozen=True, kw_only=True, tag="file"):
    """A regular file of the host."""

    filename: str
    pr_manager: str | None = None
    locking: OnOffAuto | None = None
    aio: BlockdevAioOptions | None = None
    aio_max_batch: int | None = None
    drop_cache: bool | None = None


class HostDeviceOptions(NodeOptions, frozen=True, kw_only=True, tag="host_device"):
    """A block device of the host."""

    filename: str
    pr_manager: str | None = None
    locking: OnOffAuto | None = None
    aio: BlockdevAioOptions | None = None
    aio_max_batch: int | None = None
    drop_cache: bool | None = None


@driver(FileOptions)
class File(ProtocolDriver):
    """Reads and writes a medium in worker threads; holds the image locks of its rights.

    Attributes:
        name: of the file, as given.
        medium: where the bytes are; tests put a simulated disk here (`Graph.open_medium`).
        identity: (device, inode) of the file, None for a simulated disk.
        lock: the image locks, if any are wanted.
        rights: taken and shared by all users together.
        discards_ok, discards_failed, discarded_bytes: for query-blockstats.
    """

    is_regular = True
    reopenable: ClassVar[frozenset[str] | None] = frozenset({"drop-cache"})
    medium: Medium

    def __init__(self, medium: Medium, offload: Offload, *, name: str, lock: ImageLock | None = None) -> None:
        self.medium, self.children = medium, {}
        self.identity: tuple[int, int] | None = None
        self.discards_ok = self.discards_failed = self.discarded_bytes = 0
        self.name = name
        self.rights = Rights(NONE, ALL)
        self._offload, self.lock = offload, lock
        self._sync_lock = asyncio.Lock()
        self._flushes_wanted = self._flushes_done = 0

    @classmethod
    async def open(
        cls, options: FileOptions | HostDeviceOptions, children: dict[str, Child], context: OpenContext
    ) -> Self:
        """Open the file; nothing is locked until the node has users.

        Raises:
            UsageError: `Could not open '<f>': ...`, or it is no regular file; nothing is left open.
        Waits: nothing: opening never blocks, not even on a fifo.
        """
        del children
        name = options.filename
        if not name:
            raise UsageError(f"The '{tag_of(options)}' block driver requires a file name")
        if options.aio is BlockdevAioOptions.NATIVE and not context.direct:
            raise UsageError("aio=native was specified, but it requires cache.direct=on, which was not specified.")
        if options.pr_manager is not None:
            raise UsageError(f"No persistent reservation manager with id '{options.pr_manager}'")
        descriptor = _open(name, context, want_regular=cls.is_regular)
        try:
            lock = ImageLock(descriptor) if _wants_locks(options, context, descriptor) else None
        except UsageError:
            os.close(descriptor)
            raise
        direct = _open_direct(name, descriptor, context) if context.direct else None
        medium = FileMedium(descriptor, direct=direct, is_flushed=not context.no_flush, start=context.offload.start)
        opened = cls(medium, context.offload, name=name, lock=lock)
        status = os.fstat(descriptor)
        opened.identity = status.st_dev, status.st_ino
        return opened

    def recheck(self) -> None:
        """Make sure, once locks are held, that the name still leads to the file that was opened and locked.

        Raises:
            UsageError: somebody has put another file there meanwhile (`mv new.img disk.img`).
        """
        if self.identity is None:
            return
        try:
            status = os.stat(self.name)
        except OSError as error:
            raise _cannot_open(self.name, error) from error
        if (status.st_dev, status.st_ino) != self.identity:
            raise UsageError(f"Could not open '{self.name}': the file was replaced while it was being opened")

    @property
    def length(self) -> int:
        """Size of the file in whole sectors of 512 bytes, as QEMU shows it; what is missing reads as zeroes."""
        return -(-self.medium.size() // SECTOR) * SECTOR

    async def close(self) -> None:
        """See `Driver`; the locks go with the descriptor."""
        medium = self.medium
        if not (isinstance(medium, FileMedium) and medium.closes_at_once):
            await self._run("close", medium.close)
            return
        try:
            medium.close()
        except OSError as error:
            raise IoFailure.wrap(error, f"close of file '{self.name}'") from error

    async def close_medium(self, medium: Medium) -> None:
        """Free a medium that has been replaced; never raises. Waits: nothing that lasts. Checkpoint: no."""
        try:
            await self._run("close", medium.close)
        except IoFailure as error:
            log.warning("%s", error)

    async def prepare_reopen(self, options: FileOptions | HostDeviceOptions, context: OpenContext) -> "FileSwitch":
        """See `Driver`. Waits: a data sync. Checkpoint: no."""
        from blockjobs.block.drivers.file_reopen import FileSwitch

        medium = self.medium
        locks = isinstance(medium, FileMedium) and _wants_locks(options, context, medium.descriptor)
        switch = FileSwitch(self, context, locks=locks)
        await switch.prepare()
        return switch

    def permissions_changed(self, needs: Perm, shares: Perm) -> None:
        """See `Driver`: the locks follow."""
        if self.lock is not None:
            self.lock.change(needs, shares)
        self.rights = Rights(needs, shares)

    async def read_into(self, at: int, buffer: memoryview) -> None:
        """See `ProtocolDriver`."""
        medium = self.medium
        if len(buffer) <= CACHED_READ_BYTES_MAX and medium.read_cached(at, buffer):
            return
        await self._run("read", medium.read_into, at, buffer)

    @property
    def zeroes_fast(self) -> bool:
        """See `ProtocolDriver`: the file system has shown what it can."""
        return not isinstance(self.medium, FileMedium) or self.medium.zeroes_fast

    async def write(self, at: int, content: Buffer, *, fua: bool) -> None:
        """See `ProtocolDriver`."""
        medium = self.medium
        try:
            done = medium.write_cached(at, [content])
        except OSError as error:
            raise IoFailure.wrap(error, f"write of file '{self.name}'") from error
        if not done:
            await self._run("write", medium.write, at, content)
        if fua:
            await self.flush()

    async def zero(self, span: Span, mode: ZeroMode) -> None:
        """See `ProtocolDriver`."""
        await self._run("zero", _zero, self.medium, span, mode is ZeroMode.UNMAP)

    async def discard(self, span: Span) -> None:
        """See `ProtocolDriver`."""
        try:
            await self._run("discard", self.medium.discard, span.at, span.length)
        except IoFailure:
            self.discards_failed += 1
            raise
        self.discards_ok += 1
        self.discarded_bytes += span.length

    async def flush(self) -> None:
        """See `ProtocolDriver`. Callers that come while a sync is running share the next one (group commit)."""
        self._flushes_wanted += 1
        mine = self._flushes_wanted
        async with self._sync_lock:
            if self._flushes_done >= mine:
                return
            covered = self._flushes_wanted
            await self._run("flush", self.medium.sync)
            self._flushes_done = covered

    async def write_root(self, pieces: Sequence[tuple[int, Buffer]], length: int | None) -> None:
        """Set the length, write all pieces but the last ▷ the last ▷, in one hop; a flush for others too.

        Args:
            pieces: offsets and contents.
            length: None leaves it.

        Raises:
            IoFailure: what follows the call that failed was not done.
        """
        async with self._sync_lock:
            covered = self._flushes_wanted
            await self._run("write", _write_root, self.medium, pieces, length)
            self._flushes_done = covered

    async def status(self, span: Span) -> list[Segment]:
        """See `ProtocolDriver`."""
        runs = await self._run("status", self.medium.allocations, span.at, span.length)
        return [Segment(run.at, run.length, Kind.DATA if run.is_data else Kind.ZERO, "", run.at) for run in runs]

    async def resize(self, length: int) -> None:
        """See `ProtocolDriver`."""
        await self._run("resize", self.medium.truncate, length)

    def info(self) -> dict[str, object]:
        """See `Driver`."""
        return {"actual-size": self.medium.allocated_size(), "dirty-flag": False}

    async def _run(self, what: str, work: Callable[[*Args], T], *args: *Args) -> T:
        try:
            return await self._offload.run(work, *args)
        except OSError as error:
            raise IoFailure.wrap(error, f"{what} of file '{self.name}'") from error


@driver(HostDeviceOptions)
class HostDevice(File):
    """As `File`, for a block device: the length is fixed."""

    is_regular = False
    open_ended = False


def _zero(medium: Medium, span: Span, unmap: bool) -> None:
    medium.zero(span.at, span.length, unmap=unmap)


def _write_root(medium: Medium, pieces: Sequence[tuple[int, Buffer]], length: int | None) -> None:
    if length is not None:
        medium.truncate(length)
    for at, content in pieces[:-1]:
        medium.write(at, content)
    medium.sync()
    medium.write(*pieces[-1])
    medium.sync()


_MISFIT: Final = {
    True: "'file' driver requires '{}' to be a regular file",
    False: "'host_device' driver requires '{}' to be either a character or block device",
}


def _open(name: str, context: OpenContext, *, want_regular: bool) -> int:
    """Open without ever waiting, and make sure of the file's type before anything is read."""
    flags = (os.O_RDONLY if context.read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        if context.open_path is os.open:  # the user's own name; one from a header is not even looked at outside
            _demand_type(name, os.stat(name).st_mode, want_regular)
        descriptor = context.open_path(name, flags)
    except OSError as error:
        raise _cannot_open(name, error) from error
    try:
        _demand_type(name, os.fstat(descriptor).st_mode, want_regular)
    except UsageError:
        os.close(descriptor)
        raise
    return descriptor


def _demand_type(name: str, mode: int, want_regular: bool) -> None:
    if stat.S_ISDIR(mode):
        raise UsageError(f"Could not open '{name}': {os.strerror(errno.EISDIR)}")
    if not (stat.S_ISREG(mode) if want_regular else stat.S_ISBLK(mode)):
        raise UsageError(_MISFIT[want_regular].format(name))


def _wants_locks(options: FileOptions | HostDeviceOptions, context: OpenContext, descriptor: int) -> bool:
    """Whether image locks are to be held.

    Raises:
        UsageError: they are asked for, and the file system has none.
    """
    locking = options.locking or OnOffAuto.AUTO
    if context.force_share or locking is OnOffAuto.OFF:
        return False
    if are_supported(descriptor):
        return True
    if locking is OnOffAuto.ON:
        raise UsageError(f"'{options.filename}': the file system has no locks of the kind that locking=on asks for")
    return False


def _open_direct(name: str, descriptor: int, context: OpenContext) -> int:
    try:
        flags = os.O_RDONLY if context.read_only else os.O_RDWR
        return os.open(f"/proc/self/fd/{descriptor}", flags | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        os.close(descriptor)
        raise _cannot_open(name, error) from error


def _cannot_open(name: str, error: OSError) -> UsageError:
    return UsageError(f"Could not open '{name}': {error.strerror}")
