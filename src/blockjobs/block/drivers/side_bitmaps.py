"""Persistent bitmaps of a raw image, in a file beside it (docs/adr/0010-side-file.md).

    use     the file is replaced by one that says in-use ▷ the first change of the image
    store   the image ▷, its state is read, the file is replaced by one with that state and the bits ▷

A stored bitmap is believed if the file does not say in-use and the image is still in that very state. Whoever writes to
the image without knowing of the file changes the image's times, and with them the state.
"""

import asyncio
import errno
from collections.abc import Callable
from typing import Final, TypeVar, TypeVarTuple

from blockjobs.base.clock import Clock
from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.offload import Offload
from blockjobs.base.text import printable
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.bitmap_store import LOADED_BYTES_MAX, MAP_BYTES_MAX, BitmapStore, check_total, log, map_bytes
from blockjobs.block.driver import Child
from blockjobs.block.drivers.side_file import SideFile
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.wire.side_bitmaps import DIRECTORY_BYTES_MAX, Directory, SideBitmap, SideContent, decode, encode

T = TypeVar("T")
Args = TypeVarTuple("Args")

SETTLE_NS: Final = 50_000_000
"""A file's times have the resolution of the kernel's tick, at most 10 ms: a change within the same tick would not show.
So the image is left alone for longer than that before its state is read."""
SETTLE_COARSE_NS: Final = 2_100_000_000
"""The same for file systems that keep whole seconds, or two."""
BITMAPS_MAX: Final = 65535
_SECOND_NS: Final = 1_000_000_000


