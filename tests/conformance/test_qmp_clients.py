"""Clients and servers written by others: our client with the real daemon, PyPI's client with our server."""

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError, QMPClient

from blockjobs.base.bus import Bus
from blockjobs.base.clock import SystemClock
from blockjobs.monitor.chardev import ListeningSocket
from blockjobs.monitor.client import QmpClient, QmpError
from blockjobs.monitor.commands import control
from blockjobs.monitor.server import Monitor
from blockjobs.monitor.session import Service
from blockjobs.schema.command import Event, Registry

registry = Registry()
registry.command(since="0.13", name="qmp_capabilities", takes_session=True)(control.qmp_capabilities)
registry.command(since="0.14", takes_session=True)(control.query_version)


@registry.event("TICK", since="1.0")
class Tick(Event, frozen=True, kw_only=True):
    """An event."""

    number: int


@pytest.mark.qemu
def test_our_client_drives_the_real_daemon(tmp_path: Path) -> None:
    program = shutil.which("qemu-storage-daemon")
    assert program is not None
    path = tmp_path / "qmp"

    async def main() -> None:
        while not path.exists():
            await asyncio.sleep(0.02)
        async with await QmpClient.connect(str(path)) as client:
            assert "oob" in client.greeting["capabilities"]
            assert len(await client.execute("query-qmp-schema")) > 400
            options = {"driver": "file", "filename": str(tmp_path / "disk"), "size": 65536}
            await client.execute("blockdev-create", job_id="make", options=options)
            statuses = []
            async for event in client.events():
                statuses.append(event["data"]["status"])
                if statuses[-1] == "concluded":
                    break
            assert statuses[0] == "created"
            with pytest.raises(QmpError, match=r"^Job not found$") as caught:
                await client.execute("job-pause", id="nobody")
            assert caught.value.qmp_class == "GenericError"
            await client.execute("quit")
            await client.closed()

    command = [program, "--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "c"]
    with subprocess.Popen(command) as process:
        asyncio.run(asyncio.wait_for(main(), 20))
        assert process.wait(10) == 0


def test_the_client_of_the_qemu_project_drives_our_server(tmp_path: Path) -> None:
    async def main() -> None:
        bus = Bus()
        service = Service(host=None, bus=bus, clock=SystemClock(), control=asyncio.Lock(), registry=registry)
        monitor = Monitor(ListeningSocket(path=str(tmp_path / "qmp")), service)
        await monitor.start()
        client = QMPClient("test")
        await client.connect(os.fspath(tmp_path / "qmp"))
        version = await client.execute("query-version")
        assert version["qemu"]["major"] == 7
        with pytest.raises(ExecuteError, match="The command nope has not been found"):
            await client.execute("nope")
        bus.publish(Tick(number=3))
        event = await client.events.get()
        assert (event["event"], event["data"]) == ("TICK", {"number": 3})
        await client.disconnect()
        await monitor.close()

    asyncio.run(asyncio.wait_for(main(), 20))
