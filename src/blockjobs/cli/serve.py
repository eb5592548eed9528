"""`blockjobs serve` and `blockjobs nbd serve`: a daemon for people, with images opened under readable names."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from blockjobs.base.errors import UsageError
from blockjobs.base.units import format_bytes
from blockjobs.cli.image_opts import Image, given_images
from blockjobs.cli.images import image_roots
from blockjobs.cli.running import new_host, run
from blockjobs.host import Host
from blockjobs.monitor import commands  # noqa: F401  importing it makes them known
from blockjobs.monitor.chardev import Chardev, Client, ListeningSocket
from blockjobs.monitor.chardevs import Chardevs
from blockjobs.monitor.client import QmpError
from blockjobs.monitor.local import LocalClient
from blockjobs.monitor.server import Monitor
from blockjobs.monitor.session import Service

if TYPE_CHECKING:
    from blockjobs.cli.arguments import Existing

NAME_MAX: Final = 31
"""QEMU's limit on node names."""
CLIENTS_MAX: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Nbd:
    """How images are exported.

    Attributes:
        socket: path of a unix socket to make, or
        listen: host:port.
        tls: a folder with ca-cert.pem, server-cert.pem and server-key.pem: clients need a certificate of that CA.
        clients_max: clients at work at once, 0 for any number.
    """

    socket: str | None
    listen: str
    tls: str | None
    clients_max: int

    @property
    def address(self) -> dict[str, Any]:
        """As `nbd-server-start` takes it."""
        if self.socket is not None:
            return {"type": "unix", "data": {"path": self.socket}}
        host, _, port = self.listen.rpartition(":")
        return {"type": "inet", "data": {"host": host.strip("[]"), "port": port}}

    def uri(self, export: str) -> str:
        """What a client is told to reach an export."""
        secure = "s" if self.tls else ""
        if self.socket is not None:
            return f"nbd{secure}+unix:///{export}?socket={os.path.abspath(self.socket)}"
        return f"nbd{secure}://{self.listen}/{export}"


def serve(
    images: Sequence[str],
    *,
    qmp: str | None,
    nbd: Nbd | None = None,
    existing: "Existing",
    read_only: bool,
    as_json: bool,
    roots: Sequence[str] | None,
) -> int:
    """Open images, serve QMP, NBD or both until `quit` or a signal, and close everything; returns the exit code.

    Raises:
        BlockjobsError: an image could not be opened, or a socket not be made.
    """
    if not images:
        raise UsageError("IMAGE is missing: name at least one image to serve")
    described = given_images(images, existing.format, image_opts=existing.image_opts)
    names = node_names(described)

    async def work() -> int:
        async with (
            new_host(image_roots=image_roots(roots, *(path for each in described for path in each.folder_of))) as host,
            AsyncExitStack() as stack,
        ):
            for image in described:
                await image.open(host, name=names[image.given], read_only=read_only)
            if nbd is not None:
                await _export(host, names.values(), nbd, writable=not read_only)
            if qmp is not None:
                await stack.enter_async_context(_monitors(host, qmp))
            stack.push_async_callback(host.shutdown)
            _announce(host, names, qmp, nbd, as_json=as_json)
            with suppress(asyncio.CancelledError):  # a signal is how a server is meant to end
                await host.quitting.wait()
        return 0

    return run(work)


@asynccontextmanager
async def _monitors(host: Host, address: str) -> AsyncIterator[None]:
    chardevs = Chardevs(host.clock, host.objects)
    service = Service(
        host=host,
        bus=host.bus,
        clock=host.clock,
        control=host.jobs.control,
        chardevs=chardevs,
        is_busy=lambda: host.offload.is_busy,
    )
    door = _Door(_listener(address))
    monitors = [Monitor(door, service) for _ in range(CLIENTS_MAX)]
    try:
        for monitor in monitors:
            await monitor.start()
        yield
    finally:
        for monitor in monitors:
            await monitor.close()


async def _export(host: Host, names: Iterable[str], nbd: Nbd, *, writable: bool) -> None:
    """Start the NBD server, each image under the name of its node."""
    async with LocalClient(host) as client:
        try:
            if nbd.tls is not None:
                await client.execute(
                    "object-add", qom_type="tls-creds-x509", id="tls", dir=nbd.tls, endpoint="server", verify_peer=True
                )
            await client.execute(
                "nbd-server-start",
                addr=nbd.address,
                tls_creds="tls" if nbd.tls else None,
                max_connections=nbd.clients_max,
            )
            for name in names:
                await client.execute("block-export-add", type="nbd", id=name, node_name=name, writable=writable)
        except QmpError as error:
            raise UsageError(str(error)) from error


def node_names(images: Sequence[Image]) -> dict[str, str]:
    """A node name for each image, by what it was given as.

    That of its description, or the stem of its path, as far as QEMU's rules allow; with a number where two are alike.
    """
    names: dict[str, str] = {}
    for image in images:
        said = None if image.options is None else image.options.get("node-name")
        own = str(said) if said else os.path.splitext(os.path.basename(image.path or "disk"))[0]
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", own)
        stem = (stem if re.match("[A-Za-z]", stem) else f"disk-{stem}")[: NAME_MAX - 3].rstrip(".-")
        name, number = stem, 2
        while name in names.values():
            name, number = f"{stem}-{number}", number + 1
        names[image.given] = name
    return names


class _Door(Chardev):
    """One socket for several monitors: a QMP monitor serves one client at a time, people open several terminals."""

    def __init__(self, listener: ListeningSocket) -> None:
        self._listener = listener
        self._accepting = asyncio.Lock()

    @property
    def filename(self) -> str:
        """See `Chardev`."""
        return self._listener.filename

    async def open(self) -> None:
        """See `Chardev`."""
        await self._listener.open()

    async def attach(self, client: Client) -> bool:
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


def _announce(host: Host, names: dict[str, str], qmp: str | None, nbd: Nbd | None, *, as_json: bool) -> None:
    uris = {name: nbd.uri(name) for name in names.values()} if nbd else {}
    if as_json:
        places = {"qmp": qmp} if nbd is None else {"qmp": qmp, "nbd": uris}
        print(json.dumps({**places, "nodes": {name: path for path, name in names.items()}}), flush=True)
        return
    for path, name in names.items():
        node = host.graph.node(name)
        where = f" at {uris[name]}" if uris else ""
        print(f"node '{name}': {path} ({node.driver_name}, {format_bytes(node.length)}){where}")
    if qmp is None:
        print("Served until Ctrl-C.", flush=True)
        return
    path, name = next(iter(names.items()))
    copy = os.path.splitext(os.path.abspath(path if os.path.exists(path) else name))[0] + "-copy.qcow2"
    print(
        f"QMP is served at {qmp} until Ctrl-C. From another terminal:\n"
        f"  blockjobs backup {name} {copy} --connect {qmp}\n"
        f"  blockjobs watch --connect {qmp}\n"
        f"  blockjobs jobs --connect {qmp}",
        flush=True,
    )
