"""Short runs of all that can be done to a qcow2 image, and what a power cut in the middle of each may leave.

`Run` does requests one after the other and keeps books: at each place of the write log it knows what the image may say
then (`Allowed`). A write that was not flushed may be there sector by sector; snapshots and lengths are old or new.
"""

import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache

from judge import Bitmap, Verdict, judge
from replay import blank, opened
from sectors import SECTOR, ZERO_SECTOR, Disks, Sectors, sectors_of

from blockjobs.base.span import Span
from blockjobs.block.bitmaps import BlockDirtyBitmapAdd, add_bitmap, bitmap_at, remove_bitmap
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.drivers.qcow2.driver import Qcow2
from blockjobs.block.encipherment import Encipherment
from blockjobs.block.internal_snapshots import InternalSnapshots
from blockjobs.block.medium import Medium
from blockjobs.block.node import Node
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.testing.crash import WriteLog
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.toy_cipher import ToyCipher

KIB = 1 << 10
SIZE, GROWTH, CUT, LEAST = 24 * KIB, 16 * KIB + SECTOR, 9 * KIB + SECTOR, 6 * KIB
NEVER = 1 << 60
BITMAP = BlockDirtyBitmapAdd(node="image", name="b", granularity=KIB, persistent=True)
Content = tuple[bytes, ...]


@dataclass(frozen=True)
class Setup:
    """An image for runs; `scale` multiplies the places and lengths of requests, `tuning` is options of its node.

    `tweaks_on_disk`: the cipher counts from the beginning of the disk, as in the old encryption of qcow2.
    """

    image: NewImage
    scale: int = 1
    without: frozenset[str] = frozenset()
    cipher: ToyCipher | None = None
    tweaks_on_disk: bool = False
    tuning: Mapping[str, object] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, object]:
        found: dict[str, object] = {"file": "disk", **self.tuning}
        if self.image.data_file_name:
            found["data-file"] = "data"
        return found

    @property
    def requests(self) -> list[str]:
        return [name for name in REQUESTS if name not in self.without]

    @asynccontextmanager
    async def opened(self, media: Mapping[str, Medium], *, read_only: bool = False) -> AsyncIterator[Node]:
        """The image, open; at the end it is flushed and closed."""
        async with opened(media, self.options, read_only=read_only) as node:
            if self.cipher is not None:
                assert isinstance(node.driver, Qcow2)
                node.driver.image.encipherment = Encipherment(self.cipher, None if self.tweaks_on_disk else 0)
            yield node

    def verdict(self, disks: Disks) -> Verdict:
        """What the image says."""
        return judge(disks["disk"], disks.get("data"), self.cipher, tweaks_on_disk=self.tweaks_on_disk)

    @staticmethod
    def complaint(verdict: Verdict, allowed: Sequence["Allowed"]) -> str:
        """What is wrong with an image that may say so; empty if nothing."""
        if verdict.problems:
            return "; ".join(verdict.problems[:5])
        wrongs = [each.complaint(verdict) for each in allowed]
        return "" if "" in wrongs else " | ".join(wrongs)


SNAPSHOTS = frozenset({"create", "apply", "delete"})
ALL_BUT_DATA = SNAPSHOTS | {"compress", "grow", "shrink", "store"}
SETUPS = {
    "plain": Setup(NewImage(size=SIZE, cluster_size=KIB)),
    "lazy refcounts": Setup(
        NewImage(size=SIZE, cluster_size=KIB, lazy_refcounts=True), tuning={"lazy-refcounts": True}
    ),
    "extended L2": Setup(NewImage(size=8 * SIZE, cluster_size=16 * KIB, extended_l2=True), scale=8),
    "data file": Setup(NewImage(size=SIZE, cluster_size=KIB, data_file_name="data"), without=SNAPSHOTS | {"compress"}),
    "raw data file": Setup(
        NewImage(size=SIZE, cluster_size=KIB, data_file_name="data", data_file_raw=True),
        without=SNAPSHOTS | {"compress"},
    ),
    "discard-no-unref": Setup(
        NewImage(size=SIZE, cluster_size=KIB),
        without=frozenset({"apply", "compress", "grow", "shrink", "store"}),
        tuning={"discard-no-unref": True},
    ),
    "discard-no-unref, enciphered": Setup(
        NewImage(size=SIZE, cluster_size=KIB),
        without=ALL_BUT_DATA,
        cipher=ToyCipher(1),
        tuning={"discard-no-unref": True},
    ),
    "data file, enciphered": Setup(
        NewImage(size=SIZE, cluster_size=KIB, data_file_name="data"), without=ALL_BUT_DATA, cipher=ToyCipher(1)
    ),
    "refcounts of 1 bit": Setup(NewImage(size=SIZE, cluster_size=KIB, refcount_bits=1), without=SNAPSHOTS),
    "refcounts of 64 bits": Setup(NewImage(size=SIZE, cluster_size=512, refcount_bits=64)),
    "enciphered": Setup(NewImage(size=SIZE, cluster_size=KIB), without=frozenset({"compress"}), cipher=ToyCipher(1)),
    "enciphered on the disk": Setup(
        NewImage(size=SIZE, cluster_size=KIB),
        without=frozenset({"delete", "compress", "store"}),
        cipher=ToyCipher(1),
        tweaks_on_disk=True,
    ),
    "version 2": Setup(
        NewImage(size=SIZE, cluster_size=KIB, is_v2=True), without=frozenset({"store", "grow", "shrink"})
    ),
}


