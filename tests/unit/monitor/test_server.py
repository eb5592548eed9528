"""The QMP server over real sockets: greeting, order, flow control, abuse, several clients, its end."""

import asyncio
import json
import os
import socket
import stat
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from blockjobs.base.bus import Bus
from blockjobs.base.clock import SystemClock
from blockjobs.base.errors import BlockJobNotFound, UsageError
from blockjobs.monitor.chardev import ConnectingSocket, ListeningSocket
from blockjobs.monitor.client import QmpClient, QmpError
from blockjobs.monitor.commands import control
from blockjobs.monitor.server import Monitor
from blockjobs.monitor.session import Service
from blockjobs.monitor.stdio import Stdio
from blockjobs.schema.command import Event, Registry

registry = Registry()
for declared in (control.qmp_capabilities, control.query_version, control.query_commands, control.quit):
    name = "qmp_capabilities" if declared is control.qmp_capabilities else None
    session_level = declared is not control.quit
    registry.command(since="1.0", name=name, takes_session=session_level)(declared)


@registry.event("TICK", since="1.0")
class Tick(Event, frozen=True, kw_only=True):
    """Something happened."""

    number: int
    text: str | None = None


@registry.event("QUORUM_FAILURE", since="1.0")
class QuorumFailure(Event, frozen=True, kw_only=True):
    """A kind of event that is rate limited."""

    number: int


@dataclass
class Host:
    bus: Bus
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    running: int = 0
    most_running: int = 0
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    async def shutdown(self) -> None:
        self.bus.publish(Tick(number=99))
        self.stopped.set()


@registry.command(since="1.0")
async def tick(host: Host, *, number: int, text: str | None = None) -> None:
    """Publish an event before the reply.

    Args:
        number: of the event.
        text: in the event.
    """
    host.bus.publish(Tick(number=number, text=text))


@registry.command(since="1.0")
async def echo(host: Host, *, value: list[dict[str, int]] | None = None) -> list[dict[str, int]]:
    """Give back.

    Args:
        value: what to give back.
    """
    return value or []


@registry.command(since="1.0")
async def wait(host: Host) -> None:
    """Return when the test says so."""
    host.running += 1
    host.most_running = max(host.most_running, host.running)
    await host.gate.wait()
    host.running -= 1


@registry.command(since="1.0")
async def crash(host: Host, *, how: str) -> None:
    """Fail.

    Args:
        how: in which way.
    """
    if how == "bug":
        raise ZeroDivisionError("first line\nsecond line")
    raise BlockJobNotFound("j")


@dataclass
class Bench:
    host: Host
    service: Service
    path: str
    monitor: Monitor


def on_bench(
    test: Callable[[Bench], Awaitable[None]],
    path: Path,
    **options: Any,
) -> None:
    """Run `test` against a monitor that listens on a unix socket."""

    async def main() -> None:
        bus = Bus()
        host = Host(bus)
        service = Service(host=host, bus=bus, clock=SystemClock(), control=asyncio.Lock(), registry=registry)
        bench = Bench(host, service, str(path), Monitor(ListeningSocket(path=str(path)), service, **options))
        await bench.monitor.start()
        try:
            await asyncio.wait_for(test(bench), 20)
        finally:
            host.gate.set()
            await bench.monitor.close()
        assert not path.exists()

    asyncio.run(main())


class Raw:
    """A client that sees every line in order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, bench: Bench, *, negotiate: bool = True) -> "Raw":
        raw = cls(*await asyncio.open_unix_connection(bench.path, limit=2**24))
        if negotiate:
            await raw.line()
            assert await raw.ask("qmp_capabilities") == {"return": {}}
        return raw

    def send(self, text: str | bytes) -> None:
        self.writer.write(text.encode() if isinstance(text, str) else text)

    async def line(self) -> Any:
        line = await self.reader.readline()
        return json.loads(line) if line else None

    async def ask(self, command: str, **arguments: Any) -> Any:
        self.send(json.dumps({"execute": command, "arguments": arguments}))
        return await self.line()

    async def end(self) -> bytes:
        """What comes until the server hangs up; a reset counts."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""
        finally:
            self.close()

    def close(self) -> None:
        self.writer.close()


