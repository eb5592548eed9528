"""Bad and odd QMP input, sent to the real qemu-storage-daemon and to our server: the same replies, one by one."""

import asyncio
import os
import shutil
import subprocess
from typing import Any

import pytest

from blockjobs.base.bus import Bus
from blockjobs.base.clock import SystemClock
from blockjobs.monitor.commands import control
from blockjobs.monitor.server import Monitor
from blockjobs.monitor.session import Service
from blockjobs.monitor.stdio import Stdio
from blockjobs.schema.command import Registry
from blockjobs.wire.qmp_lines import Scanner, Value

pytestmark = pytest.mark.qemu

registry = Registry()
registry.command(since="0.13", name="qmp_capabilities", takes_session=True)(control.qmp_capabilities)


@registry.command(since="3.0")
async def query_jobs(host: object) -> list[str]:
    """No jobs."""
    return []


@registry.command(since="3.0")
async def job_pause(host: object, *, id: str) -> None:
    """Here for its argument.

    Args:
        id: of a job.
    """


def framed(text: bytes) -> bytes:
    return b'{"execute":"query-jobs","id":' + text + b"}"


UNNEGOTIATED = [
    b'{"execute":"query-jobs","id":1}',
    b'{"execute":"nope","id":1}',
    b'{"foo":1,"id":1}',
    b'{"execute":5,"id":1}',
    b"x",
    b'{"exec-oob":"query-jobs","id":1}',
    b'{"execute":"qmp_capabilities","id":1,"arguments":{"enable":["x"]}}',
    b'{"execute":"qmp_capabilities","id":1,"arguments":{"enable":[5]}}',
    b'{"execute":"qmp_capabilities","id":1,"arguments":{"enable":5}}',
    b'{"execute":"qmp_capabilities","id":1,"arguments":{"y":["x"]}}',
]
BOTH_MODES = [
    b'{"execute":1}',
    b"[1]",
    b"5",
    b'"x"',
    b"null",
    b'{"execute":"query-jobs","id":null}',
    b'{"execute":"nope","id":[1,"a"]}',
    b"{'execute':'query-jobs'}",
    b'{"execute":"query-jobs"}{"execute":"query-jobs","id":2}',
    *(b"}", b"]", b",", b":", b'{"a" 1}', b'{"a":1,}', b"{,}", b"[1,]", b'{"a":1 "b":2}', b"[1 2]", b"foo", b"truex"),
    *(b'{"a":1,"a":2}', b'{"a":1,"a":foo}', b"{{}:1}", b"{1:2}", b"[}", b"{[}]", b'{"a":1]', b'{"a":1}}', b"NULL"),
    *(b'"\\ud83d"', b'"\\x"', b'"\\u12"', b'"\t"', b'"\xff"', b'"\xc0\x81"', b"01", b"[01]", b"-x", b"", b"// x"),
    *(
        b"\x00",
        b'\x00{"execute":"query-jobs","id":7}',
        b'{"exec\x00ute":"query-jobs"}',
        b'{"a": %lld}',
        b"1x",
        b"@ a,b",
    ),
    *map(framed, (b'"\\u12xyz"', b'"\\uFFFF"', b'"\\ud83f\\udfff"', b'"\\ud83d\\ude00"', b'"\\u0000\\/\\b"')),
    *map(framed, (b'"\xc0\x80"', b'"\xef\xbf\xbf"', b'"\xe2\x82"', b'"\\\x01"', b"'\\\"'", b"18446744073709551615")),
    *map(framed, (b"18446744073709551616", b"-9223372036854775809", b"0.1", b"1.0", b"1E+2", b"-0", b"1.5.5", b"1-2")),
    framed(b"[" * 200 + b"]" * 200),
    b'{"execute":"query-jobs","arguments":null}',
    b'{"execute":"query-jobs","arguments":[]}',
    b'{"execute":"query-jobs","arguments":{"x":1}}',
    b'{"execute":"job-pause","arguments":{"x":1}}',
    b'{"execute":"job-pause","arguments":{"id":null}}',
    b'{"execute":null}',
    b'{"arguments":{}}',
    b"{}",
    b'{"execute":"query-jobs","foo":1}',
    b'{"foo":1,"execute":1}',
    b'{"arguments":1,"execute":1}',
    b'{"foo":1,"arguments":1}',
    b'{"id":3,"foo":1}',
    b'{"arguments":1,"id":3}',
    b'{"execute":"qmp_capabilities","id":3}',
    b'{"execute":"qmp_capabilities","id":3,"arguments":{"x":1}}',
    b'{"execute":"","id":3}',
    b'{"execute":"a\\u0000b","id":3}',
    b'{"execute":"\xc3\xa9\\n","id":3}',
    b'{"exec-oob":"query-jobs","id":1}',
    b'{"exec-oob":"nope","id":1}',
    b'{"exec-oob":5,"id":1}',
    b'{"exec-oob":"a","execute":"b"}',
    b'{"execute":"a","exec-oob":5}',
    b'{"execute":5,"exec-oob":"b"}',
    b'{"foo":5,"execute":"a","exec-oob":"b"}',
    b'{"exec-oob":"query-jobs","arguments":5}',
]
PLAIN = b'{"execute":"qmp_capabilities"}'
OUT_OF_BAND = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'