@dataclass(frozen=True)
class Allowed:
    """What an image may say.

    Attributes:
        sectors: for each sector of the disk, what it may show.
        snapshots: by id, what each shows; all of them are there and no others.
        reference: what the disk showed when its bitmap began; None if it has none.
    """

    sectors: tuple[frozenset[bytes], ...]
    snapshots: Mapping[bytes, Content]
    reference: Content | None

    def complaint(self, verdict: Verdict) -> str:
        """How what an image says differs; empty if it does not."""
        if len(verdict.content) != len(self.sectors):
            return f"{len(verdict.content)} sectors, not {len(self.sectors)}"
        wrong = [
            at for at, (seen, may) in enumerate(zip(verdict.content, self.sectors, strict=True)) if seen not in may
        ]
        if wrong:
            return f"sectors {wrong[:9]} show neither what was flushed nor what was written later"
        lies = [at for at, (seen, may) in enumerate(zip(verdict.raw, self.sectors, strict=False)) if seen not in may]
        if lies:
            return f"sectors {lies[:9]} of the raw data file are not those of the disk"
        if verdict.snapshots != self.snapshots:
            bad = [id for id, content in verdict.snapshots.items() if self.snapshots.get(id) != content]
            return f"snapshots {list(verdict.snapshots)}, not {list(self.snapshots)}, or other contents of {bad}"
        if list(verdict.bitmaps) != ([] if self.reference is None else [b"b"]):
            return f"bitmaps {list(verdict.bitmaps)}"
        return "" if self.reference is None else self._concealed(verdict.bitmaps[b"b"], verdict, self.reference)

    def _concealed(self, bitmap: Bitmap, verdict: Verdict, reference: Content) -> str:
        if bitmap.in_use:
            return ""
        concealed = [
            at
            for at, (seen, was) in enumerate(zip(verdict.content, reference, strict=True))
            if seen is not was and seen != was and not bitmap.bits >> at * SECTOR // bitmap.granularity & 1
        ]
        return f"the bitmap conceals changes of sectors {concealed[:9]}" if concealed else ""

    def exactly(self, content: Content) -> "Allowed":
        return replace(self, sectors=tuple(map(only, content)), reference=fit(self.reference, len(content)))

    def also(self, at: int, content: Content) -> "Allowed":
        """As before, or with some of these sectors."""
        sectors = list(self.sectors)
        for place, each in enumerate(content, at):
            sectors[place] = sectors[place] | {each}
        return replace(self, sectors=tuple(sectors))

    def resized(self, count: int) -> "Allowed":
        kept = self.sectors[:count]
        sectors = kept + (only(ZERO_SECTOR),) * (count - len(kept))
        return replace(self, sectors=sectors, reference=fit(self.reference, count))


@lru_cache(10_000)
def only(content: bytes) -> frozenset[bytes]:
    return frozenset({content})


def fit(content: Content | None, count: int) -> Content | None:
    """Cut or filled up with zeroes."""
    return None if content is None else content[:count] + (ZERO_SECTOR,) * (count - len(content))


