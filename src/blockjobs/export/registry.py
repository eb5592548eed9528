"""All exports of a host, and its NBD server (spec/block-layer.md §7)."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Final

from blockjobs.base.bus import Bus
from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.base.ids import is_well_formed
from blockjobs.block.graph import Graph
from blockjobs.block.iothread import IoThread
from blockjobs.block.node import Node
from blockjobs.block.tls_policy import tls_policy
from blockjobs.export.addresses import AddressMembers
from blockjobs.export.listener import listen
from blockjobs.export.nbd_export import NbdExport
from blockjobs.export.options import (
    CONNECTIONS_MAX,
    HANDSHAKE_S_MAX,
    BlockExportDeleted,
    BlockExportInfo,
    BlockExportRemoveMode,
    BlockExportType,
    NbdExportOptions,
)
from blockjobs.export.server import NbdServer

log = logging.getLogger(__name__)

STOP_S_MAX: Final = 0.5
"""Stopping waits so long for requests under way; those that take longer end behind its back."""


class Exports:
    """Adds, lists and removes exports.

    Attributes:
        server: the NBD server while it runs.
    """

    def __init__(self, graph: Graph, bus: Bus, objects: Mapping[str, object]) -> None:
        self._graph, self._bus, self._objects = graph, bus, objects
        self._exports: dict[str, NbdExport] = {}
        self._ending: dict[NbdExport, asyncio.Task[None]] = {}
        self.server: NbdServer | None = None

    # --- the server

    async def start_server(
        self,
        address: AddressMembers,
        *,
        tls_creds: str | None = None,
        tls_authz: str | None = None,
        connections_max: int = CONNECTIONS_MAX,
        handshake_s_max: int = HANDSHAKE_S_MAX,
    ) -> None:
        """Start the NBD server.

        Args:
            address: where it listens.
            tls_creds: id of the credentials that clients must speak TLS to.
            tls_authz: id of the object that says who may come in.
            connections_max: clients at work at once, 0 for any number.
            handshake_s_max: how long a negotiation may take, 0 for as long as it likes.

        Raises:
            UsageError: in QEMU's words; no server runs then, or the one that ran before.
        Waits: for name resolution. Checkpoint: no.
        """
        if self.server is not None:
            raise UsageError("NBD server already running")
        tls = None
        if tls_creds is not None:
            tls = tls_policy(self._objects, tls_creds, tls_authz)
        listeners = await listen(address)
        self.server = NbdServer(listeners, tls=tls, connections_max=connections_max, handshake_s_max=handshake_s_max)
        self.server.start()

    async def stop_server(self) -> None:
        """Stop the NBD server and remove its exports, whatever their clients do; takes less than a second.

        Raises:
            UsageError: none runs.
        Waits: for requests under way, but no longer than `STOP_S_MAX`. Checkpoint: no.
        """
        if self.server is None:
            raise UsageError("NBD server not running")
        server, self.server = self.server, None
        await server.close()
        await self._end([*self._exports.values()], server)

    # --- exports

    async def add(self, options: NbdExportOptions, node: Node | None = None) -> NbdExport:
        """Export a node.

        Args:
            options: as for `block-export-add`.
            node: what to export, if not the node that `options` name.

        Raises:
            UsageError: in QEMU's words; nothing has changed.
        Waits: nothing. Checkpoint: no.
        """
        if not is_well_formed(options.id):
            raise UsageError("Invalid block export id")
        if options.id in self._exports:
            raise UsageError(f"Block export id '{options.id}' is already in use")
        node = node or self._graph.node(options.node_name)
        if options.iothread is not None and not isinstance(self._objects.get(options.iothread), IoThread):
            raise UsageError(f'iothread "{options.iothread}" not found')
        if options.writable and node.read_only:
            raise UsageError("Cannot export read-only node as writable")
        server = self.server
        if server is None:
            raise UsageError("NBD server not running")
        server.check_free(node.name if options.name is None else options.name)
        export = await NbdExport.open(self._graph, node, options, shared=server.is_shared)
        self._exports[export.id] = export
        server.add(export)
        return export

    async def remove(self, id: str, mode: BlockExportRemoveMode = BlockExportRemoveMode.SAFE) -> None:
        """Remove an export; `hard` drops its clients.

        Raises:
            UsageError: there is none, or with `safe` clients use it; nothing has changed.
        Waits: for requests under way, but no longer than `STOP_S_MAX`. Checkpoint: no.
        """
        export = self._exports.get(id)
        if export is None:
            raise UsageError(f"Export '{id}' is not found")
        if mode is BlockExportRemoveMode.SAFE and export.clients:
            raise UsageError(f"export '{id}' still in use")
        await self._end([export], self.server)

    def infos(self) -> list[BlockExportInfo]:
        """All exports, the newest first."""
        return [
            BlockExportInfo(
                id=export.id,
                type=BlockExportType.NBD,
                node_name=export.node.name,
                shutting_down=export.is_closing,
            )
            for export in reversed(self._exports.values())
        ]

    async def close(self) -> None:
        """Stop everything and wait until all exports have let go of their nodes.

        Waits: for requests under way. Checkpoint: no.
        """
        if self.server is not None:
            await self.stop_server()
        if self._ending:
            async with self._graph.drained():  # so that no throttle holds the last requests back
                while self._ending:
                    await asyncio.wait(self._ending.values())

    async def _end(self, exports: list[NbdExport], server: NbdServer | None) -> None:
        for export in exports:
            if server is not None:
                server.remove(export)
            export.close()
            if export not in self._ending:
                task = asyncio.get_running_loop().create_task(self._finish(export), name=f"export-{export.id}")
                self._ending[export] = task
        tasks = [self._ending[export] for export in exports if export in self._ending]
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_S_MAX)

    async def _finish(self, export: NbdExport) -> None:
        """Once its last request has ended, let go of the node and say so."""
        await export.quiet()
        try:
            await export.release(self._graph)
        except BlockjobsError as error:
            log.warning("export '%s': its node closed with an error: %s", export.id, error)
        del self._exports[export.id], self._ending[export]
        self._bus.publish(BlockExportDeleted(id=export.id))
