"""`blockjobs backup --connect`: a backup that a server makes of one of its disks while it is in use."""

from typing import Any

from blockjobs.base.errors import UsageError
from blockjobs.cli.arguments import Copying
from blockjobs.cli.backup import members_for
from blockjobs.cli.live import on_server, run_job
from blockjobs.cli.server_nodes import find_node, made_by_server, target_path
from blockjobs.monitor.client import Commander


def back_up_there(
    source: str, target: str, target_format: str, copying: Copying, *, replace: bool, as_json: bool, quiet: bool
) -> int:
    """Let a server on this machine make the backup; returns the exit code.

    Raises:
        BlockjobsError: it was refused, or failed.
    """
    if copying.compress == "zstd":
        raise UsageError("--compress zstd cannot be asked of a server: make it zlib")
    path = target_path(target, replace=replace)

    async def work(client: Commander) -> int:
        node = await _describe(client, await find_node(client, source))
        arguments: dict[str, Any] = {
            "device": node["node-name"],
            "target": path,
            "format": target_format,
            "sync": copying.sync,
            "speed": copying.speed,
            "compress": copying.compress is not None,
            "on-source-error": copying.on_source_error,
            "on-target-error": copying.on_target_error,
        }
        before: list[dict[str, Any]] = []
        name = copying.incremental or copying.bitmap
        if name is not None and any(bitmap.get("name") == name for bitmap in node.get("dirty-bitmaps", ())):
            arguments |= {"bitmap": name, "bitmap-mode": "on-success"}
        elif copying.bitmap is not None:
            wanted = {"node": node["node-name"], "name": name, "persistent": node["drv"] == "qcow2"}
            before = [{"type": "block-dirty-bitmap-add", "data": wanted}]
        elif name is not None:
            raise UsageError(f"'{source}' has no bitmap '{name}' yet: a full backup with --bitmap {name} makes it")
        with made_by_server(path):
            if copying.incremental is not None:
                await _make(path, node["image"]["virtual-size"], members_for(copying, path))
                arguments |= {"sync": "incremental", "mode": "existing"}
            await run_job(
                client, "drive-backup", id=copying.job, before=before, as_json=as_json, quiet=quiet, arguments=arguments
            )
        return 0

    return on_server(copying.connect or "", work)


async def _describe(client: Commander, name: str) -> dict[str, Any]:
    nodes = await client.execute("query-named-block-nodes", flat=True)
    return next(node for node in nodes if node["node-name"] == name)


async def _make(path: str, length: int, members: dict[str, Any]) -> None:
    """The empty target of an incremental backup, which the server would make without its base."""
    from blockjobs.host import Host

    async with Host() as host:
        await host.create_image(path, "qcow2", length, **members)