def split(content: bytes) -> Content:
    return tuple(content[at : at + SECTOR] for at in range(0, len(content), SECTOR))


@dataclass
class Era:
    """A request: it began and ended at places of the log. `during` and `after` say what the image may be."""

    name: str
    issued: int
    during: list[Allowed]
    ended: int = NEVER
    after: Allowed | None = None


class Run:
    """Requests to one open image.

    Attributes:
        content: what the disk shows now.
        now: what it may show after a power cut.
        eras: the requests so far.
    """

    def __init__(self, node: Node, setup: Setup, log: WriteLog, now: Allowed, content: Content) -> None:
        self.node, self.setup, self.log, self.now, self.content = node, setup, log, now, content
        self.eras = [Era("start", 0, [], log.mark("start"), now)]

    async def do(self, name: str) -> None:
        """One request; if it fails nothing was promised, and `now` says what it was before."""
        await REQUESTS[name](self, len(self.eras))

    @asynccontextmanager
    async def era(self, name: str, *during: Allowed) -> AsyncIterator[Era]:
        """A request under way; whoever opened it says what holds afterwards."""
        era = Era(name, self.log.mark(name), [self.now, *during])
        self.eras.append(era)
        yield era
        era.after = self.now
        era.ended = self.log.mark(f"{name} ended")

    def allowed(self, until: int) -> list[Allowed]:
        """What an image may say if the power was cut just before a place of the log."""
        era = max((era for era in self.eras if era.issued < until), key=lambda era: era.issued, default=self.eras[0])
        return era.during if until <= era.ended else [era.after or self.now]

    @property
    def snapshots(self) -> InternalSnapshots:
        found = self.node.driver.internal_snapshots
        assert found is not None
        return found

    def place(self, at: int, length: int) -> tuple[int, int]:
        """A place for a request, within a disk that may have become shorter."""
        at, length = at * self.setup.scale, length * self.setup.scale
        return at, min(length, self.node.length - at)

    def put(self, at: int, content: Content) -> None:
        self.content = self.content[:at] + content + self.content[at + len(content) :]


def pattern(step: int, at: int, length: int) -> bytes:
    """Bytes that tell which request wrote which sector."""
    return b"".join(struct.pack(">HHI", 0xA000 + step, 0, at + place) * 64 for place in range(0, length, SECTOR))


