"""Exports and their server over socket pairs, in virtual time."""

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from blockjobs.base.errors import ImageCorrupt, IoFailure, UsageError, WireError
from blockjobs.base.span import Span
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.export.nbd_export import NbdExport
from blockjobs.export.options import BlockDirtyBitmap, BlockExportDeleted, BlockExportRemoveMode, NbdExportOptions
from blockjobs.export.server import HALF_OPEN_MAX, NbdServer
from blockjobs.export.transmission import REQUESTS_MAX
from blockjobs.testing.clock import run
from blockjobs.testing.faults import Fault, Operation
from blockjobs.testing.host import SimHost
from blockjobs.testing.nbd_guest import NbdGuest, Wire
from blockjobs.wire.nbd import Command, CommandFlag, TransmissionFlag
from blockjobs.wire.nbd_requests import Extent, Request, encode_request

MIB = 1 << 20
CONTENT = bytes(range(256)) * 4096  # 1 MiB
BOTH = [{"structured": False}, {"structured": True}, {"extended": True}]


def stored(host: SimHost, name: str = "disk") -> bytes:
    pages = host.disks[name].pages
    return pages.read(0, pages.size)


def options(id: str = "e", node: str = "disk", **more: object) -> NbdExportOptions:
    return NbdExportOptions(id=id, node_name=node, **more)


@asynccontextmanager
async def served(
    latency_s_max: float = 0.0, *, seed: int = 0, connections_max: int = 100, **more: object
) -> AsyncIterator[tuple[SimHost, NbdServer]]:
    """A host with a disk of 1 MiB, exported writable as `disk` unless told otherwise."""
    async with SimHost(seed, latency_s_max=latency_s_max) as host:
        await host.disk("disk", CONTENT)
        host.exports.server = NbdServer([], connections_max=connections_max)
        await host.exports.add(options(**{"writable": True, **more}))
        yield host, host.exports.server


def scenario(body: Callable[[SimHost, NbdServer], Awaitable[None]], **more: object) -> None:
    async def main() -> None:
        async with served(**more) as (host, server):
            await body(host, server)

    run(main())


# --- requests


@pytest.mark.parametrize("style", BOTH)
def test_what_is_written_is_read(style: dict[str, bool]) -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        guest = await host.nbd_guest("disk", **style)
        assert await guest.read(100, 1000) == CONTENT[100:1100]
        await guest.write(4000, b"x" * 300_000, fua=True)
        assert await guest.read(0, MIB) == CONTENT[:4000] + b"x" * 300_000 + CONTENT[304_000:]
        await guest.zero(8192, 4096)
        await guest.zero(512, 1, flags=CommandFlag.NO_HOLE)
        await guest.discard(16384, 4096)
        await guest.flush()
        assert await guest.read(8192, 4096) == bytes(4096)
        assert await guest.read(511, 3) == CONTENT[511:512] + b"\0" + CONTENT[513:514]
        await guest.close()

    scenario(body)


@pytest.mark.parametrize("style", BOTH)
@pytest.mark.parametrize(
    ("flags", "command", "at", "length", "code"),
    [
        (0, Command.READ, MIB, 1, errno.EINVAL),
        (0, Command.READ, (1 << 64) - 1, 2, errno.EINVAL),
        (0, Command.READ, 0, (32 << 20) + 1, errno.EINVAL),
        (0, Command.WRITE, MIB - 1, 2, errno.ENOSPC),
        (0, Command.WRITE_ZEROES, MIB - 1, 2, errno.ENOSPC),
        (0, Command.WRITE_ZEROES, (1 << 64) - 512, 1024, errno.ENOSPC),
        (0, Command.TRIM, MIB, 1, errno.EINVAL),
        (0, Command.CACHE, MIB, 1, errno.EINVAL),
        (0, Command.BLOCK_STATUS, 0, 512, errno.EINVAL),
        (0, Command.RESIZE, 0, 512, errno.EINVAL),
        (0, 50, 0, 0, errno.EINVAL),
        (1 << 14, Command.READ, 0, 1, errno.EINVAL),
        (CommandFlag.NO_HOLE, Command.WRITE, 0, 1, errno.EINVAL),
        (CommandFlag.REQ_ONE, Command.READ, 0, 1, errno.EINVAL),
    ],
)
def test_impossible_requests_are_refused_and_the_next_one_is_served(
    style: dict[str, bool], flags: int, command: int, at: int, length: int, code: int
) -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        guest = await host.nbd_guest("disk", **style)
        extra = CommandFlag.PAYLOAD_LEN if command == Command.WRITE and style.get("extended") else 0
        payload = bytes(length) if command == Command.WRITE else b""
        with pytest.raises(IoFailure) as caught:
            await guest.raw(Request(flags | extra, command, 7, at, length), payload)
        assert caught.value.errno == code
        assert await guest.read(0, MIB) == CONTENT

    scenario(body)