def script(negotiation: bytes) -> list[bytes]:
    return [*UNNEGOTIATED, negotiation, *BOTH_MODES]


def stream(lines: list[bytes]) -> bytes:
    """Every input, each followed by a marker that tells which replies are its own."""
    return b"".join(line + b'\n{"marker":1,"id":"end %d"}\n' % number for number, line in enumerate(lines))


def groups(output: bytes, count: int) -> list[list[Any]]:
    """The replies to each input."""
    found: list[list[Any]] = [[]]
    for line in output.splitlines():
        (value,) = Scanner().feed(line)
        assert isinstance(value, Value)
        assert isinstance(value.json, dict)
        reply: dict[str, Any] = value.json
        marker = reply.get("id")
        if isinstance(marker, str) and marker.startswith("end "):
            found.append([])
        elif "QMP" not in reply:
            found[-1].append(reply)
    assert len(found) == count + 1
    return found[:-1]


def ask_qemu(lines: list[bytes]) -> bytes:
    program = shutil.which("qemu-storage-daemon")
    assert program is not None
    command = [program, "--chardev", "stdio,id=c", "--monitor", "c"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        # The input fits the pipe, so nobody waits for anybody; it stays open because its end drops what is queued.
        process.stdin.write(stream(lines))
        process.stdin.flush()
        output = b""
        while not output.endswith(b"}\r\n") or f"end {len(lines) - 1}".encode() not in output:
            output += process.stdout.readline()
        process.kill()
    return output


def ask_us(lines: list[bytes]) -> bytes:
    async def main() -> bytes:
        bus = Bus()
        service = Service(host=None, bus=bus, clock=SystemClock(), control=asyncio.Lock(), registry=registry)
        ours_in, theirs_in = os.pipe()
        theirs_out, ours_out = os.pipe()
        monitor = Monitor(Stdio(input_fd=ours_in, output_fd=ours_out), service)
        await monitor.start()
        reader = asyncio.StreamReader()
        source = os.fdopen(theirs_out, "rb", 0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), source
        )
        os.write(theirs_in, stream(lines))
        output = b""
        while f"end {len(lines) - 1}".encode() not in output:
            output += await reader.read(65536)
        await monitor.close()
        transport.close()
        for fd in (ours_in, ours_out, theirs_in):
            os.close(fd)
        return output

    return asyncio.run(main())


def test_replies_are_those_of_qemu() -> None:
    lines = script(PLAIN)
    theirs, ours = groups(ask_qemu(lines), len(lines)), groups(ask_us(lines), len(lines))
    for line, wanted, got in zip(lines, theirs, ours):
        assert got == wanted, line[:200]


def test_replies_with_oob_are_those_of_qemu_in_whatever_order() -> None:
    """QEMU refuses `exec-oob` in another thread than the markers, so a refusal may stand among other lines' replies."""
    lines = script(OUT_OF_BAND)

    ours = [reply for group in groups(ask_us(lines), len(lines)) for reply in group]
    for group in groups(ask_qemu(lines), len(lines)):
        for reply in group:
            assert reply in ours
            ours.remove(reply)
    assert ours == []
