"""Losing a server and finding it again, in virtual time: what waits, for how long, and who lets it go."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.block.dial import dial_socket
from blockjobs.block.drivers.nbd.connection import REQUESTS_IN_FLIGHT_MAX
from blockjobs.block.node import Node
from blockjobs.block.socket_address import InetAddress, InetSocketAddress
from blockjobs.export.listener import listen
from blockjobs.testing.clock import run
from blockjobs.testing.little_host import LittleHost
from blockjobs.testing.nbd import MemoryNbdServer, MemoryStream
from blockjobs.wire.nbd_requests import Request


@asynccontextmanager
async def connected(server: MemoryNbdServer, **options: object) -> AsyncIterator[Node]:
    async with LittleHost() as host:
        host.graph.dial = server.dial
        node = await host.add(**server.options(**options))
        if not node.read_only:
            await host.guest(node)
        yield node


def now() -> float:
    return asyncio.get_running_loop().time()


async def never(stream: MemoryStream, request: Request, payload: bytes) -> None:
    """The server has been stopped: it takes requests and says nothing."""


async def failure(work: "asyncio.Task[object]") -> IoFailure:
    with pytest.raises(IoFailure) as caught:
        await work
    return caught.value


def start(work: object) -> "asyncio.Task[object]":
    return asyncio.get_running_loop().create_task(work)


async def return_after(server: MemoryNbdServer, delay_s: float) -> None:
    server.is_up = False
    server.hang_up()
    await asyncio.sleep(delay_s)
    server.is_up, server.answer = True, server.serve


def test_without_a_delay_requests_fail_at_once() -> None:
    async def scenario() -> None:
        server = MemoryNbdServer(bytes(4096))
        server.answer = never
        async with connected(server) as node:
            stuck = start(node.read(0, 10))
            await asyncio.sleep(1)
            server.is_up = False
            server.hang_up()
            began = now()
            assert (await failure(stuck)).errno == errno.EIO
            assert (await failure(start(node.write(0, b"x")))).errno == errno.EIO
            assert now() == began
            server.is_up, server.answer = True, server.serve
            await asyncio.sleep(10)  # tried again in the background
            assert await node.read(0, 1) == b"\0"

    run(scenario())


def test_requests_are_done_again_over_the_next_connection() -> None:
    async def scenario() -> None:
        server = MemoryNbdServer(bytes(1 << 16))
        server.answer = never
        async with connected(server, reconnect_delay=10) as node:
            writes = [start(node.write(at * 512, bytes([at + 1]) * 512)) for at in range(20)]
            await asyncio.sleep(1)
            assert len(server.requests) == 20
            await return_after(server, 5)
            late = start(node.read(0, 512))
            began = now()
            await asyncio.gather(*writes)
            await late
            assert now() - began < 5
            assert bytes(server.content) == b"".join(bytes([at + 1]) * 512 for at in range(20)) + bytes(
                (1 << 16) - 10240
            )
            assert server.connections == 2

    run(scenario())


def test_the_delay_counts_from_the_loss_and_then_nobody_waits() -> None:
    async def scenario() -> None:
        server = MemoryNbdServer(bytes(4096))
        async with connected(server, reconnect_delay=10) as node:
            await node.read(0, 10)
            server.is_up = False
            server.hang_up()
            began = now()
            await asyncio.sleep(4)
            assert (await failure(start(node.read(0, 10)))).errno == errno.EIO
            assert now() - began == pytest.approx(10, abs=0.01)
            await failure(start(node.read(0, 10)))
            assert now() - began == pytest.approx(10, abs=0.01)
            server.is_up = True
            await asyncio.sleep(10)
            await node.read(0, 10)

    run(scenario())


@pytest.mark.parametrize(("delay", "flushed", "fails"), [(0, False, True), (0, True, False), (30, False, False)])
def test_what_was_acknowledged_and_not_flushed_may_be_lost(delay: int, flushed: bool, fails: bool) -> None:
    """A crashed server takes it along; only who gives a delay vouches for it."""

    async def scenario() -> None:
        server = MemoryNbdServer(bytes(4096))
        async with connected(server, reconnect_delay=delay) as node:
            await node.write(0, b"x" * 512)
            if flushed:
                await node.flush()
            server.hang_up()
            await asyncio.sleep(10)
            await node.write(512, b"y" * 512)
            for _ in range(2):
                if fails:
                    assert (await failure(start(node.flush()))).errno == errno.EIO
                else:
                    await node.flush()

    run(scenario())


def test_a_server_that_takes_us_in_and_hangs_up_does_not_keep_us_busy() -> None:
    async def scenario() -> None:
        server = MemoryNbdServer(bytes(4096))

        async def hang_up(stream: MemoryStream, request: Request, payload: bytes) -> None:
            stream.reset()

        server.answer = hang_up
        async with connected(server, reconnect_delay=60) as node:
            began = now()
            assert (await failure(start(node.read(0, 10)))).errno == errno.EIO
            assert now() - began == pytest.approx(60, abs=6)
            assert server.connections < 30

    run(scenario())


def test_a_server_that_came_back_as_another_is_refused() -> None:
    async def scenario() -> None:
        server = MemoryNbdServer(bytes(4096))
        async with connected(server, reconnect_delay=20) as node:
            server.length = 8192
            server.hang_up()
            assert (await failure(start(node.read(0, 10)))).errno == errno.EIO
            server.length = 4096
            await asyncio.sleep(10)
            await node.read(0, 10)

    run(scenario())


@pytest.mark.parametrize("delay", [0, 1000])
def test_stuck_requests_are_released(delay: int) -> None:
    async def scenario() -> None:
        server = MemoryNbdServer(bytes(1 << 20))
        server.answer = never
        async with connected(server, reconnect_delay=delay) as node:
            stuck = [start(node.write(at * 512, bytes(512))) for at in range(2 * REQUESTS_IN_FLIGHT_MAX)]
            await asyncio.sleep(1)
            server.is_up = False  # the machine is stopped: what connects again hangs
            node.cancel_in_flight()
            began = now()
            for request in stuck:
                assert (await failure(request)).errno == errno.EIO
            assert now() - began < 1
            await failure(start(node.read(0, 1)))
            assert now() - began < 1

    run(scenario())


def test_what_waits_for_a_connection_is_released_at_once() -> None:
    async def scenario() -> None:
        server = MemoryNbdServer(bytes(4096))
        async with connected(server, reconnect_delay=1000) as node:
            server.is_up = False
            server.hang_up()
            waiting = start(node.read(0, 10))
            await asyncio.sleep(7)
            began = now()
            node.cancel_in_flight()
            await failure(waiting)
            assert now() == began
            server.is_up = True
            await asyncio.sleep(10)
            await node.read(0, 10)

    run(scenario())


def test_a_server_that_still_answers_is_not_cut_off() -> None:
    async def scenario() -> None:
        server = MemoryNbdServer(bytes(4096))

        async def slowly(stream: MemoryStream, request: Request, payload: bytes) -> None:
            await asyncio.sleep(0.3)
            await server.serve(stream, request, payload)

        server.answer = slowly
        async with connected(server) as node:
            write = start(node.write(0, b"x" * 512))
            await asyncio.sleep(0.1)
            node.cancel_in_flight()
            await write
            await asyncio.sleep(5)
            await node.read(0, 1)
        assert server.connections == 1

    run(scenario())


def test_closing_lets_everything_fail() -> None:
    async def scenario() -> None:
        server = MemoryNbdServer(bytes(4096))
        server.answer = never
        async with LittleHost() as host:
            host.graph.dial = server.dial
            node = await host.add(**server.options(reconnect_delay=1000))
            stuck = start(node.read(0, 10))
            await asyncio.sleep(1)
            began = now()
            await host.graph.remove("nbd0")
            await failure(stuck)
            assert now() - began < 1

    run(scenario())


def test_opening_waits_as_long_as_it_is_told() -> None:
    async def scenario() -> None:
        server = MemoryNbdServer(bytes(4096))
        server.is_up = False
        async with LittleHost() as host:
            host.graph.dial = server.dial
            with pytest.raises(UsageError, match="Failed to connect to '/memory': Connection refused"):
                await host.add(**server.options())
            assert now() == 0
            with pytest.raises(UsageError, match="Failed to connect to '/memory': Connection refused"):
                await host.add(**server.options(open_timeout=7))
            assert now() == pytest.approx(7, abs=0.01)
            opening = start(host.add(**server.options(open_timeout=7)))
            await asyncio.sleep(3)
            server.is_up = True
            await opening
            assert now() < 14

    run(scenario())


def test_a_request_that_its_caller_gives_up_is_forgotten() -> None:
    async def scenario() -> None:
        server = MemoryNbdServer(bytes(range(256)) * 256, piece=1000)
        async with connected(server) as node:
            buffer = bytearray(1 << 15)
            read = start(node.read_into(0, memoryview(buffer)))
            while buffer[0:2] != b"\0\1":  # it has begun to arrive
                await asyncio.sleep(0)
            read.cancel()
            await asyncio.wait([read])
            kept = bytes(buffer)
            assert await node.read(256, 4) == b"\0\1\2\3"
            assert bytes(buffer) == kept
        assert server.connections == 1

    run(scenario())


def test_requests_that_are_sent_at_once_are_bounded() -> None:
    async def scenario() -> None:
        server = MemoryNbdServer(bytes(1 << 20))
        held: list[tuple[MemoryStream, Request, bytes]] = []

        async def hold(stream: MemoryStream, request: Request, payload: bytes) -> None:
            held.append((stream, request, payload))

        server.answer = hold
        async with connected(server) as node:
            reads = [start(node.read(at * 512, 1)) for at in range(3 * REQUESTS_IN_FLIGHT_MAX)]
            await asyncio.sleep(1)
            assert len(held) == REQUESTS_IN_FLIGHT_MAX
            server.answer = server.serve
            for stream, request, payload in held:
                await server.serve(stream, request, payload)
            await asyncio.gather(*reads)

    run(scenario())


def test_writes_do_not_pile_up_before_a_server_that_does_not_read() -> None:
    async def scenario() -> None:
        server = MemoryNbdServer(bytes(64 << 20))

        async def stand_still(stream: MemoryStream, request: Request, payload: bytes) -> None:
            await asyncio.sleep(1000)

        server.answer = stand_still
        async with connected(server) as node:
            writes = [start(node.write(at << 20, bytes(1 << 20))) for at in range(32)]
            await asyncio.sleep(1)
            assert server.streams[0].unread_bytes < 3 << 20
            node.cancel_in_flight()
            for write in writes:
                assert (await failure(write)).errno == errno.EIO

    run(scenario())


def test_a_number_that_is_no_port_is_refused_and_not_taken_for_another() -> None:
    with pytest.raises(UsageError, match="address resolution failed for localhost:99999: Servname not supported"):
        asyncio.run(dial_socket(InetAddress(host="localhost", port="99999"), asyncio.Protocol()))
    with pytest.raises(UsageError, match="address resolution failed for localhost:99999: Servname not supported"):
        asyncio.run(listen(InetSocketAddress(host="localhost", port="99999")))