def test_lengths_of_64_bits_zero_and_trim_more_than_4_gib_at_once() -> None:
    async def main() -> None:
        async with SimHost() as host:
            await host.image("disk", NewImage(size=10 << 30))
            host.exports.server = NbdServer([])
            await host.exports.add(options(writable=True))
            guest = await host.nbd_guest("disk", extended=True, contexts=["base:allocation"])
            await guest.write(5 << 30, b"there")
            assert sum(e.length for e in (await guest.status(0, 10 << 30))["base:allocation"]) == 10 << 30
            await guest.zero(0, 10 << 30)
            assert (await guest.status(0, 10 << 30))["base:allocation"] == [Extent(10 << 30, 3)]
            await guest.discard(0, 10 << 30)
            assert await guest.read(5 << 30, 5) == bytes(5)

    run(main())


@pytest.mark.parametrize("extended", [False, True])
def test_every_cut_of_the_requests_gives_the_same_replies(extended: bool) -> None:
    def sent() -> bytes:
        payload = CommandFlag.PAYLOAD_LEN if extended else 0
        asked = [
            (Request(payload, Command.WRITE, 1, 512, 40), b"w" * 40),
            (Request(0, Command.READ, 2, 500, 60), b""),
            (Request(0, 77, 3, 0, 0), b""),
            (Request(payload, Command.WRITE, 4, MIB, 30), b"s" * 30),
            (Request(0, Command.BLOCK_STATUS, 5, 0, MIB), b""),
            (Request(0, Command.FLUSH, 6, 0, 0), b""),
        ]
        return b"".join(encode_request(request, extended=extended) + content for request, content in asked)

    async def talk(host: SimHost, pieces: list[bytes]) -> bytes:
        guest = NbdGuest(await host.nbd_attach())
        await guest.negotiate("disk", extended=extended, contexts=["base:allocation"], listens=False)
        for piece in pieces:
            guest.wire.write(piece)
            await asyncio.sleep(0.01)
        guest.wire.write(encode_request(Request(0, Command.DISCONNECT, 7, 0, 0), extended=extended))
        return await guest.wire.to_the_end()

    async def body(host: SimHost, server: NbdServer) -> None:
        said = sent()
        whole = await talk(host, [said])
        assert b"w" * 40 in whole and b"past EOF" in whole
        for cut in range(1, len(said), 3):
            assert sorted(await talk(host, [said[:cut], said[cut:]])) == sorted(whole)
        assert sorted(await talk(host, [said[at : at + 1] for at in range(len(said))])) == sorted(whole)

    scenario(body)


def test_read_only_exports_refuse_every_change() -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        guest = await host.nbd_guest("disk")
        assert guest.info.flags & TransmissionFlag.READ_ONLY
        assert not guest.info.flags & (TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES)
        for change in (guest.write(0, b"x"), guest.zero(0, 1), guest.discard(0, 512)):
            with pytest.raises(IoFailure) as caught:
                await change
            assert caught.value.errno == errno.EPERM
        await guest.flush()
        assert await guest.read(0, MIB) == CONTENT

    scenario(body, writable=False)


def test_empty_requests_succeed() -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        guest = await host.nbd_guest("disk")
        assert await guest.read(0, 0) == b""
        await guest.write(0, b"")
        await guest.zero(0, 0)
        await guest.discard(MIB, 0)

    scenario(body)


