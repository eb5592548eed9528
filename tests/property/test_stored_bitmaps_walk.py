"""Any order of bitmap commands, writes, closings and crashes of a qcow2 image, against a model of plain sets.

After a clean closing every persistent bitmap is as it was. After a crash it covers what the model says, or it is
inconsistent, and then only removal is possible.
"""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from blockjobs.base.errors import UsageError
from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.block.bitmaps import (
    BlockDirtyBitmapAdd,
    BlockDirtyBitmapMerge,
    add_bitmap,
    clear_bitmap,
    enable_bitmap,
    merge_bitmaps,
    remove_bitmap,
)
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import NodeBitmap, find_bitmap
from blockjobs.testing.clock import run
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.little_host import LittleHost

SECTORS = 256
SIZE = SECTORS * 512
NAMES = ("a", "b", "c")

spans = st.tuples(st.integers(0, SECTORS - 1), st.integers(1, 40)).map(
    lambda pair: Span(pair[0] * 512, min(pair[1], SECTORS - pair[0]) * 512)
)
names = st.sampled_from(NAMES)
steps = st.one_of(
    st.tuples(st.just("add"), names, st.sampled_from([512, 2048, 65536]), st.booleans()),
    st.tuples(st.sampled_from(["remove", "clear", "enable", "disable"]), names),
    st.tuples(st.just("merge"), names, st.lists(names, max_size=2)),
    st.tuples(st.sampled_from(["write", "zero", "discard"]), spans),
    st.tuples(st.sampled_from(["reopen", "crash", "flush", "freeze"]), st.just("a")),
)


@dataclass(slots=True)
class Wanted:
    """A bitmap of the model: its sectors, widened to granules."""

    granularity: int
    enabled: bool
    sectors: set[int] = field(default_factory=set)
    broken: bool = False

    def mark(self, sectors: set[int]) -> None:
        per = self.granularity // 512
        for sector in sectors:
            first = sector // per * per
            self.sectors |= set(range(first, min(first + per, SECTORS)))


def sectors_of(bitmap: NodeBitmap) -> set[int]:
    return {sector for span in bitmap.map.runs() for sector in range(span.at // 512, -(-span.end // 512))}


class Walk:
    """The image, and what its bitmaps should hold."""

    def __init__(self, host: LittleHost) -> None:
        self.host = host
        self.model: dict[str, Wanted] = {}
        self.node: Node
        self.has_crashed = False

    async def open(self, disk: SimDisk | None = None) -> None:
        self.node = await self.host.qcow2("q", NewImage(size=SIZE, cluster_size=512), medium=disk)
        if disk is not None:
            self.host.disks["q-file"] = disk

    async def close(self) -> SimDisk:
        disk = self.host.disks["q-file"]
        await self.host.graph.remove("q")
        found = await check_image(self.host.graph.node("q-file"), offload=InlineOffload())
        assert (found.corruptions, found.check_errors) == (0, 0), found.problems
        assert self.has_crashed or not found.leaks, found.problems
        await self.host.graph.remove("q-file")
        return disk

    async def step(self, kind: str, *arguments: object) -> None:
        match kind, arguments:
            case "reopen", _:
                await self.open(await self.close())
            case "crash", _:
                await self._crash()
            case "freeze", (str() as name,):
                self._freeze(name)
            case (("write" | "zero" | "discard" | "flush"), (change,)):
                await self._guest(kind, change)
            case _, (str() as name, *more):
                await self._command(kind, name, *more)

    async def _crash(self) -> None:
        self.has_crashed = True
        disk = SimDisk(self.host.disks["q-file"].pages)
        await self.host.graph.remove("q")
        await self.host.graph.remove("q-file")
        await self.open(disk)
        for name in list(self.model):
            bitmap = find_bitmap(self.node.bitmaps, name)
            if bitmap is None:
                del self.model[name]  # it was never stored
                continue
            self.model[name].broken = bitmap.inconsistent
            if not bitmap.inconsistent:
                # What only cleared it since may be forgotten; what was written may not.
                assert sectors_of(bitmap) >= self.model[name].sectors
                self.model[name].sectors, self.model[name].enabled = sectors_of(bitmap), bitmap.enabled
        for bitmap in list(self.node.bitmaps):
            if bitmap.name not in self.model:
                await remove_bitmap(self.node, bitmap)

    def _freeze(self, name: str) -> None:
        bitmap = find_bitmap(self.node.bitmaps, name)
        if bitmap is not None and not bitmap.inconsistent:
            bitmap.freeze()
            bitmap.record(Span(0, 0))
            bitmap.reclaim()

    async def _guest(self, kind: str, change: object) -> None:
        guest = await self.host.guest(self.node)
        if isinstance(change, Span):
            if kind == "write":
                await guest.node.write(change.at, b"g" * change.length)
            elif kind == "zero":
                await guest.node.zero(change)
            else:
                await guest.node.discard(change)
            touched = set(range(change.at // 512, change.end // 512))
            for wanted in self.model.values():
                if wanted.enabled and not wanted.broken:
                    wanted.mark(touched)
        else:
            await guest.node.flush()
        await self.host.graph.release(guest)

    async def _command(self, kind: str, name: str, *more: object) -> None:
        try:
            await self._do(kind, name, *more)
        except UsageError:
            involved = [self.model.get(each) for each in (name, *(more[0] if kind == "merge" else ()))]
            exists = kind == "add" and name in self.model
            assert exists or any(each is None or (each.broken and kind != "remove") for each in involved), (kind, name)

    async def _do(self, kind: str, name: str, *more: object) -> None:
        graph, node = self.host.graph, self.node
        if kind == "add":
            granularity, enabled = more
            assert isinstance(granularity, int)
            wanted = BlockDirtyBitmapAdd(
                node="q", name=name, granularity=granularity, persistent=True, disabled=not enabled
            )
            await add_bitmap(graph, wanted)
            self.model[name] = Wanted(granularity, bool(enabled))
            return
        bitmap = find_bitmap(node.bitmaps, name)
        if bitmap is None:
            raise UsageError("no such bitmap")
        if kind == "merge":
            (sources,) = more
            await merge_bitmaps(graph, BlockDirtyBitmapMerge(node="q", target=name, bitmaps=[*sources]))
            for source in sources:
                self.model[name].mark(set(self.model[source].sectors))
        elif kind == "remove":
            await remove_bitmap(node, bitmap)
            del self.model[name]
        elif kind == "clear":
            clear_bitmap(bitmap)
            self.model[name].sectors = set()
        else:
            await enable_bitmap(node, bitmap, kind == "enable")
            self.model[name].enabled = kind == "enable"

    def check(self) -> None:
        assert {each.name for each in self.node.bitmaps} == set(self.model)
        for name, wanted in self.model.items():
            bitmap = find_bitmap(self.node.bitmaps, name)
            assert bitmap is not None and bitmap.inconsistent is wanted.broken
            if not wanted.broken:
                assert (bitmap.enabled, sectors_of(bitmap)) == (wanted.enabled, wanted.sectors)


@settings(max_examples=80, deadline=None)
@given(st.lists(steps, max_size=25))
def test_bitmaps_are_what_the_model_says(walk: list[tuple[object, ...]]) -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            walker = Walk(host)
            await walker.open()
            for kind, *arguments in walk:
                assert isinstance(kind, str)
                await walker.step(kind, *arguments)
                walker.check()
            await walker.open(await walker.close())
            walker.check()

    run(scenario())
