"""Commands on exports and the NBD server (spec/block-layer.md §7)."""

from typing import TYPE_CHECKING

from blockjobs.export.addresses import AnySocketAddressLegacy
from blockjobs.export.options import (
    CONNECTIONS_MAX,
    HANDSHAKE_S_MAX,
    AnyExportOptions,
    BlockExportInfo,
    BlockExportRemoveMode,
    NbdExportOptions,
)
from blockjobs.schema.command import qmp
from blockjobs.schema.types import UInt32

if TYPE_CHECKING:
    from blockjobs.host import Host


@qmp.command(since="1.3")
async def nbd_server_start(
    host: "Host",
    *,
    addr: AnySocketAddressLegacy,
    tls_creds: str | None = None,
    tls_authz: str | None = None,
    max_connections: UInt32 = CONNECTIONS_MAX,
    handshake_max_seconds: UInt32 = HANDSHAKE_S_MAX,
) -> None:
    """Start the NBD server; exports are added to it afterwards.

    Args:
        addr: where it listens.
        tls_creds: credentials object; clients must then speak TLS.
        tls_authz: authorization object that decides about the clients' certificates.
        max_connections: clients that may work at the same time, 0 for any number.
        handshake_max_seconds: how long a client may take to negotiate, 0 for as long as it likes.
    """
    await host.exports.start_server(
        addr.address,
        tls_creds=tls_creds,
        tls_authz=tls_authz,
        connections_max=max_connections,
        handshake_s_max=handshake_max_seconds,
    )


@qmp.command(since="1.3")
async def nbd_server_stop(host: "Host") -> None:
    """Stop the NBD server, drop its clients and remove its exports."""
    await host.exports.stop_server()


@qmp.command(since="1.3", features=["deprecated"])
async def nbd_server_add(
    host: "Host",
    *,
    device: str,
    name: str | None = None,
    description: str | None = None,
    writable: bool = False,
    bitmap: str | None = None,
) -> None:
    """Export a node under its own name or another; use `block-export-add`.

    Args:
        device: the node.
        name: of the export, and its identifier.
        description: shown to clients that list exports.
        writable: clients may write; read-only nodes are exported read-only nevertheless.
        bitmap: a dirty bitmap that clients may read.
    """
    node = host.graph.find(device)
    name = device if name is None else name
    options = NbdExportOptions(
        id=name,
        node_name=node.name,
        name=name,
        description=description,
        writable=writable and not node.read_only,
        bitmaps=None if bitmap is None else [bitmap],
    )
    await host.exports.add(options)


@qmp.command(since="1.3", features=["deprecated"])
async def nbd_server_remove(
    host: "Host", *, name: str, mode: BlockExportRemoveMode = BlockExportRemoveMode.SAFE
) -> None:
    """Remove an export; use `block-export-del`.

    Args:
        name: of the export.
        mode: whether clients keep it.
    """
    await host.exports.remove(name, mode)


@qmp.command(since="5.2")
async def block_export_add(host: "Host", options: AnyExportOptions) -> None:
    """Let others use a node.

    Args:
        options: kind and identifier of the export, the node, and what the kind asks for.
    """
    assert isinstance(options, NbdExportOptions)
    await host.exports.add(options)


@qmp.command(since="5.2")
async def block_export_del(host: "Host", *, id: str, mode: BlockExportRemoveMode = BlockExportRemoveMode.SAFE) -> None:
    """Remove an export; BLOCK_EXPORT_DELETED tells when it is gone.

    Args:
        id: of the export.
        mode: whether clients keep it.
    """
    await host.exports.remove(id, mode)


@qmp.command(since="5.2", waits=False)
def query_block_exports(host: "Host") -> list[BlockExportInfo]:
    """List the exports, the newest first."""
    return host.exports.infos()