def test_errors_of_the_disk_reach_the_client_and_only_its_request() -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        guest = await host.nbd_guest("disk")
        host.faults["disk"].add(Fault(nth=1, operation=Operation.WRITE, errno=errno.ENOSPC))
        with pytest.raises(IoFailure) as caught:
            await guest.write(0, b"x" * 512)
        assert caught.value.errno == errno.ENOSPC
        await guest.write(0, b"y" * 512)
        assert await guest.read(0, 512) == b"y" * 512

    scenario(body)


def test_a_corrupt_image_is_an_input_output_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        guest = await host.nbd_guest("disk")

        async def corrupt(*_: object, **__: object) -> None:
            raise ImageCorrupt("disk", "L2 table offset unaligned")

        with monkeypatch.context() as patch:
            patch.setattr(type(host.graph.node("disk")), "read_into", corrupt)
            with pytest.raises(IoFailure) as caught:
                await guest.read(0, 4096)
        assert caught.value.errno == errno.EIO and "L2 table offset" in caught.value.where
        assert await guest.read(0, 4) == CONTENT[:4]

    scenario(body)


def test_many_requests_at_once_are_all_answered() -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        guest = await host.nbd_guest("disk")
        count = REQUESTS_MAX * 3
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(guest.write(number * 512, bytes([number & 255]) * 512))
        async with asyncio.TaskGroup() as group:
            reads = [group.create_task(guest.read(number * 512, 512)) for number in range(count)]
        assert [task.result() for task in reads] == [bytes([number & 255]) * 512 for number in range(count)]

    scenario(body, latency_s_max=0.01)


def test_a_disconnect_waits_for_what_was_asked_before() -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        guest = await host.nbd_guest("disk")
        writing = asyncio.get_running_loop().create_task(guest.write(0, b"z" * 4096))
        await asyncio.sleep(0)
        await guest.close()
        await writing
        assert stored(host, "disk")[:4096] == b"z" * 4096

    scenario(body, latency_s_max=1.0)


def test_writethrough_is_durable_without_being_asked() -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        guest = await host.nbd_guest("disk")
        await guest.write(0, b"kept")
        host.disks["disk"].cut_power(seed=0)
        assert stored(host)[:4] == b"kept"

    scenario(body, writethrough=True)


# --- block status


def test_status_tells_holes_depths_and_dirty_bits() -> None:
    async def main() -> None:
        async with SimHost() as host:
            await host.image("base", NewImage(size=4 * MIB))
            top = await host.image("disk", NewImage(size=4 * MIB), backing="base")
            async with host.access(top.backing, write=True) as user:
                await user.node.write(MIB, b"b" * MIB)
            bitmap = NodeBitmap(map=DirtyBitmap(4 * MIB, 65536), name="b0")
            top.attach_bitmap(bitmap)
            host.exports.server = NbdServer([])
            await host.exports.add(options(writable=True, allocation_depth=True, bitmaps=["b0"]))
            names = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"]
            guest = await host.nbd_guest("disk", contexts=names)
            await guest.write(2 * MIB, b"t" * 65536)
            whole = await guest.status(0, 4 * MIB)
            assert whole == {
                names[0]: [Extent(MIB, 3), Extent(MIB + 65536, 0), Extent(2 * MIB - 65536, 3)],
                names[1]: [Extent(MIB, 0), Extent(MIB, 2), Extent(65536, 1), Extent(2 * MIB - 65536, 0)],
                names[2]: [Extent(2 * MIB, 0), Extent(65536, 1), Extent(2 * MIB - 65536, 0)],
            }
            first = await guest.status(2 * MIB + 100, MIB, flags=CommandFlag.REQ_ONE)
            assert first == {name: [Extent(65436, flags)] for name, flags in zip(names, (0, 1, 1), strict=True)}
            with pytest.raises(IoFailure):
                await guest.status(0, 0)

    run(main())


