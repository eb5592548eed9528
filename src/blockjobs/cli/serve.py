"""`blockjobs serve`: a daemon for people, with the images given opened under readable names."""

import asyncio
import json
import os
import re
from collections.abc import Sequence
from typing import Final

from blockjobs.base.errors import UsageError
from blockjobs.base.units import format_bytes
from blockjobs.cli.formats import format_of
from blockjobs.cli.images import image_roots, open_image
from blockjobs.cli.running import run
from blockjobs.host import Host
from blockjobs.monitor import commands
from blockjobs.monitor.chardev import Chardev, ListeningSocket
from blockjobs.monitor.server import Monitor
from blockjobs.monitor.session import Service

NAME_MAX: Final = 31
"""QEMU's limit on node names."""
CLIENTS_MAX: Final = 16


def serve(
    images: Sequence[str], *, qmp: str, format: str | None, read_only: bool, as_json: bool, roots: Sequence[str] | None
) -> int:
    """Open images, serve QMP until `quit` or a signal, and close everything; returns the exit code.

    Raises:
        BlockjobsError: an image could not be opened, or the socket not be made.
    """
    if not images:
        raise UsageError("IMAGE is missing: name at least one image to serve")
    names = node_names(images)
    formats = {path: format_of(path, format) for path in images}

    async def work() -> int:
        commands.load()
        async with Host(image_roots=image_roots(roots, *images)) as host:
            for path, name in names.items():
                await open_image(host, path, formats[path], name=name, read_only=read_only)
            service = Service(host=host, bus=host.bus, clock=host.clock, control=host.jobs.control)
            door = _Door(_listener(qmp))
            monitors = [Monitor(door, service) for _ in range(CLIENTS_MAX)]
            try:
                for monitor in monitors:
                    await monitor.start()
                _announce(host, names, qmp, as_json=as_json)
                await host.quitting.wait()
            except asyncio.CancelledError:
                pass  # a signal is how a server is meant to end
            finally:
                await host.shutdown()
                for monitor in monitors:
                    await monitor.close()
        return 0

    return run(work)


def node_names(images: Sequence[str]) -> dict[str, str]:
    """A node name for each path: its stem, as far as QEMU's rules allow, and a number where two are alike."""
    names: dict[str, str] = {}
    for path in images:
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", os.path.splitext(os.path.basename(path))[0])
        stem = (stem if re.match("[A-Za-z]", stem) else f"disk-{stem}")[: NAME_MAX - 3].rstrip(".-")
        name, number = stem, 2
        while name in names.values():
            name, number = f"{stem}-{number}", number + 1
        names[path] = name
    return names


class _Door(Chardev):
    """One socket for several monitors: a QMP monitor serves one client at a time, people open several terminals."""

    def __init__(self, listener: ListeningSocket) -> None:
        self._listener = listener
        self._accepting = asyncio.Lock()

    async def open(self) -> None:
        """See `Chardev`."""
        await self._listener.open()

    async def attach(self, client: asyncio.Protocol) -> bool:
        """See `Chardev`."""
        async with self._accepting:
            return await self._listener.attach(client)

    async def close(self) -> None:
        """See `Chardev`."""
        await self._listener.close()


def _listener(address: str) -> ListeningSocket:
    if ":" in address and "/" not in address:
        host, _, port = address.rpartition(":")
        return ListeningSocket(host=host.strip("[]"), port=port)
    return ListeningSocket(path=address)


def _announce(host: Host, names: dict[str, str], qmp: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"qmp": qmp, "nodes": {name: path for path, name in names.items()}}), flush=True)
        return
    for path, name in names.items():
        node = host.graph.node(name)
        print(f"node '{name}': {path} ({node.driver_name}, {format_bytes(node.length)})")
    path, name = next(iter(names.items()))
    copy = os.path.splitext(os.path.abspath(path))[0] + "-copy.qcow2"
    start = f"drive-backup job-id=copy device={name} target={copy} sync=full speed=10485760"
    print(
        f"QMP is served at {qmp} until Ctrl-C. From another terminal:\n"
        f"  qmp-shell {qmp}        (from qemu.qmp on PyPI), and there, to start a backup:\n"
        f"    {start}\n"
        f"  blockjobs watch copy --connect {qmp}\n"
        f"  blockjobs jobs --connect {qmp}",
        flush=True,
    )
