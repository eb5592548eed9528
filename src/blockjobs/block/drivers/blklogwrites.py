"""The blklogwrites filter: every change is also noted in a log, which can be replayed up to any moment.

The log has the format of the kernel's dm-log-writes. A write stands in it once it has completed, and a flush at the
place where it was issued: so replaying up to a flush gives what was durable then, and nothing that was not.
"""

from dataclasses import dataclass

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.block.claims import Perm, Rights
from blockjobs.block.driver import Child, FilterDriver, Forward, OpenContext
from blockjobs.block.drivers.write_log import WriteLog, read_end
from blockjobs.block.options import BlockRef, NodeOptions, driver
from blockjobs.block.vocabulary import NO_PERMS, Limits, Watch, ZeroMode
from blockjobs.schema.types import UInt32, UInt64
from blockjobs.wire.write_log import Entry, EntryFlag, is_sector_size


class BlklogwritesOptions(NodeOptions, frozen=True, kw_only=True, tag="blklogwrites"):
    """Notes what is written to `file` in `log`.

    Attributes:
        log_sector_size: unit of the log and of requests, a power of two.
        log_append: go on with a log that is there.
        log_super_update_interval: entries after which the superblock of the log is written, if no flush came before.
    """

    file: BlockRef
    log: BlockRef
    log_sector_size: UInt32 | None = None
    log_append: bool | None = None
    log_super_update_interval: UInt64 | None = None


@driver(BlklogwritesOptions)
@dataclass(eq=False, kw_only=True)
class Blklogwrites(FilterDriver):
    """Passes changes on and then logs them. Requests are in whole sectors of the log."""

    children: dict[str, Child]
    log: WriteLog
    read_only: bool
    limits: Limits
    watches: Watch = Watch.CHANGES | Watch.FLUSH

    @classmethod
    async def open(
        cls, options: BlklogwritesOptions, children: dict[str, Child], context: OpenContext
    ) -> "Blklogwrites":
        """Find the end of the log that is to be continued; a new one is begun by the first change.

        Raises:
            UsageError: sizes that make no sense, or no log to continue.
            IoFailure: the log cannot be read.
        """
        interval = 4096 if options.log_super_update_interval is None else options.log_super_update_interval
        sector = 512 if options.log_sector_size is None else options.log_sector_size
        entries = end = 0
        if options.log_append and options.log_sector_size is not None:
            raise UsageError("log-append and log-sector-size are mutually exclusive")
        if options.log_append and children["log"].length:
            sector, entries, end = await read_end(children["log"])
        elif not is_sector_size(sector):
            raise UsageError(f"Invalid log sector size {sector}")
        if not interval:
            raise UsageError(f"Invalid log superblock update interval {interval}")
        return cls(
            children=children,
            log=WriteLog(
                lambda: children["log"], sector_bytes=sector, super_interval=interval, entries=entries, end=end
            ),
            read_only=context.read_only,
            limits=Limits(request_align=sector),
        )

    @classmethod
    def opening_rights(cls, edge: str, options: BlklogwritesOptions, *, read_only: bool) -> Rights:
        """See `Driver`: nobody else changes the log."""
        del options
        return cls._log_rights(read_only=read_only) if edge == "log" else Rights(*NO_PERMS)

    @staticmethod
    def _log_rights(*, read_only: bool) -> Rights:
        changes = Perm(0) if read_only else Perm.WRITE | Perm.RESIZE
        return Rights(Perm.CONSISTENT_READ | changes, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED)

    def child_perms(self, child: str, needs: Perm, shares: Perm) -> tuple[Perm, Perm]:
        """See `Driver`."""
        return self._log_rights(read_only=self.read_only) if child == "log" else (needs, shares)

    async def close(self) -> None:
        """See `Driver`: the log is complete.

        Raises:
            IoFailure: it could not be written.
        """
        if not self.read_only:
            await self.log.flush()

    async def write(self, at: int, content: Buffer, forward: Forward, *, fua: bool) -> None:
        """See `FilterDriver`."""
        await forward.write(at, content)
        await self._note(Span(at, len(content)), content=content)
        if fua:
            await self.flush(forward)

    async def zero(self, span: Span, mode: ZeroMode, forward: Forward) -> None:
        """See `FilterDriver`: stands in the log as a write."""
        await forward.zero(span, mode=mode)
        await self._note(span)

    async def discard(self, span: Span, forward: Forward) -> None:
        """See `FilterDriver`."""
        await forward.discard(span)
        await self._note(span, flags=EntryFlag.DISCARD)

    async def flush(self, forward: Forward) -> None:
        """See `FilterDriver`. A flush that fails leaves an entry without bytes."""
        place = self.log.place(Entry(0, 0, EntryFlag.FLUSH))
        try:
            await forward.flush()
        except BaseException:
            await self.log.fill(place, Entry(0, 0, 0))
            raise
        await self.log.fill(place, Entry(0, 0, EntryFlag.FLUSH))
        await self.log.flush()

    async def _note(self, span: Span, *, content: Buffer | None = None, flags: int = 0) -> None:
        unit = self.log.sector_bytes
        first = span.at // unit
        entry = Entry(first, -(-span.end // unit) - first, flags)
        await self.log.fill(self.log.place(entry), entry, content)