def test_exported_bitmaps_are_busy_and_must_suit_the_export() -> None:
    async def main() -> None:
        async with SimHost() as host:
            await host.image("base", NewImage(size=MIB))
            top = await host.image("disk", NewImage(size=MIB), backing="base")
            below = top.backing
            assert below is not None
            bitmap = NodeBitmap(map=DirtyBitmap(MIB, 65536), name="b0")
            below.attach_bitmap(bitmap)
            host.exports.server = NbdServer([])
            add = host.exports.add
            await host.graph.set_read_only(below, read_only=True)  # so nobody changes what the bitmap records
            await add(options("r", name="r", bitmaps=["b0"]))
            await host.exports.remove("r")
            own = NodeBitmap(map=DirtyBitmap(MIB, 65536), name="own")
            top.attach_bitmap(own)
            with pytest.raises(UsageError, match=r"Enabled bitmap 'own' incompatible with readonly export"):
                await add(options("r", name="r", bitmaps=["own"]))
            assert not own.busy
            await add(options("r", name="r", bitmaps=[BlockDirtyBitmap(node=top.name, name="own")]))
            await host.exports.remove("r")
            with pytest.raises(UsageError, match=r"Bitmap 'zz' is not found"):
                await add(options("r", name="r", bitmaps=["b0", "zz"], writable=True))
            await host.graph.set_read_only(below, read_only=False)
            assert not bitmap.busy, "what a failed command took it gives back"
            await add(options(bitmaps=["b0"], writable=True))
            assert bitmap.busy
            with pytest.raises(UsageError, match=r"Bitmap 'b0' is currently in use by another operation"):
                await add(options("r", name="r", bitmaps=[BlockDirtyBitmap(node="base", name="b0")], writable=True))
            with pytest.raises(UsageError, match=r"Node 'zz' not found"):
                await add(options("r", name="r", bitmaps=[BlockDirtyBitmap(node="zz", name="b0")]))
            await host.exports.remove("e")
            assert not bitmap.busy

    run(main())


# --- the graph


def test_requests_wait_while_the_node_is_drained_also_those_of_new_clients() -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        node = host.graph.node("disk")
        early = await host.nbd_guest("disk")
        loop = asyncio.get_running_loop()
        async with host.graph.drained(node):
            late = await host.nbd_guest("disk")
            tasks = [
                loop.create_task(early.write(0, b"early")),
                loop.create_task(late.read(512, 4)),
                loop.create_task(late.write(1024, b"late")),
            ]
            await asyncio.sleep(5)
            assert not any(task.done() for task in tasks)
            assert len(node.in_flight) == 0
            assert stored(host, "disk") == CONTENT
        for task in tasks:
            await task
        assert await early.read(1024, 4) == b"late"

    scenario(body)


def test_an_export_follows_filters_and_pivots() -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        guest = await host.nbd_guest("disk")
        other = await host.disk("other", bytes(MIB))
        async with host.graph.edit() as edit:
            await edit.replace(host.graph.node("disk"), other)
        assert host.exports.infos()[0].node_name == "other"
        await guest.write(0, b"pivot")
        assert stored(host, "other")[:5] == b"pivot"
        assert stored(host, "disk") == CONTENT

    scenario(body)


def test_rights_conflicts_are_refused_in_qemus_words() -> None:
    async def main() -> None:
        async with SimHost() as host:
            node = await host.disk("disk", CONTENT)
            host.exports.server = NbdServer([])
            await host.graph.claim("backup job 'j'", node, needs=Perm(0), shares=ALL & ~Perm.WRITE, name="hold")
            with pytest.raises(UsageError, match="Permission conflict on node 'disk'"):
                await host.exports.add(options(writable=True))
            assert host.exports.infos() == [] and host.exports.server.exports() == []
            await host.exports.add(options())

    run(main())


# --- adding and removing


