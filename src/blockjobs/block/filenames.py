"""How nodes are called in query results, and how names in headers are completed (spec/block-layer.md §1, §5)."""

import json
import os
from typing import TYPE_CHECKING, Final

import msgspec

from blockjobs.base.errors import UsageError
from blockjobs.block.driver import FilterDriver, FormatDriver
from blockjobs.block.options import references

if TYPE_CHECKING:
    from blockjobs.block.node import Node

_STRONG: Final[dict[str, tuple[str, ...]]] = {
    "raw": ("offset", "size"),
    "null-co": ("size", "read-zeroes"),
    "null-aio": ("size", "read-zeroes"),
    "throttle": ("throttle-group",),
    "blklogwrites": ("log-sector-size", "log-append"),
    "quorum": ("blkverify", "vote-threshold", "rewrite-corrupted", "read-pattern"),
    "nbd": ("server", "export", "tls-creds", "tls-hostname"),
    "file": ("filename",),
    "host_device": ("filename",),
    "blkdebug": (
        "align",
        "max-transfer",
        "opt-write-zero",
        "max-write-zero",
        "opt-discard",
        "max-discard",
        "inject-error",
        "set-state",
    ),
}
"""Options that change what a node shows, so that its name must tell them."""

_USUAL: Final = {"numeric": False, "keep-alive": False, "mptcp": False, "abstract": False, "tight": True}
"""Members of socket addresses that need not be told."""

_NAMED_AS_CHILD: Final = frozenset({"copy-before-write", "snapshot-access", "mirror_top", "commit_top"})


def filename_of(node: "Node") -> str:
    """The file's name where that says all, else `json:{...}` with the options that make the difference."""
    plain = _plain(node)
    return plain if plain is not None else "json:" + json.dumps(_full_options(node))


def _plain(node: "Node") -> str | None:
    name = node.driver_name
    strong = _strong_options(node)
    if name in ("file", "host_device"):
        return str(strong["filename"])
    if name == "nbd":
        return _nbd_uri(strong)
    if name in ("null-co", "null-aio"):
        return None if strong else f"{name}://"
    if name == "blkdebug":
        image = None if strong else _plain(node.children["image"])
        return None if image is None else f"blkdebug::{image}"
    if name in _NAMED_AS_CHILD or node.implicit:
        driver = node.driver
        return filename_of(node.children[driver.filtered if isinstance(driver, FilterDriver) else "file"])
    if not isinstance(node.driver, FormatDriver) or strong or backing_is_overridden(node):
        return None
    below = node.children["file"]
    return None if isinstance(below.driver, FormatDriver) else _plain(below)


def _strong_options(node: "Node") -> dict[str, object]:
    given = msgspec.to_builtins(node.options)
    strong = _STRONG.get(node.driver_name, ())
    told: dict[str, object] = {}
    for name in strong:
        if isinstance(given.get(name), list):
            for index, item in enumerate(given[name]):
                told |= {f"{name}.{index}.{key}": value for key, value in item.items() if value is not None}
        elif isinstance(given.get(name), dict):
            said = {
                key: value for key, value in given[name].items() if value is not None and value is not _USUAL.get(key)
            }
            told |= {f"{name}.{key}": value for key, value in said.items()}
        elif given.get(name) is not None:
            told[name] = given[name]
    return told


def _nbd_uri(strong: dict[str, object]) -> str | None:
    """As QEMU spells it, which is not escaped; None if the server's address is of another kind."""
    members = {name.removeprefix("server."): value for name, value in strong.items() if name.startswith("server.")}
    export = None if strong.get("export") is None else f"/{strong['export']}"
    match members:
        case {"type": "unix", "path": path, **others} if not others:
            return f"nbd+unix://{export or ''}?socket={path}"
        case {"type": "inet", "host": host, "port": port, **others} if not others:
            return f"nbd://{host}:{port}{export or ''}"
    return None


def _full_options(node: "Node") -> dict[str, object]:
    options: dict[str, object] = {"driver": node.driver_name, **_strong_options(node)}
    if node.driver_name == "quorum":
        return {**options, "children": [_full_options(child) for child in node.children.values()]}
    for edge, child in node.children.items():
        if edge != "backing" or backing_is_overridden(node):
            options[edge] = _full_options(child)
    if "backing" not in node.children and backing_is_overridden(node):
        options["backing"] = None
    return options


def backing_is_overridden(node: "Node") -> bool:
    """Whether the node's backing node is another than its header names."""
    if not isinstance(node.driver, FormatDriver):
        return False
    named = next((child.filename for child in node.driver.implied_children() if child.name == "backing"), None)
    backing = node.children.get("backing")
    if backing is None:
        return named is not None and any(edge == "backing" for edge, _ in references(node.options))
    return named is None or filename_of(backing) != full_backing_filename(node, named)


def full_backing_filename(node: "Node", named: str) -> str:
    """A name from the header of `node` as seen from our working directory; as it is if that cannot be known."""
    try:
        return combine(node, named)
    except UsageError:
        return named


def combine(node: "Node", named: str) -> str:
    """A file name found in the header of `node`: relative names count from the directory of the image itself.

    Raises:
        UsageError: the name is relative, and the image has no directory (it is put together from options).
    """
    if os.path.isabs(named):
        return named
    below = node.children["file"]
    while isinstance(below.driver, FilterDriver) or below.driver_name == "raw":
        below = below.children[below.driver.filtered if isinstance(below.driver, FilterDriver) else "file"]
    overlay = _plain(below)
    if overlay is None or "://" in overlay:
        raise UsageError(f"Could not open '{named}': the image that names it is no plain file, so give its full path")
    return os.path.join(os.path.dirname(overlay), named)


def directories_of(node: "Node") -> list[str]:
    """Directories of the files that `node` and the nodes below it live in."""
    found, pending = [], [node]
    for current in pending:
        if current.driver_name in ("file", "host_device"):
            found.append(os.path.dirname(str(_strong_options(current)["filename"])) or ".")
        pending.extend(current.children.values())
    return found