def test_greeting_and_negotiation(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        raw = await Raw.connect(bench, negotiate=False)
        line = await raw.reader.readline()
        assert line.endswith(b"\r\n")
        assert json.loads(line) == {
            "QMP": {
                "version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "blockjobs"},
                "capabilities": ["oob"],
            }
        }
        raw.send('{"execute":"query-version","id":null}')
        assert await raw.line() == {
            "error": {
                "class": "CommandNotFound",
                "desc": "Expecting capabilities negotiation with 'qmp_capabilities'",
            },
            "id": None,
        }
        bench.host.bus.publish(Tick(number=1))  # is not queued for later either
        assert await raw.ask("qmp_capabilities") == {"return": {}}
        again = await raw.ask("qmp_capabilities")
        assert again["error"]["desc"] == "Capabilities negotiation is already complete, command ignored"
        bench.host.bus.publish(Tick(number=2))
        event = await raw.line()
        assert event["event"] == "TICK"
        assert event["data"] == {"number": 2}
        assert abs(event["timestamp"]["seconds"] - time.time()) < 60
        assert 0 <= event["timestamp"]["microseconds"] < 10**6
        raw.close()

    on_bench(scenario, tmp_path / "qmp")


def test_replies_keep_their_order_and_place_among_events(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        raw = await Raw.connect(bench)
        raw.send("".join(f"{{'execute':'tick','arguments':{{'number':{n}}},'id':{n}}}" for n in range(20)))
        for number in range(20):
            assert (await raw.line())["data"] == {"number": number}
            assert await raw.line() == {"return": {}, "id": number}
        raw.close()

    on_bench(scenario, tmp_path / "qmp")


def test_errors_have_class_and_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(bench: Bench) -> None:
        raw = await Raw.connect(bench)
        assert await raw.ask("crash", how="well") == {
            "error": {"class": "DeviceNotActive", "desc": "Block job 'j' not found"}
        }
        assert await raw.ask("crash", how="bug") == {
            "error": {"class": "GenericError", "desc": "Internal error: ZeroDivisionError: first line"}
        }
        assert "Traceback" in caplog.text
        assert await raw.ask("echo", value=[{"a": 1}]) == {"return": [{"a": 1}]}
        raw.send("nonsense")
        raw.send("\n")
        assert (await raw.line())["error"]["desc"] == "JSON parse error, invalid keyword 'nonsense'"
        assert await raw.ask("echo") == {"return": []}
        raw.close()

    on_bench(scenario, tmp_path / "qmp")


def test_commands_of_several_monitors_never_overlap(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        other = Monitor(ListeningSocket(path=bench.path + "2"), bench.service)
        await other.start()
        first = await Raw.connect(bench)
        bench.path += "2"
        second = await Raw.connect(bench)
        for raw in (first, second):
            raw.send('{"execute":"wait"}')
        await asyncio.sleep(0.05)
        assert bench.host.most_running == 1
        bench.host.gate.set()
        assert await first.line() == await second.line() == {"return": {}}
        assert bench.host.most_running == 1
        bench.host.bus.publish(Tick(number=5))
        assert (await first.line())["data"] == (await second.line())["data"] == {"number": 5}
        first.close()
        await other.close()
        assert await second.end() == b""

    on_bench(scenario, tmp_path / "qmp")


def test_a_second_client_waits_for_the_first(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        first = await Raw.connect(bench)
        second = await Raw.connect(bench, negotiate=False)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(second.reader.readline(), 0.1)
        first.close()
        assert "QMP" in await second.line()
        assert "error" in await second.ask("echo"), "each client negotiates anew"
        second.close()

    on_bench(scenario, tmp_path / "qmp")


def test_half_close_still_gets_replies(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        raw = await Raw.connect(bench)
        raw.send("{'execute':'echo','id':1}{'execute':'echo','id':2}")
        raw.writer.write_eof()
        assert (await raw.end()).count(b'"return"') == 2

    on_bench(scenario, tmp_path / "qmp")


def test_a_client_that_left_loses_its_reply_only(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        raw = await Raw.connect(bench)
        raw.send("{'execute':'wait'}")
        await asyncio.sleep(0.05)
        raw.close()
        bench.host.gate.set()
        again = await Raw.connect(bench)
        assert await again.ask("echo") == {"return": []}
        assert bench.host.running == 0
        again.close()

    on_bench(scenario, tmp_path / "qmp")


def test_a_client_that_never_reads_is_dropped_and_others_live(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        other = Monitor(ListeningSocket(path=bench.path + "2"), bench.service)
        await other.start()
        silent = await Raw.connect(bench)
        silent.writer.transport.pause_reading()
        bench.path += "2"
        reader = await Raw.connect(bench)
        text = "x" * 60_000
        for number in range(200):
            bench.host.bus.publish(Tick(number=number, text=text))
            line = await reader.line()
            assert line["data"]["number"] == number
        silent.writer.transport.resume_reading()
        assert len(await silent.end()) < 200 * 60_000
        bench.path = bench.path[:-1]
        again = await Raw.connect(bench)
        assert await again.ask("echo") == {"return": []}
        again.close()
        reader.close()
        await other.close()

    on_bench(scenario, tmp_path / "qmp")


def test_a_client_that_floods_commands_without_reading_is_only_slowed_down(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        raw = await Raw.connect(bench)
        value = [{"abcdefgh": n} for n in range(8000)]
        request = json.dumps({"execute": "echo", "arguments": {"value": value}}).encode()
        raw.writer.transport.pause_reading()
        for _ in range(20):
            raw.send(request)
        await asyncio.sleep(0.2)
        raw.writer.transport.resume_reading()
        for _ in range(20):
            assert len((await raw.line())["return"]) == 8000
        raw.close()

    on_bench(scenario, tmp_path / "qmp")


@pytest.mark.parametrize(
    "opening", [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\n\nPOST", b"\x16\x03\x01", b"[1]"]
)
def test_what_does_not_begin_like_qmp_is_closed(tmp_path: Path, opening: bytes) -> None:
    async def scenario(bench: Bench) -> None:
        raw = await Raw.connect(bench, negotiate=False)
        raw.send(opening)
        await raw.end()
        again = await Raw.connect(bench)
        again.send("]")  # later nonsense is answered
        assert (await again.line())["error"]["desc"] == "JSON parse error, expecting value"
        again.close()

    on_bench(scenario, tmp_path / "qmp")


@pytest.mark.serial
def test_a_megabyte_is_quick(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        raw = await Raw.connect(bench)
        value = [{"abcdefgh": n, "ijklmnop": n} for n in range(28_000)]
        request = json.dumps({"execute": "echo", "arguments": {"value": value}, "id": 1}).encode()
        assert len(request) > 2**20
        before_s = time.process_time()
        raw.send(request)
        line = await raw.reader.readline()
        took_s = time.process_time() - before_s
        assert line.startswith(b'{"return"')
        # The client's share of the time is in it: the same bytes through the same event loop.
        assert took_s < 0.6, f"{took_s:.2f} s"
        raw.close()

    on_bench(scenario, tmp_path / "qmp")


def test_unix_socket_is_private_and_removed(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        assert stat.S_IMODE(os.stat(bench.path).st_mode) == 0o600

    (tmp_path / "qmp").touch()
    with pytest.raises(UsageError, match=r"Failed to bind socket to .*: Address already in use"):
        on_bench(scenario, tmp_path / "qmp")
    (tmp_path / "qmp").unlink()
    left_over = socket.socket(socket.AF_UNIX)
    left_over.bind(str(tmp_path / "qmp"))
    left_over.close()
    on_bench(scenario, tmp_path / "qmp")


def test_quit_replies_after_the_events_and_before_the_end(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        raw = await Raw.connect(bench)
        raw.send('{"execute":"quit","id":1}{"execute":"echo","id":2}')
        await bench.host.stopped.wait()
        await bench.monitor.close()
        lines = [json.loads(line) for line in (await raw.end()).splitlines()]
        assert lines[0]["data"] == {"number": 99}
        assert lines[1] == {"return": {}, "id": 1}

    on_bench(scenario, tmp_path / "qmp")


def test_rate_limited_events(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        raw = await Raw.connect(bench)
        for number in range(5):
            bench.host.bus.publish(QuorumFailure(number=number))
            bench.host.bus.publish(Tick(number=number))
        seen = [((line := await raw.line())["event"], line["data"]["number"]) for _ in range(7)]
        assert seen == [("QUORUM_FAILURE", 0), *(("TICK", n) for n in range(5)), ("QUORUM_FAILURE", 4)]
        raw.close()

    on_bench(scenario, tmp_path / "qmp")


def test_pretty(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        raw = await Raw.connect(bench, negotiate=False)
        assert await raw.reader.readline() == b"{\n"
        assert (await raw.reader.readline()).startswith(b'    "QMP": {')
        raw.close()
        client = await QmpClient.connect(bench.path)
        assert await client.execute("echo") == []
        await client.close()

    on_bench(scenario, tmp_path / "qmp", pretty=True)


def test_client(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        async with await QmpClient.connect(bench.path) as client:
            assert client.greeting["capabilities"] == ["oob"]
            assert {"name": "query-version"} in await client.execute("query-commands")
            await client.execute("tick", number=7, text=None)
            event = await client.event()
            assert event is not None and event["data"] == {"number": 7}
            with pytest.raises(QmpError, match=r"^Block job 'j' not found$") as caught:
                await client.execute("crash", how="well")
            assert caught.value.qmp_class == "DeviceNotActive"
            with pytest.raises(QmpError, match="Parameter 'how' is missing"):
                await client.command("crash")

    on_bench(scenario, tmp_path / "qmp")


def test_tcp_and_connecting_out() -> None:
    async def main() -> None:
        bus = Bus()
        service = Service(host=Host(bus), bus=bus, clock=SystemClock(), control=asyncio.Lock(), registry=registry)
        chardev = ListeningSocket(host="127.0.0.1", port=0)
        monitor = Monitor(chardev, service)
        await monitor.start()
        host, port = chardev.address
        async with await QmpClient.connect(f"{host}:{port}") as client:
            assert await client.execute("echo") == []
        await monitor.close()

        greeted: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            greeted.set_result(await reader.readline())
            writer.close()

        with pytest.raises(UsageError, match=f"Failed to connect to '127.0.0.1:{port}': Connection refused"):
            await Monitor(ConnectingSocket(service.clock, host="127.0.0.1", port=port), service).start()
        server = await asyncio.start_server(on_client, "127.0.0.1", 0)
        out = Monitor(
            ConnectingSocket(service.clock, host="127.0.0.1", port=server.sockets[0].getsockname()[1]), service
        )
        await out.start(wait_for_client=True)
        assert b'"QMP"' in await greeted
        await out.close()
        server.close()

    asyncio.run(main())


def test_stdio() -> None:
    async def main() -> None:
        bus = Bus()
        service = Service(host=Host(bus), bus=bus, clock=SystemClock(), control=asyncio.Lock(), registry=registry)
        ours_in, theirs_in = os.pipe()
        theirs_out, ours_out = os.pipe()
        monitor = Monitor(Stdio(input_fd=ours_in, output_fd=ours_out), service)
        await monitor.start()
        os.write(theirs_in, b"nonsense\n{'execute':'qmp_capabilities'}{'execute':'echo'}")
        os.close(theirs_in)
        await asyncio.sleep(0.1)
        await monitor.close()
        lines = os.read(theirs_out, 65536).splitlines()
        assert [next(iter(json.loads(line))) for line in lines] == ["QMP", "error", "return", "return"]
        for fd in (ours_in, ours_out, theirs_out):
            os.close(fd)

    asyncio.run(main())
