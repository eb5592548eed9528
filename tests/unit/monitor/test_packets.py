"""What a session costs: packets and turns, counted, without a clock."""

import asyncio
import json
from typing import Any

import pytest

from blockjobs.base.bus import Bus
from blockjobs.base.clock import SystemClock
from blockjobs.monitor.commands import control as commands
from blockjobs.monitor.session import Lock, Service, Session
from blockjobs.schema.command import Event, Registry

registry = Registry()
registry.command(since="1.0", name="qmp_capabilities", takes_session=True)(commands.qmp_capabilities)


@registry.event("TOCK", since="1.0")
class Tock(Event, frozen=True, kw_only=True):
    """Something happened."""

    number: int


@registry.command(since="1.0")
async def tock(host: Bus, *, times: int) -> None:
    """Publish events before the reply.

    Args:
        times: how many.
    """
    for number in range(times):
        host.publish(Tock(number=number))


@registry.command(since="1.0", waits=False)
def look(host: Bus, *, number: int) -> list[int]:
    """Answer at once, after an event.

    Args:
        number: what to answer; 0 is an error of the program.
    """
    host.publish(Tock(number=number))
    return [6 // number]


class Pipe(asyncio.Transport):
    """Takes packets."""

    def __init__(self) -> None:
        super().__init__()
        self.packets: list[bytes] = []
        self.switches = 0

    def write(self, data: Any) -> None:
        self.packets.append(bytes(data))

    def pause_reading(self) -> None:
        self.switches += 1

    resume_reading = pause_reading

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        pass

    close = abort


async def negotiated(control: Lock | None = None) -> tuple[Session, Pipe, Bus, "asyncio.Task[None]"]:
    bus = Bus()
    control = control or asyncio.Lock()
    service = Service(host=bus, bus=bus, clock=SystemClock(), control=control, registry=registry)
    session, pipe = Session(service), Pipe()
    session.connection_made(pipe)
    task = asyncio.create_task(session.run())
    await asyncio.sleep(0)
    session.data_received(b'{"execute": "qmp_capabilities"}')
    await turns(5)
    pipe.packets.clear()
    return session, pipe, bus, task


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def left(session: Session, task: "asyncio.Task[None]") -> None:
    session.finish()
    session.connection_lost(None)
    await task


def lines(packet: bytes) -> list[Any]:
    return [json.loads(line) for line in packet.splitlines()]


def test_a_reply_leaves_at_once_together_with_the_events_before_it() -> None:
    async def scenario() -> None:
        session, pipe, _, task = await negotiated()
        session.data_received(b'{"execute": "tock", "arguments": {"times": 3}}')
        await turns(1)
        [packet] = pipe.packets
        *events, reply = lines(packet)
        assert [event["data"]["number"] for event in events] == [0, 1, 2]
        assert reply == {"return": {}}
        assert pipe.switches == 0, "a lone request changes nothing about what the loop waits for"
        await left(session, task)

    asyncio.run(scenario())


def test_events_of_one_turn_are_one_packet() -> None:
    async def scenario() -> None:
        session, pipe, bus, task = await negotiated()
        for number in range(5):
            bus.publish(Tock(number=number))
        await turns(1)
        bus.publish(Tock(number=5))
        await turns(1)
        assert [[event["data"]["number"] for event in lines(packet)] for packet in pipe.packets] == [
            [0, 1, 2, 3, 4],
            [5],
        ]
        await left(session, task)

    asyncio.run(scenario())


def test_what_arrives_while_a_request_waits_stops_the_reading_until_it_is_done() -> None:
    async def scenario() -> None:
        session, pipe, _, task = await negotiated()
        request = b'{"execute": "tock", "arguments": {"times": 0}}'
        session.data_received(request)
        session.data_received(request + request)
        assert pipe.switches == 1
        await turns(10)
        assert pipe.switches == 2
        assert sum(len(lines(packet)) for packet in pipe.packets) == 3
        await left(session, task)

    asyncio.run(scenario())


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_a_request_in_pieces_is_one_request(pieces: int) -> None:
    async def scenario() -> None:
        session, pipe, _, task = await negotiated()
        request = b'{"execute": "tock", "arguments": {"times": 0}, "id": 7}'
        size = -(-len(request) // pieces)
        for at in range(0, len(request), size):
            session.data_received(request[at : at + size])
        await turns(10)
        assert [line for packet in pipe.packets for line in lines(packet)] == [{"return": {}, "id": 7}]
        await left(session, task)

    asyncio.run(scenario())


def look_for(number: int) -> bytes:
    return b'{"execute": "look", "arguments": {"number": %d}, "id": [%d]}' % (number, number)


def test_a_command_that_never_waits_is_answered_where_its_request_arrives() -> None:
    async def scenario() -> None:
        session, pipe, bus, task = await negotiated()
        bus.publish(Tock(number=9))
        for number in (2, 3):
            session.data_received(look_for(number))
        assert [[line.get("return") or line["data"]["number"] for line in lines(each)] for each in pipe.packets] == [
            [9, 2, [3]],
            [3, [2]],
        ]
        assert [lines(each)[-1]["id"] for each in pipe.packets] == [[2], [3]]
        pipe.packets.clear()
        session.data_received(look_for(0))
        [error] = [line["error"] for line in lines(pipe.packets[0]) if "error" in line]
        assert error["desc"].startswith("Internal error: ZeroDivisionError")
        session.data_received(b'{"execute": "look", "id": 4}')
        [refusal] = lines(pipe.packets[1])
        assert refusal == {"error": {"class": "GenericError", "desc": "Parameter 'number' is missing"}, "id": 4}
        await left(session, task)

    asyncio.run(scenario())


def test_several_in_one_packet_are_answered_there_up_to_the_first_that_may_wait() -> None:
    async def scenario() -> None:
        session, pipe, _, task = await negotiated()
        session.data_received(look_for(1) + look_for(2) + b"{]" + look_for(3))
        assert [line for packet in pipe.packets for line in lines(packet) if "event" not in line] == [
            {"return": [6], "id": [1]},
            {"return": [3], "id": [2]},
            {"error": {"class": "GenericError", "desc": "JSON parse error, expecting value"}},
            {"return": [2], "id": [3]},
        ]
        pipe.packets.clear()
        session.data_received(look_for(6) + b'{"execute": "tock", "arguments": {"times": 1}, "id": 5}' + look_for(3))
        assert [lines(each)[-1] for each in pipe.packets] == [{"return": [1], "id": [6]}]
        await turns(10)
        replies = [line for packet in pipe.packets for line in lines(packet) if "return" in line]
        assert replies == [{"return": [1], "id": [6]}, {"return": {}, "id": 5}, {"return": [2], "id": [3]}]
        await left(session, task)

    asyncio.run(scenario())


def test_a_packet_of_many_requests_lets_others_run_meanwhile() -> None:
    async def scenario() -> None:
        session, pipe, _, task = await negotiated()
        session.data_received(look_for(1) * 100)
        at_once = sum("return" in line for packet in pipe.packets for line in lines(packet))
        assert at_once == 16
        await turns(100)
        assert sum("return" in line for packet in pipe.packets for line in lines(packet)) == 100
        await left(session, task)

    asyncio.run(scenario())


def test_it_waits_for_the_control_lock_and_for_earlier_requests() -> None:
    async def scenario() -> None:
        control = asyncio.Lock()
        session, pipe, _, task = await negotiated(control)
        async with control:
            session.data_received(look_for(1))
            session.data_received(look_for(2))
            await turns(5)
            assert pipe.packets == []
        await turns(10)
        assert [lines(each)[-1] for each in pipe.packets] == [{"return": [6], "id": [1]}, {"return": [3], "id": [2]}]
        pipe.packets.clear()
        session.data_received(b'{"execute": "tock", "arguments": {"times": 0}}')
        session.data_received(look_for(3))
        await turns(10)
        assert [lines(each)[-1]["return"] for each in pipe.packets] == [{}, [2]]
        await left(session, task)

    asyncio.run(scenario())


def test_a_client_that_does_not_read_its_answers_gets_no_more_of_them() -> None:
    async def scenario() -> None:
        session, pipe, _, task = await negotiated()
        session.data_received(look_for(1))
        session.pause_writing()
        for number in (2, 3):
            session.data_received(look_for(number))
        await turns(10)
        assert len(pipe.packets) == 1
        assert pipe.switches == 1
        session.resume_writing()
        await turns(20)
        assert [lines(each)[-1]["id"] for each in pipe.packets] == [[1], [2], [3]]
        session.pause_writing()
        session.data_received(look_for(6))
        await turns(3)
        session.finish()
        session.resume_writing()
        await turns(10)
        assert len(pipe.packets) == 3
        await left(session, task)

    asyncio.run(scenario())
