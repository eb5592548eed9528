"""Names that people give for nodes of a server: node names, device names, or the files behind them."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from blockjobs.base.errors import UsageError, WireError
from blockjobs.monitor.client import Commander

_PROTOCOLS = frozenset({"file", "host_device", "nbd"})


async def find_node(client: Commander, name: str) -> str:
    """The node (or device) that `name` means on the server; the uppermost one where several are on that file.

    Raises:
        UsageError: there is none; the text lists what there is.
    """
    nodes = await client.execute("query-named-block-nodes", flat=True)
    if any(node["node-name"] == name for node in nodes):
        return name
    if any(name in (device["device"], device.get("qdev")) for device in await client.execute("query-block")):
        return name
    path = os.path.realpath(name)
    on_file = [node for node in nodes if node["drv"] not in _PROTOCOLS and os.path.realpath(_file_of(node)) == path]
    if on_file:
        found: str = on_file[0]["node-name"]
        return found
    known = ", ".join(f"'{node['node-name']}'" for node in nodes if node["drv"] not in _PROTOCOLS)
    raise UsageError(f"The server has no node and no image '{name}'{f': it has {known}' if known else ''}")


def _file_of(node: dict[str, Any]) -> str:
    name: str = node.get("file") or node.get("image", {}).get("filename", "")
    return name


def target_path(target: str, *, replace: bool) -> str:
    """An image that a server on this machine is to make, as an absolute path.

    Raises:
        UsageError: something is there already, or there is no folder for it.
    """
    path = os.path.abspath(target)
    if os.path.exists(path) and not replace:
        raise UsageError(f"'{target}' exists: choose another name, or replace it with --force")
    if not os.path.isdir(os.path.dirname(path)):
        raise UsageError(f"Could not create '{target}': there is no folder '{os.path.dirname(path)}'")
    return path


@contextmanager
def made_by_server(path: str, *, keeps: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Around an order that lets a server make an image: if it fails, nothing that only looks complete is left there.

    Args:
        path: of the image. A file that was there before is not removed, but named.
        keeps: asked after a failure: whether the image may be complete, or in use by now.

    Raises:
        BlockjobsError: as the block. After a WireError nobody knows what became of the image, so it is left alone.
    """
    before = _state_of(path)
    try:
        yield
    except WireError:
        raise
    except BaseException:
        if not keeps() and _state_of(path) != before:
            if before is None:
                with suppress(OSError):
                    os.unlink(path)
            else:
                print(f"blockjobs: '{path}' was overwritten, and is not complete", file=sys.stderr)
        raise


def _state_of(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