def test_ids_names_and_nodes_are_checked_in_order() -> None:
    async def main() -> None:
        async with SimHost() as host:
            await host.disk("disk", CONTENT)
            await host.disk("ro", CONTENT, read_only=True)
            add = host.exports.add

            async def refused(match: str, wanted: NbdExportOptions) -> None:
                with pytest.raises(UsageError, match=match):
                    await add(wanted)

            await refused("Invalid block export id", options("1x", "zz"))
            await refused("Cannot find device='' nor node-name='zz'", options("e", "zz"))
            await refused('iothread "io" not found', options(iothread="io"))
            await refused("Cannot export read-only node as writable", options("e", "ro", writable=True))
            await refused("NBD server not running", options())
            host.exports.server = NbdServer([])
            await add(options())
            await refused("Block export id 'e' is already in use", options())
            await refused("NBD server already has export named 'disk'", options("e1"))
            await refused(r"export name 'n+' too long", options("e1", name="n" * 4097))
            await refused(r"description 'n+' too long", options("e1", name="b", description="n" * 4097))
            await add(options("e1", name=""))
            assert [(info.id, info.node_name) for info in host.exports.infos()] == [("e1", "disk"), ("e", "disk")]
            with pytest.raises(UsageError, match="Export 'nope' is not found"):
                await host.exports.remove("nope")

    run(main())


def test_removal_is_refused_while_clients_work_unless_it_is_hard() -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        guest = await host.nbd_guest("disk")
        with pytest.raises(UsageError, match="export 'e' still in use"):
            await host.exports.remove("e")
        assert await guest.read(0, 4) == CONTENT[:4]
        await host.exports.remove("e", BlockExportRemoveMode.HARD)
        assert host.events[-1] == BlockExportDeleted(id="e")
        with pytest.raises(IoFailure):
            await guest.read(0, 4)
        with pytest.raises(WireError, match="export 'disk' not present"):
            await host.nbd_guest("disk")
        await host.graph.remove("disk")

    scenario(body)


@pytest.mark.parametrize("drained", [False, True])
def test_stopping_takes_less_than_a_second_and_issued_requests_end(drained: bool) -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        guest = await host.nbd_guest("disk")
        loop = asyncio.get_running_loop()
        await host.nbd_guest("disk")
        await host.nbd_attach()
        node = host.graph.node("disk")
        begun = loop.time()
        if drained:
            async with host.graph.drained(node):
                writing = loop.create_task(guest.write(0, b"w" * 512))
                await asyncio.sleep(0.01)
                begun = loop.time()
                await host.exports.stop_server()
                assert loop.time() - begun < 1
                assert host.events[-1] == BlockExportDeleted(id="e")
            with pytest.raises(IoFailure):
                await writing
            assert stored(host, "disk") == CONTENT, "a request that was held back is not carried out"
            return
        writing = loop.create_task(guest.write(0, b"w" * 512))
        while not len(node.in_flight):
            await asyncio.sleep(0)
        begun = loop.time()
        await host.exports.stop_server()
        assert loop.time() - begun < 1
        with pytest.raises(IoFailure):
            await writing
        while host.exports.infos():
            assert host.exports.infos()[0].shutting_down
            await asyncio.sleep(1)
        assert host.events[-1] == BlockExportDeleted(id="e")
        assert stored(host, "disk")[:512] == b"w" * 512, "what was issued has ended"
        with pytest.raises(UsageError, match="NBD server not running"):
            await host.exports.stop_server()

    scenario(body, latency_s_max=100.0, seed=3)


def test_leaving_the_host_drops_clients_and_lets_requests_end() -> None:
    async def main() -> None:
        async with served(latency_s_max=3.0) as (host, _):
            guest = await host.nbd_guest("disk")
            writing = asyncio.get_running_loop().create_task(guest.write(0, b"last"))
            while not len(host.graph.node("disk").in_flight):
                await asyncio.sleep(0)
        with pytest.raises(IoFailure):
            await writing
        assert stored(host, "disk")[:4] == b"last"

    run(main())


# --- bounds


def test_one_client_more_than_may_work_is_turned_away_until_another_leaves() -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        first = await host.nbd_guest("disk")
        assert not first.info.flags & TransmissionFlag.CAN_MULTI_CONN
        with pytest.raises(WireError, match="too many clients"):
            await host.nbd_guest("disk")
        await first.close()
        await asyncio.sleep(0.1)
        await host.nbd_guest("disk")

    scenario(body, connections_max=1)


