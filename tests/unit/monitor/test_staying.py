"""What a session does with the socket itself: answers past the transport, and looks for the next query."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
from test_packets import Pipe, lines

from blockjobs.base.bus import Bus
from blockjobs.base.clock import SystemClock
from blockjobs.base.patience import LOOKS_MAX
from blockjobs.monitor.commands import control as commands
from blockjobs.monitor.session import LATE_LOOKS_MAX, STAY_QUERIES_MAX, Service, Session
from blockjobs.schema.command import Event, Registry

registry = Registry()
registry.command(since="1.0", name="qmp_capabilities", takes_session=True)(commands.qmp_capabilities)


@registry.command(since="1.0", name="query-number", waits=False)
def query_number(host: Bus, *, number: int) -> list[int]:
    """Answer.

    Args:
        number: with it.
    """
    return [number]


@registry.command(since="1.0", waits=False)
def do(host: Bus, *, number: int) -> list[int]:
    """Do something.

    Args:
        number: the answer.
    """
    return [number]


@registry.command(since="1.0", name="query-late")
async def query_late(host: Bus, *, number: int) -> list[int]:
    """Answer later.

    Args:
        number: with it.
    """
    await asyncio.sleep(0)
    return [number]


class Happened(Event, frozen=True):
    """Something that nobody asked for."""

    event_name = "HAPPENED"


class Socket:
    """Receives by a script, and takes so many bytes."""

    def __init__(self) -> None:
        self.script: list[bytes | type[OSError]] = []
        self.looks = 0
        self.takes = 1 << 20
        self.sent = b""

    def recv(self, length: int) -> bytes:
        self.looks += 1
        data = self.script.pop(0) if self.script else BlockingIOError
        if isinstance(data, type):
            raise data
        assert len(data) <= length
        return data

    def send(self, data: bytes) -> int:
        if not self.takes:
            raise BlockingIOError
        taken = data[: self.takes]
        self.sent += taken
        return len(taken)


class Queue(Pipe):
    """Has something to send already, if told so."""

    waiting = 0

    def get_write_buffer_size(self) -> int:
        return self.waiting


class Scene:
    def __init__(self) -> None:
        self.bus = bus = Bus()
        self.is_busy = False
        self.sock, self.pipe = Socket(), Queue()
        self.session = Session(
            Service(
                host=bus,
                bus=bus,
                clock=SystemClock(),
                control=asyncio.Lock(),
                registry=registry,
                is_busy=lambda: self.is_busy,
            )
        )
        self.session.sock = cast("Any", self.sock)

    def replies(self) -> list[Any]:
        found = [line["return"] for packet in (self.sock.sent, *self.pipe.packets) for line in lines(packet)]
        self.sock.sent = b""
        self.pipe.packets.clear()
        return found


def scenario(*steps: Callable[[Scene], None]) -> None:
    async def main() -> None:
        scene = Scene()
        scene.session.connection_made(scene.pipe)
        task = asyncio.create_task(scene.session.run())
        await asyncio.sleep(0)
        scene.is_busy = True
        scene.session.data_received(b'{"execute": "qmp_capabilities"}')
        for _ in range(5):
            await asyncio.sleep(0)
        assert not scene.sock.looks
        scene.is_busy = False
        scene.sock.sent = b""
        for step in steps:
            step(scene)
            for _ in range(5):
                await asyncio.sleep(0)
        scene.session.finish()
        scene.session.connection_lost(None)
        await task

    asyncio.run(main())


def asking(command: str, number: int) -> bytes:
    return b'{"execute": "%s", "arguments": {"number": %d}}' % (command.encode(), number)


def test_queries_that_come_at_once_are_answered_without_the_loop() -> None:
    def body(scene: Scene) -> None:
        second = asking("query-number", 2)
        scene.sock.script = [BlockingIOError, second[:7], second[7:] + asking("query-number", 3)]
        scene.session.data_received(asking("query-number", 1))
        assert scene.sock.looks == 3 + LOOKS_MAX
        assert scene.replies() == [[1], [2], [3]]

    scenario(body)


@pytest.mark.parametrize("last", ["do", "query-late"])
def test_nobody_looks_at_once_behind_what_leaves_something_to_do(last: str) -> None:
    def body(scene: Scene) -> None:
        scene.sock.script = [asking(last, 2), BlockingIOError, asking("query-number", 3)]
        scene.session.data_received(asking("query-number", 1))
        assert scene.sock.looks == 1
        scene.session.data_received(asking("do", 4) + asking("query-number", 5))
        assert scene.sock.looks == 1, "a command before the query, in the same packet"

    def then(scene: Scene) -> None:
        late = [[3]] if last == "do" else []
        assert scene.replies() == [[1], [2], [4], [5], *late]

    scenario(body, then)


def test_what_comes_next_is_looked_for_when_the_last_command_has_begun() -> None:
    def body(scene: Scene) -> None:
        scene.sock.script = [BlockingIOError, asking("do", 2), asking("query-late", 3)]
        scene.session.data_received(asking("do", 1))
        assert not scene.sock.looks

    def then(scene: Scene) -> None:
        assert scene.replies() == [[1], [2], [3]]
        assert scene.sock.looks == 3, "behind what waits nobody looks"

    scenario(body, then)


def test_what_a_command_has_begun_goes_before_a_look_that_was_due_earlier() -> None:
    def body(scene: Scene) -> None:
        def begin() -> None:
            scene.is_busy = True

        scene.session.data_received(asking("do", 1))
        asyncio.get_running_loop().call_soon(begin)  # as the second command's job would
        scene.session.data_received(asking("do", 2))

    def then(scene: Scene) -> None:
        assert scene.replies() == [[1], [2]]
        assert not scene.sock.looks

    scenario(body, then)


def test_what_a_client_does_about_events_is_looked_for() -> None:
    def body(scene: Scene) -> None:
        scene.sock.script = [BlockingIOError, asking("query-late", 1)]
        scene.bus.publish(Happened())
        scene.bus.publish(Happened())
        assert not scene.sock.looks, "first they have to leave"

    def then(scene: Scene) -> None:
        assert [b'"HAPPENED"' in line for line in scene.sock.sent.splitlines()] == [True, True, False]
        assert lines(scene.sock.sent)[-1] == {"return": [1]}
        assert scene.sock.looks == 2

    scenario(body, then)


def test_a_client_that_only_listens_is_looked_at_ever_more_rarely() -> None:
    looks = []

    def step(scene: Scene) -> None:
        looks.append(scene.sock.looks)
        scene.bus.publish(Happened())

    scenario(*[step] * 6)
    assert looks == [each * LATE_LOOKS_MAX for each in (0, 1, 1, 2, 2, 2)]


def test_events_that_left_with_a_reply_are_no_reason_to_look() -> None:
    def body(scene: Scene) -> None:
        scene.bus.publish(Happened())
        scene.is_busy = True
        scene.session.data_received(asking("query-number", 1))
        scene.is_busy = False
        scene.sock.script = [asking("query-number", 2)]

    def then(scene: Scene) -> None:
        assert not scene.sock.looks

    scenario(body, then)


def test_nobody_looks_while_workers_work() -> None:
    def body(scene: Scene) -> None:
        scene.is_busy = True
        scene.session.data_received(asking("query-number", 1))
        assert not scene.sock.looks
        assert scene.replies() == [[1]]

    scenario(body)


@pytest.mark.parametrize("end", [b"", ConnectionResetError])
def test_the_end_is_left_to_the_loop(end: bytes | type[OSError]) -> None:
    def body(scene: Scene) -> None:
        scene.sock.script = [end, asking("query-number", 2)]
        scene.session.data_received(asking("query-number", 1))
        assert scene.sock.looks == 1
        assert scene.replies() == [[1]]

    scenario(body)


def test_others_have_their_turn_between() -> None:
    def body(scene: Scene) -> None:
        scene.sock.script = [asking("query-number", number) for number in range(2, 15)]
        scene.session.data_received(asking("query-number", 1))
        assert scene.replies() == [[number] for number in range(1, STAY_QUERIES_MAX + 2)]

    def then(scene: Scene) -> None:
        assert scene.replies() == [[number] for number in range(STAY_QUERIES_MAX + 2, 15)]

    scenario(body, then)


def test_what_comes_after_that_and_has_to_wait_has_its_turn() -> None:
    def body(scene: Scene) -> None:
        scene.sock.script = [asking("query-number", number) for number in range(STAY_QUERIES_MAX)]
        scene.sock.script.append(asking("query-late", 7))
        scene.session.data_received(asking("query-number", 1))
        scene.replies()

    def then(scene: Scene) -> None:
        assert scene.replies() == [[7]]

    scenario(body, then)


def test_what_the_socket_does_not_take_goes_through_the_transport() -> None:
    def body(scene: Scene) -> None:
        for takes in (0, 5):
            scene.sock.takes = takes
            scene.session.data_received(asking("query-number", 1))
            whole = b"".join([scene.sock.sent, *scene.pipe.packets])
            assert len(scene.sock.sent) == takes
            assert lines(whole) == [{"return": [1]}]
            scene.sock.sent = b""
            scene.pipe.packets.clear()

    scenario(body)


def test_nothing_goes_past_what_waits_in_the_transport() -> None:
    def body(scene: Scene) -> None:
        scene.pipe.waiting = 1
        scene.session.data_received(asking("query-number", 1))
        assert not scene.sock.sent
        assert scene.replies() == [[1]]

    scenario(body)