async def change(run: Run, name: str, at: int, content: bytes, work: Callable[[], Awaitable[None]]) -> None:
    sectors = split(content)
    changed = run.now.also(at // SECTOR, sectors)
    async with run.era(name, changed):
        run.now = changed
        await work()
        run.put(at // SECTOR, sectors)


async def write(run: Run, step: int) -> None:
    at, length = run.place(3 * SECTOR, 3 * KIB)
    content = pattern(step, at, length)
    await change(run, "write", at, content, lambda: run.node.write(at, content))


async def zero(run: Run, step: int) -> None:
    """Clusters are kept by every second one."""
    at, length = run.place(KIB, 5 * SECTOR)
    mode = ZeroMode.KEEP if step % 2 else ZeroMode.UNMAP
    await change(run, "zero", at, bytes(length), lambda: run.node.zero(Span(at, length), mode=mode))


async def discard(run: Run, _step: int) -> None:
    """What it shows then, zeroes or what it showed before, may be chosen cluster by cluster."""
    at, length = run.place(2 * KIB, 4 * KIB)
    first, count = at // SECTOR, length // SECTOR
    changed = run.now.also(first, (ZERO_SECTOR,) * count)
    async with run.era("discard", changed):
        run.now = changed
        await run.node.discard(Span(at, length))
        shown = split(await run.node.read(at, length))
        assert all(new in (old, ZERO_SECTOR) for old, new in zip(run.content[first:], shown, strict=False))
        run.put(first, shown)
        run.now = run.now.also(first, shown)


async def compress(run: Run, step: int) -> None:
    at, length = run.place(0, 3 * KIB)
    content = pattern(step, at, length)
    await change(run, "compress", at, content, lambda: run.node.write(at, content, compressed=True))


async def flush(run: Run, _step: int) -> None:
    async with run.era("flush"):
        await run.node.flush()
        run.now = run.now.exactly(run.content)


async def create(run: Run, _step: int) -> None:
    numbers = [int(id) for id in run.now.snapshots]
    id = b"%d" % (max(numbers, default=0) + 1)
    after = replace(run.now.exactly(run.content), snapshots={**run.now.snapshots, id: run.content})
    async with run.era("create", after):
        made = await run.snapshots.create("s", date_ns=0)
        assert made.id.encode() == id
        run.now = after


async def apply(run: Run, _step: int) -> None:
    """Nobody may do it while there is a bitmap, so that is removed first."""
    if run.now.snapshots:
        if run.now.reference is not None:
            bare = replace(run.now, reference=None)
            async with run.era("remove", bare):
                await remove_bitmap(*bitmap_at(run.node.graph, "image", "b"))
                run.now = bare
        id, content = next(iter(run.now.snapshots.items()))
        after = run.now.exactly(content)
        async with run.era("apply", after):
            await run.snapshots.apply(id.decode())
            run.now, run.content = after, content


async def delete(run: Run, _step: int) -> None:
    if run.now.snapshots:
        (id, _), *rest = run.now.snapshots.items()
        after = replace(run.now, snapshots=dict(rest))
        async with run.era("delete", after):
            await run.snapshots.delete(id.decode())
            run.now = after


async def resize(run: Run, name: str, length: int) -> None:
    after = run.now.resized(length // SECTOR)
    # What is to be cut off may be gone before the length says so.
    lost = run.now.also(length // SECTOR, (ZERO_SECTOR,) * max(0, len(run.content) - length // SECTOR))
    async with run.era(name, lost, after):
        await run.node.resize(length)
        run.now = after
        run.content = fit(run.content, length // SECTOR) or ()


async def grow(run: Run, _step: int) -> None:
    await resize(run, "grow", run.node.length + GROWTH * run.setup.scale)


async def shrink(run: Run, _step: int) -> None:
    await resize(run, "shrink", max(run.node.length - CUT * run.setup.scale, LEAST * run.setup.scale))


async def store(run: Run, _step: int) -> None:
    """What closing the image does with its bitmap, too. If it has none it gets one."""
    after = run.now
    if after.reference is None:
        after = replace(after, reference=run.content)
        await add_bitmap(run.node.graph, BITMAP)
    async with run.era("store", after):
        assert run.node.driver.bitmap_store is not None
        await run.node.driver.bitmap_store.store()
        run.now = after


REQUESTS: dict[str, Callable[[Run, int], Awaitable[None]]] = {
    each.__name__: each for each in (write, zero, discard, compress, create, apply, delete, grow, shrink, store, flush)
}


async def used(setup: Setup) -> tuple[dict[str, Pages], Allowed, Content]:
    """An image with plain and compressed clusters, one snapshot some of whose clusters it shares, and a bitmap."""
    disks = {name: SimDisk(pages) for name, pages in (await blank(setup.image)).items()}
    content = (ZERO_SECTOR,) * (setup.image.size // SECTOR)
    start = Allowed(tuple(map(only, content)), {}, None)
    async with setup.opened(disks) as node:
        run = Run(node, setup, WriteLog(), start, content)
        scale = setup.scale
        for at, length in ((0, 4 * KIB), (19 * KIB, 4 * KIB)):
            await node.write(at * scale, pattern(100, at * scale, length * scale))
        if "compress" not in setup.without:
            await node.write(4 * KIB * scale, pattern(101, 0, 2 * KIB * scale), compressed=True)
        run.content = split(await node.read(0, node.length))
        await flush(run, 0)
        if "create" not in setup.without:
            await create(run, 0)
        at = 2 * KIB * scale
        await change(run, "write", at, pattern(102, at, at), lambda: node.write(at, pattern(102, at, at)))
        if "store" not in setup.without:
            await store(run, 0)
        await flush(run, 0)
    return {name: disk.pages for name, disk in disks.items()}, run.now, run.content


@asynccontextmanager
async def running(setup: Setup, media: Mapping[str, Medium], log: WriteLog, now: Allowed,
                  content: Content) -> AsyncIterator[Run]:  # fmt: skip
    """The image, open; at the end it is flushed and closed, and the run knows that."""
    async with setup.opened(media) as node:
        run = Run(node, setup, log, now, content)
        yield run
        await flush(run, 0)


def disks_of(pages: Mapping[str, Pages]) -> dict[str, Sectors]:
    return {name: sectors_of(each) for name, each in pages.items()}