class SideBitmaps(BitmapStore):
    """The bitmaps of one open raw node.

    Attributes:
        must_mark: `begin_use` has something to do.
    """

    def __init__(
        self,
        file: SideFile,
        image: Callable[[], Child],
        *,
        node_name: str,
        place: Callable[[], list[int]],
        offload: Offload,
        clock: Clock,
        read_only: bool,
    ) -> None:
        """See the class.

        Args:
            file: where the bitmaps are.
            image: the node that has the bytes, to be flushed.
            place: the window of the image that the node shows, and its length; part of the state.
        """
        super().__init__(node_name, read_only=read_only)
        self._file, self._image, self._place = file, image, place
        self._offload, self._clock = offload, clock
        self._names: list[str] = []
        self._is_marked = False
        self._lock = asyncio.Lock()
        self.must_mark = False

    def stored_names(self) -> list[str]:
        """See `BitmapStore`."""
        return self._names

    async def load(self, bitmaps: list[NodeBitmap]) -> None:
        """See `BitmapStore`; of a file that says in-use, or is about another state, all bitmaps are inconsistent."""
        content = await self._read()
        loaded: list[NodeBitmap] = []
        if content is not None:
            state = await self._state()
            is_stale = content.directory.in_use or content.directory.image != state
            loaded = [
                self._loaded(entry, bits, is_stale=is_stale)
                for entry, bits in zip(content.directory.bitmaps, content.bits, strict=True)
            ]
        self._take_over(bitmaps, loaded)
        self._names = [each.name for each in loaded if each.name is not None]
        self._is_marked = False
        self.must_mark = bool(self._names)

    async def _read(self) -> SideContent | None:
        try:
            raw = await self._run(self._file.read, LOADED_BYTES_MAX + DIRECTORY_BYTES_MAX)
            content = None if raw is None else decode(raw)
            if content is not None:
                self._check(content.directory)
        except ValueError as error:
            text = f"Could not read the bitmap file '{self._file.name}': {error}. Without it the image opens"
            raise UsageError(printable(text)) from None
        return content

    def _check(self, directory: Directory) -> None:
        """Raises ValueError for what `store` would never have written."""
        names = [entry.name for entry in directory.bitmaps]
        if len(set(names)) < len(names) or len(names) > BITMAPS_MAX or not all(names):
            raise ValueError("its directory makes no sense")
        for entry in directory.bitmaps:
            is_sound = entry.granularity >= 512 and entry.granularity & (entry.granularity - 1) == 0
            if not is_sound or entry.length < 0 or entry.granularity >= 1 << 32:
                raise ValueError(f"bitmap '{entry.name}' makes no sense")
            has_bits = not entry.inconsistent and not directory.in_use
            if has_bits and entry.stored != map_bytes(entry.length, entry.granularity):
                raise ValueError(f"bitmap '{entry.name}' is cut off")
        check_total(sum(map_bytes(entry.length, entry.granularity) for entry in directory.bitmaps if entry.stored))

    def _loaded(self, entry: SideBitmap, bits: bytes, *, is_stale: bool) -> NodeBitmap:
        is_broken = is_stale or entry.inconsistent
        length = 0 if is_broken else entry.length
        return NodeBitmap(
            map=DirtyBitmap.unpacked(length, entry.granularity, b"" if is_broken else bits),
            name=entry.name,
            enabled=entry.enabled,
            persistent=True,
            readonly=self._read_only,
            inconsistent=is_broken,
        )

    def check_new(self, name: str, *, length: int, granularity: int) -> None:
        """See `BitmapStore`."""
        del name
        if map_bytes(length, granularity) > MAP_BYTES_MAX:
            raise UsageError("Too much space will be occupied by the bitmap. Use larger granularity")
        self._check_memory(length, granularity)
        if len(self.persistent()) >= BITMAPS_MAX:
            raise UsageError("Maximum number of persistent bitmaps is already reached")

    async def begin_use(self) -> None:
        """See `BitmapStore`. What is in use needs no bits, so the file becomes a small one."""
        async with self._lock:
            if self._is_marked:
                return
            if self._names:
                await self._write(self._names, is_valid=False)
            self._is_marked = True
            self.must_mark = False

    async def remove(self, name: str) -> None:
        """See `BitmapStore`."""
        async with self._lock:
            if name in self._names:
                await self._write([each for each in self._names if each != name], is_valid=not self._is_marked)

    async def store(self) -> None:
        """See `BitmapStore`."""
        if self.bitmaps is None:
            return
        async with self._lock:
            if not self._is_out_of_date(is_marked=self._is_marked):
                return
            await self._write(self._in_order(), is_valid=True)
            self._stored()
            self._is_marked = False
            self.must_mark = bool(self._names)

    async def _write(self, names: list[str], *, is_valid: bool) -> None:
        """Replace the file by one with these bitmaps; `is_valid` ones are believed while the image stays as it is."""
        known = self.persistent()
        names = [name for name in names if name in known]
        if not names:
            await self._run(self._file.remove)
        else:
            state = await self._settled_state() if is_valid else []
            entries, bits = zip(*(self._entry(known[name], is_valid=is_valid) for name in names), strict=True)
            content = encode(Directory(image=state, in_use=not is_valid, bitmaps=list(entries)), bits)
            await self._run(self._file.replace, content)
        self._names = names

    def _entry(self, bitmap: NodeBitmap, *, is_valid: bool) -> tuple[SideBitmap, bytes]:
        assert bitmap.name is not None
        is_broken = bitmap.inconsistent
        if map_bytes(bitmap.map.length, bitmap.map.granularity) > MAP_BYTES_MAX:
            log.warning("bitmap '%s' has become too large to be stored", bitmap.name)
            is_broken = True
        bits = b"" if is_broken or not is_valid or not bitmap.map.length else bitmap.everything.packed()
        entry = SideBitmap(
            name=bitmap.name,
            granularity=bitmap.map.granularity,
            length=bitmap.map.length,
            enabled=bitmap.enabled,
            inconsistent=is_broken,
            stored=len(bits),
        )
        return entry, bits

    async def _settled_state(self) -> list[int]:
        await self._image().flush()
        await self._clock.sleep_until(self._clock.now_ns() + SETTLE_NS)
        state = await self._state()
        if any(time_ns and time_ns % _SECOND_NS == 0 for time_ns in state[2:4]):
            await self._clock.sleep_until(self._clock.now_ns() + SETTLE_COARSE_NS)
        return state

    async def _state(self) -> list[int]:
        return [*await self._run(self._file.image_state), *self._place()]

    async def _run(self, work: Callable[[*Args], T], *args: *Args) -> T:
        try:
            return await self._offload.run(work, *args)
        except OSError as error:
            raise IoFailure(error.errno or errno.EIO, f"bitmap file '{self._file.name}'") from error