def test_half_open_connections_end_after_ten_seconds() -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        wire = await host.nbd_attach()
        await wire.exactly(18)
        begun = asyncio.get_running_loop().time()
        assert await wire.to_the_end() == b""
        assert asyncio.get_running_loop().time() - begun == pytest.approx(10, abs=0.1)

    scenario(body)


def test_the_oldest_half_open_connection_goes_and_honest_clients_come_in() -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        idlers = [await host.nbd_attach() for _ in range(HALF_OPEN_MAX)]
        guest = await host.nbd_guest("disk")
        assert await guest.read(0, 4) == CONTENT[:4]
        assert len(await idlers[0].to_the_end()) == 18, "the oldest got its greeting and then the end"
        await idlers[1].exactly(18)

    scenario(body)


def test_garbage_drops_the_client_and_nobody_else() -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        honest = await host.nbd_guest("disk")
        rude = await host.nbd_guest("disk")
        rude.wire.write(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")
        with pytest.raises(IoFailure):
            await rude.read(0, 4)
        assert await honest.read(0, 4) == CONTENT[:4]
        wire = await host.nbd_attach()
        wire.write(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(EOFError):
            await wire.exactly(19)

    scenario(body)


def test_half_sent_giant_writes_stop_neither_small_nor_ordinary_requests() -> None:
    async def main() -> None:
        async with SimHost() as host:
            await host.image("disk", NewImage(size=64 * MIB))
            server = host.exports.server = NbdServer([])
            await host.exports.add(options(writable=True))
            rude = [await host.nbd_guest("disk") for _ in range(12)]
            for guest in rude:
                guest.wire.write(b"\x25\x60\x95\x13\0\0\0\x01" + bytes(8) + bytes(8) + (31 * MIB).to_bytes(4, "big"))
                guest.wire.write(bytes(MIB))
            await asyncio.sleep(0.2)
            assert server.budget.used == 31 * MIB
            honest = await host.nbd_guest("disk")
            begun = asyncio.get_running_loop().time()
            await honest.write(0, b"h" * 4096)
            await honest.write(MIB, b"h" * 4 * MIB)
            assert await honest.read(MIB, 4 * MIB) == b"h" * 4 * MIB
            assert asyncio.get_running_loop().time() - begun < 0.5
            # Even one as large as theirs gets its turn: those that hold memory and do nothing are dropped.
            await honest.write(0, b"H" * 16 * MIB)
            assert asyncio.get_running_loop().time() - begun < 60
            assert await honest.read(16 * MIB - 4, 8) == b"HHHH" + bytes(4)

    run(main())


def test_replies_that_nobody_reads_hold_a_bounded_amount_of_memory() -> None:
    async def main() -> None:
        async with SimHost() as host:
            await host.image("disk", NewImage(size=64 * MIB))
            server = host.exports.server = NbdServer([])
            await host.exports.add(options())
            for _ in range(8):
                wire = await _negotiated(host)
                for number in range(32):
                    wire.write(b"\x25\x60\x95\x13" + bytes(4) + number.to_bytes(8, "big") + bytes(8))
                    wire.write((16 * MIB).to_bytes(4, "big"))
            for _ in range(50):
                await asyncio.sleep(0.02)
                assert server.budget.used <= 48 * MIB
            honest = await host.nbd_guest("disk")
            assert await honest.read(0, 4096) == bytes(4096)
            assert len(await honest.read(0, 16 * MIB)) == 16 * MIB

    run(main())


async def _negotiated(host: SimHost) -> Wire:
    """A client that never reads again after GO."""
    guest = NbdGuest(await host.nbd_attach())
    await guest.greet()
    await guest.go("disk")
    guest.wire.transport.pause_reading()
    return guest.wire


def test_fast_zero_is_refused_where_zeroing_means_writing() -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        guest = await host.nbd_guest("disk")
        await guest.zero(0, 4096, flags=CommandFlag.FAST_ZERO)
        assert await guest.read(0, 4096) == bytes(4096)

    scenario(body)


@pytest.mark.parametrize(
    ("at", "length", "is_fast"),
    [(0, 65536, True), (512, 65536, False), (512, 3 * 65536, True), (MIB - 512, 512, False), (7, 0, True)],
)
def test_fast_zero_needs_a_whole_cluster(at: int, length: int, is_fast: bool) -> None:
    """The rest of a cluster must be copied or written, which is what the client does not want to wait for."""

    async def main() -> None:
        async with SimHost() as host:
            await host.image("disk", NewImage(size=MIB))
            host.exports.server = NbdServer([])
            await host.exports.add(options(writable=True))
            guest = await host.nbd_guest("disk")
            await guest.write(0, b"x" * MIB)
            if is_fast:
                await guest.zero(at, length, flags=CommandFlag.FAST_ZERO)
            else:
                with pytest.raises(IoFailure) as refused:
                    await guest.zero(at, length, flags=CommandFlag.FAST_ZERO)
                assert refused.value.errno == errno.ENOTSUP
            assert await guest.read(at, length) == (b"\0" if is_fast else b"x") * length

    run(main())


def test_a_bug_in_a_request_costs_one_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        guest, other = [await host.nbd_guest("disk") for _ in range(2)]

        async def broken(*_: object, **__: object) -> None:
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(type(host.graph.node("disk")), "flush", broken)
            with pytest.raises(IoFailure):
                await guest.flush()
        await other.flush()
        assert "failed unexpectedly" in caplog.text
        await host.exports.remove("e", BlockExportRemoveMode.HARD)

    scenario(body)


def test_spans_of_bitmaps_are_cut_to_the_question() -> None:
    async def body(host: SimHost, server: NbdServer) -> None:
        node = host.graph.node("disk")
        bitmap = NodeBitmap(map=DirtyBitmap(MIB, 65536), name="b0")
        bitmap.record(Span(65536, 1))
        node.attach_bitmap(bitmap)
        export = await host.exports.add(options("b", name="b", writable=True, bitmaps=["b0"]))
        assert isinstance(export, NbdExport) and repr(export) == "<NbdExport b of disk>"
        guest = await host.nbd_guest("b", contexts=["qemu:dirty-bitmap:b0"])
        found = await guest.status(70_000, 100_000)
        assert found == {"qemu:dirty-bitmap:b0": [Extent(131_072 - 70_000, 1), Extent(170_000 - 131_072, 0)]}

    scenario(body)


@pytest.mark.parametrize("style", BOTH)
@pytest.mark.parametrize("cached_share", [0.0, 0.7, 1.0])
def test_requests_in_one_piece_are_carried_out_in_order_and_counted(
    style: dict[str, bool], cached_share: float
) -> None:
    """Most are plain, some are not, one fails, some are refused; all is as if they had come one by one."""

    async def main() -> None:
        async with SimHost(cached_share=cached_share) as host:
            node = await host.disk("disk", CONTENT)
            host.exports.server = NbdServer([])
            await host.exports.add(options(writable=True))
            guest = await host.nbd_guest("disk", **style)
            host.faults["disk"].add(Fault(nth=3, operation=Operation.WRITE, errno=errno.ENOSPC))
            writes = [guest.write(number * 8192, bytes([number]) * 512, fua=number == 5) for number in range(8)]
            odd = [guest.read(MIB - 1, 2), guest.zero(500_000, 512), guest.flush(), guest.read(100, 70_000)]
            done = await asyncio.gather(*writes, *odd, return_exceptions=True)
            assert [type(each) for each in done[:8]].count(IoFailure) == 1
            assert isinstance(done[8], IoFailure) and done[9] is None and done[10] is None
            read = await asyncio.gather(*(guest.read(number * 8192, 512) for number in range(8)))
            for number, content in enumerate(read):
                before = CONTENT[number * 8192 :][:512]
                assert content == (before if isinstance(done[number], IoFailure) else bytes([number]) * 512)
            tally = node.tally
            assert (tally.of("write").operations, tally.of("write").failed) == (7, 1)
            assert (tally.of("read").operations, tally.of("read").size_bytes) == (9, 70_000 + 8 * 512)
            assert tally.write_end == 7 * 8192 + 512 or tally.write_end == 500_512
            await guest.close()

    run(main())
