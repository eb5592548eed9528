"""What a connection does past the loop's own buffers, on a scripted socket."""

import asyncio
import socket
from collections.abc import Callable
from typing import cast

import pytest

from blockjobs.base.patience import LOOKS_MAX
from blockjobs.block.node import Node
from blockjobs.export.connection import STAY_RECEIPTS_MAX, Connection
from blockjobs.export.options import NbdExportOptions
from blockjobs.export.server import NbdServer
from blockjobs.testing.clock import run
from blockjobs.testing.host import SimHost
from blockjobs.wire.nbd import Command, HandshakeFlag, Option
from blockjobs.wire.nbd_options import encode_client_flags, encode_option
from blockjobs.wire.nbd_requests import Request, encode_request, encode_simple_reply

CONTENT = bytes(range(256)) * 256


class Transport(asyncio.Transport):
    """Remembers what is written; closes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.unsent_bytes = 0
        self.is_open = True

    def write(self, data: object) -> None:
        assert self.is_open
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.unsent_bytes

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        del high, low

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        self.is_open = False

    abort = close


class Socket:
    """Gives what is in the script, an error or bytes at a time; takes so many bytes of a reply."""

    def __init__(self) -> None:
        self.script: list[bytes | type[OSError]] = []
        self.looks = 0
        self.takes = 1 << 20
        self.sent = bytearray()

    def recv_into(self, room: memoryview) -> int:
        self.looks += 1
        data = self.script.pop(0) if self.script else BlockingIOError
        if isinstance(data, type):
            raise data
        room[: len(data)] = data
        return len(data)

    def send(self, piece: memoryview) -> int:
        return self.sendmsg([piece])

    def sendmsg(self, pieces: list[memoryview]) -> int:
        if not self.takes:
            raise BlockingIOError
        taken = b"".join(pieces)[: self.takes]
        self.sent += taken
        return len(taken)


def reading(number: int) -> bytes:
    return encode_request(Request(0, Command.READ, number, number * 512, 512))


def answers(*numbers: int) -> bytes:
    return b"".join(encode_simple_reply(number) + CONTENT[number * 512 :][:512] for number in numbers)


class Scene:
    """A client in the transmission phase, of an export of a disk whose bytes are all in memory."""

    def __init__(self, connection: Connection, transport: Transport, sock: Socket) -> None:
        self.connection, self.transport, self.sock = connection, transport, sock

    def arrive(self, data: bytes) -> None:
        self.connection.get_buffer(len(data))[: len(data)] = data
        self.connection.buffer_updated(len(data))


def scenario(body: Callable[[Scene, Node], None], *, then: Callable[[Scene], None] = lambda scene: None) -> None:
    async def main() -> None:
        async with SimHost(cached_share=1.0) as host:
            node = await host.disk("disk", CONTENT)
            host.exports.server = server = NbdServer([])
            await host.exports.add(NbdExportOptions(id="e", node_name="disk", writable=True))
            sock, transport = Socket(), Transport()
            connection = Connection(server, cast("socket.socket", sock))
            scene = Scene(connection, transport, sock)
            connection.connection_made(transport)
            scene.arrive(encode_client_flags(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES))
            scene.arrive(encode_option(Option.EXPORT_NAME, b"disk"))
            transport.written.clear()
            scene.arrive(reading(0))  # whoever comes for the first time is not looked for
            assert not sock.looks and sock.sent == answers(0)
            sock.sent.clear()
            body(scene, node)
            await asyncio.sleep(0)
            then(scene)
            connection.connection_lost(None)

    run(main())


def test_requests_that_come_at_once_are_answered_without_the_loop() -> None:
    def body(scene: Scene, node: Node) -> None:
        scene.sock.script = [BlockingIOError, reading(2), reading(3)[:10], reading(3)[10:] + reading(4)]
        scene.arrive(reading(1))
        assert scene.sock.sent == answers(1, 2, 3, 4)
        assert scene.sock.looks == 4 + LOOKS_MAX
        assert node.tally.of("read").operations == 5

    scenario(body)


@pytest.mark.parametrize("end", [b"", ConnectionResetError])
def test_the_end_is_left_to_the_loop(end: bytes | type[OSError]) -> None:
    def body(scene: Scene, node: Node) -> None:
        scene.sock.script = [end, reading(2)]
        scene.arrive(reading(1))
        assert scene.sock.sent == answers(1) and scene.transport.is_open

    scenario(body)


def test_others_get_their_turn_after_so_many() -> None:
    def body(scene: Scene, node: Node) -> None:
        scene.sock.script = [reading(number % 100) for number in range(STAY_RECEIPTS_MAX + 3)]
        scene.arrive(reading(1))
        assert scene.sock.looks == STAY_RECEIPTS_MAX

    def then(scene: Scene) -> None:
        assert not scene.sock.script

    scenario(body, then=then)


def test_nobody_looks_for_a_client_that_left_or_whose_request_is_under_way() -> None:
    def left(scene: Scene, node: Node) -> None:
        scene.arrive(reading(1) + encode_request(Request(0, Command.DISCONNECT, 9, 0, 0)))
        assert not scene.sock.looks and not scene.transport.is_open

    def flushing(scene: Scene, node: Node) -> None:
        scene.arrive(encode_request(Request(0, Command.FLUSH, 9, 0, 0)))
        assert not scene.sock.looks

    scenario(left)
    scenario(flushing)


@pytest.mark.parametrize("takes", [0, 100])
def test_what_the_socket_does_not_take_goes_through_the_loop(takes: int) -> None:
    def body(scene: Scene, node: Node) -> None:
        scene.sock.takes = takes
        scene.arrive(reading(1))
        assert scene.sock.sent + scene.transport.written == answers(1)
        assert len(scene.sock.sent) == takes

    scenario(body)


def test_replies_stay_behind_those_that_wait() -> None:
    def body(scene: Scene, node: Node) -> None:
        scene.transport.unsent_bytes = 10
        scene.arrive(reading(1))
        assert not scene.sock.sent and scene.transport.written == answers(1)

    scenario(body)


def test_a_short_write_waits_in_the_receive_buffer_for_its_rest() -> None:
    """Most clients send header and payload one after the other; a long write has a buffer of its own at once."""

    def body(scene: Scene, node: Node) -> None:
        head = encode_request(Request(0, Command.WRITE, 7, 512, 1024))
        scene.sock.script = [b"x" * 1000, b"x" * 24 + reading(1)]
        scene.arrive(head)
        assert scene.sock.sent == encode_simple_reply(7) + encode_simple_reply(1) + b"x" * 512
        assert node.tally.of("write").operations == 1
        scene.arrive(encode_request(Request(0, Command.WRITE, 8, 0, 40_000)))
        assert scene.connection.get_buffer(-1).nbytes == 40_000

    scenario(body)
