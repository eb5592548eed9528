"""The nbd driver against a well-behaved server in memory: every request, the limits, the names."""

import asyncio
import errno
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.span import Span
from blockjobs.block.node import Node
from blockjobs.block.vocabulary import Kind, ZeroMode
from blockjobs.testing.clock import run
from blockjobs.testing.little_host import LittleHost
from blockjobs.testing.nbd import ALL_FLAGS, MemoryNbdServer, MemoryStream
from blockjobs.wire.nbd import Command, CommandFlag, TransmissionFlag
from blockjobs.wire.nbd_options import BlockSizes
from blockjobs.wire.nbd_requests import Request

KIB = 1024


@asynccontextmanager
async def connected(server: MemoryNbdServer, **options: object) -> AsyncIterator[Node]:
    async with LittleHost() as host:
        host.graph.dial = server.dial
        node = await host.add(**server.options(**options))
        if not node.read_only:
            await host.guest(node)
        yield node


def scenario(server: MemoryNbdServer, work: "Coroutine[object, object, None] | object", **options: object) -> None:
    async def inside() -> None:
        async with connected(server, **options) as node:
            await work(node)

    run(inside())


@pytest.mark.parametrize(("structured", "extended"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("piece", [1, 7, 1 << 30])
def test_requests_of_every_kind(structured: bool, extended: bool, piece: int) -> None:
    server = MemoryNbdServer(bytes(range(256)) * 64, structured=structured, extended=extended, piece=piece)
    server.zero_runs = [(4096, 4096)]

    async def work(node: Node) -> None:
        assert node.length == 16 * KIB
        assert await node.read(255, 3) == b"\xff\x00\x01"
        await node.write(1000, b"hello", fua=True)
        assert await node.read(998, 9) == b"\xe6\xe7hello\xed\xee"
        await node.zero(Span(0, 512))
        await node.zero(Span(512, 512), mode=ZeroMode.KEEP)
        await node.discard(Span(2048, 1024))
        await node.flush()
        whole = await node.read(0, node.length)
        assert whole == bytes(server.content)
        kinds = [(segment.at, segment.length, segment.kind) for segment in await node.status(Span(0, node.length))]
        tells = structured or extended
        zero = Kind.ZERO if tells else Kind.DATA
        if tells:
            assert kinds == [(0, 4096, Kind.DATA), (4096, 4096, zero), (8192, 8192, Kind.DATA)]
        else:
            assert kinds == [(0, 16 * KIB, Kind.DATA)]

    scenario(server, work, discard="unmap")
    commands = [(request.command, request.flags) for request in server.requests]
    assert (Command.WRITE, CommandFlag.FUA) in commands
    assert (Command.WRITE_ZEROES, 0) in commands
    assert (Command.WRITE_ZEROES, CommandFlag.NO_HOLE) in commands
    assert (Command.TRIM, 0) in commands
    assert (Command.FLUSH, 0) in commands


def test_a_server_that_can_do_little() -> None:
    server = MemoryNbdServer(b"x" * 16 * KIB, structured=False, flags=TransmissionFlag.HAS_FLAGS)

    async def work(node: Node) -> None:
        await node.zero(Span(100, 5000))
        await node.discard(Span(0, 8192))
        await node.write(0, b"a", fua=True)
        await node.flush()

    scenario(server, work, discard="unmap")
    assert {request.command for request in server.requests} == {Command.READ, Command.WRITE, Command.DISCONNECT}
    assert bytes(server.content) == b"a" + b"x" * 99 + bytes(5000) + b"x" * (16 * KIB - 5100)


def test_without_fua_a_flush_follows() -> None:
    server = MemoryNbdServer(bytes(4096), flags=ALL_FLAGS & ~TransmissionFlag.SEND_FUA)

    async def work(node: Node) -> None:
        await node.write(0, b"a" * 512, fua=True)

    scenario(server, work)
    assert [request.command for request in server.requests] == [Command.WRITE, Command.FLUSH, Command.DISCONNECT]


def test_the_servers_block_sizes_are_kept() -> None:
    server = MemoryNbdServer(bytes(64 * KIB), sizes=BlockSizes(512, 4096, 8192))

    async def work(node: Node) -> None:
        await node.write(100, b"m" * 20_000)
        await node.write(0, b"n" * 10)
        await node.zero(Span(1000, 20_000))
        assert await node.read(99, 3) == b"\0mm"
        await node.status(Span(5, 10))
        whole = b"n" * 10 + bytes(90) + b"m" * 900 + bytes(20_000)
        assert await node.read(0, len(whole)) == whole

    scenario(server, work)
    for request in server.requests:
        assert request.at % 512 == 0 and request.length % 512 == 0 and request.length <= 8192, request


@given(
    sizes=st.sampled_from([(1, 512, 1024), (512, 512, 512), (1, 4096, 1 << 20)]),
    changes=st.lists(st.tuples(st.integers(0, 8191), st.integers(1, 4000), st.sampled_from("wz")), max_size=8),
)
def test_any_changes_arrive(sizes: tuple[int, int, int], changes: list[tuple[int, int, str]]) -> None:
    length = 12 * KIB
    server = MemoryNbdServer(b"-" * length, sizes=BlockSizes(*sizes), piece=600)
    model = bytearray(b"-" * length)

    async def work(node: Node) -> None:
        for index, (at, count, kind) in enumerate(changes):
            content = bytes([index + 1]) * count if kind == "w" else bytes(count)
            model[at : at + count] = content
            await (node.write(at, content) if kind == "w" else node.zero(Span(at, count)))
        assert await node.read(0, length) == model

    scenario(server, work)
    assert server.content == model


@pytest.mark.parametrize("structured", [True, False])
def test_errors_of_the_server_fail_the_request_only(structured: bool) -> None:
    server = MemoryNbdServer(bytes(4096), structured=structured)

    async def answer(stream: MemoryStream, request: Request, payload: bytes) -> None:
        if request.at == 512:
            server.send_error(stream, request, errno.ENOSPC, "full\n" * 10)
        elif request.at == 1024:
            server.send_error(stream, request, 4711)
        else:
            await server.serve(stream, request, payload)

    server.answer = answer

    async def work(node: Node) -> None:
        with pytest.raises(IoFailure) as caught:
            await node.write(512, b"x")
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(IoFailure) as caught:
            await node.read(1024, 1)
        assert caught.value.errno == errno.EINVAL
        assert await node.read(0, 2) == b"\0\0"

    scenario(server, work)
    assert server.connections == 1


def test_requests_overtake_each_other() -> None:
    server = MemoryNbdServer(bytes(range(256)))
    waiting: list[tuple[MemoryStream, Request]] = []

    async def answer(stream: MemoryStream, request: Request, payload: bytes) -> None:
        waiting.append((stream, request))
        if len(waiting) == 3:
            for stream_, request_ in reversed(waiting):
                await server.serve(stream_, request_, b"")

    server.answer = answer

    async def work(node: Node) -> None:

        async with asyncio.TaskGroup() as group:
            reads = [group.create_task(node.read(at, 10)) for at in (0, 100, 200)]
        assert [read.result()[0] for read in reads] == [0, 100, 200]

    scenario(server, work)


def test_a_read_only_export() -> None:
    server = MemoryNbdServer(bytes(512), flags=TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY)

    async def inside() -> None:
        with pytest.raises(UsageError, match=r"^Could not open image: Permission denied$"):
            async with connected(server):
                pass
        async with connected(server, read_only=True) as node:
            assert await node.read(0, 1) == b"\0"
        async with connected(server, auto_read_only=True) as node:
            assert node.read_only

    run(inside())


def test_who_may_write_can_change_if_the_export_lets_us() -> None:
    async def inside() -> None:
        for flags in (ALL_FLAGS, ALL_FLAGS | TransmissionFlag.READ_ONLY):
            server = MemoryNbdServer(bytes(512), flags=flags)
            async with connected(server, read_only=True) as node:
                if flags & TransmissionFlag.READ_ONLY:
                    with pytest.raises(UsageError, match="Can't reopen read-only NBD mount as read/write"):
                        await node.graph.set_read_only(node, read_only=False)
                    assert node.read_only
                else:
                    await node.graph.set_read_only(node, read_only=False)
                    assert not node.read_only

    run(inside())


def test_an_export_keeps_its_length() -> None:
    async def work(node: Node) -> None:
        with pytest.raises(UsageError, match=r"^Cannot grow NBD nodes$"):
            await node.driver.resize(4096)
        await node.driver.resize(512)
        assert node.length == 1024

    scenario(MemoryNbdServer(bytes(1024)), work)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "nbd+unix:///disk?socket=/memory"),
        ({"reconnect-delay": 3, "open-timeout": 2, "read-only": True}, "nbd+unix:///disk?socket=/memory"),
        ({"export": None}, "nbd+unix://?socket=/memory"),
        ({"server": {"type": "inet", "host": "h", "port": "10809"}}, "nbd://h:10809/disk"),
        ({"server": {"type": "inet", "host": "h", "port": "1"}, "export": None}, "nbd://h:1"),
        ({"server": {"type": "inet", "host": "h", "port": "1"}, "export": ""}, "nbd://h:1/"),
        (
            {"server": {"type": "inet", "host": "h", "port": "1", "ipv4": True}, "export": None},
            'json:{"driver": "nbd", "server.type": "inet", '
            '"server.host": "h", "server.port": "1", "server.ipv4": true}',
        ),
    ],
)
def test_names(options: dict[str, object], name: str) -> None:
    async def inside() -> None:
        server = MemoryNbdServer(bytes(512))
        async with LittleHost() as host:
            host.graph.dial = server.dial
            described = {key: value for key, value in (server.options() | options).items() if value is not None}
            assert (await host.add(**described)).filename == name
            raw = await host.add(driver="raw", node_name="r", file="nbd0", read_only=True)
            assert raw.filename == (name if name.startswith("nbd") else raw.filename)

    run(inside())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"export": "x" * 4097}, "export name too long to send to server"),
        ({"x-dirty-bitmap": "x" * 4097}, "x-dirty-bitmap query too long to send to server"),
        ({"tls-creds": "zz"}, "No TLS credentials with id 'zz'"),
        ({"reconnect-delay": -1}, "Parameter 'reconnect-delay' expects uint32_t"),
        ({"server": {"type": "bogus"}}, "Parameter 'type' does not accept value 'bogus'"),
        ({"server": {"type": "unix"}}, "Parameter 'server.path' is missing"),
        ({"server": "x"}, "Invalid parameter type for 'server', expected: object"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], text: str) -> None:
    async def inside() -> None:
        server = MemoryNbdServer(bytes(512))
        async with LittleHost() as host:
            host.graph.dial = server.dial
            with pytest.raises(UsageError) as caught:
                await host.add(**(server.options() | options))
            assert str(caught.value) == text
            assert host.graph.nodes() == []
        assert server.connections == 0

    run(inside())
