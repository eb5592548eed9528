"""The notes of a transcript: what the recording did or looked up besides the dialogue, done and looked up again."""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from player import QmpSocket

NBD_SOCKET = "n.sock"
QEMU_IO_RESULT = re.compile(r"wrote \d+/\d+ bytes at offset \d+|write failed: .*")


def note_differences(
    note: dict[str, Any], qmp: QmpSocket, directory: Path, events: list[dict[str, Any]]
) -> Iterator[str]:
    """Do what a note says was done, and say where the result differs.

    Args:
        note: one of `nbd write`, `qemu-img info`, `graph …`, `dirty-bitmaps of …`.
        qmp: the daemon's monitor, for the notes that come from a query.
        directory: where the images are.
        events: events met while waiting for a query's reply are appended here.
    """

    def ask(command: str, **arguments: Any) -> Any:
        reply, met = qmp.ask({"execute": command, "arguments": arguments})
        events.extend(met)
        return reply.get("return", reply)

    title = next(iter(note))
    heard: Any
    match title.split():
        case ["nbd", "write"]:
            heard = nbd_write(directory, *note[title])
            recorded: Any = note["result"]
        case ["qemu-img", "info"]:
            recorded = {name: note[name] for name in ("backing-filename", "backing-filename-format")}
            heard = backing_of(directory, note[title])
        case ["graph", *_]:
            recorded, graph = note[title], ask("x-debug-query-block-graph")
            heard = graph if "error" in graph else graph_lines(graph, ask("query-named-block-nodes"))
        case ["dirty-bitmaps", "of", node]:
            recorded = note[title]
            found = next(one for one in ask("query-named-block-nodes") if one["node-name"] == node)["dirty-bitmaps"]
            named = [bitmap for bitmap in found if "name" in bitmap]  # jobs keep nameless ones of their own
            heard = sorted(named, key=lambda bitmap: bitmap["name"])
        case _:
            raise AssertionError(f"a note of an unknown kind: {note}")
    if recorded != heard:
        yield f"{title}: recorded {json.dumps(recorded)}, found {json.dumps(heard)}"


def nbd_write(directory: Path, export: str, offset: int, length: int) -> str:
    """Write through the daemon's NBD server as a guest would; return qemu-io's verdict."""
    where = f"nbd+unix:///{export}?socket={NBD_SOCKET}"
    command = ["qemu-io", "-f", "raw", "-c", f"write {offset} {length}", where]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=20, check=False)
    found = QEMU_IO_RESULT.search(done.stdout + done.stderr)
    return found[0] if found else f"exit code {done.returncode}: {done.stderr}"


def backing_of(directory: Path, image: str) -> dict[str, Any]:
    """The backing file and its format as the image's header names them."""
    command = ["qemu-img", "info", "-U", "--output=json", image]
    found = json.loads(subprocess.run(command, cwd=directory, capture_output=True, check=True).stdout)
    return {name: found.get(name) for name in ("backing-filename", "backing-filename-format")}


def graph_lines(graph: dict[str, Any], nodes: list[dict[str, Any]]) -> list[str]:
    """Write the edges of the block graph as the notes do: `parent -edge-> child`, without those to plain files."""
    details = {node["node-name"]: node for node in nodes}
    titles: dict[int, str] = {}
    plain = set()
    for vertex in graph["nodes"]:
        name, kind = vertex["name"], vertex["type"]
        if node := details.get(name):
            shown = "#" if name.startswith("#") else name
            titles[vertex["id"]] = f"{shown}[{node['drv']}/{'ro' if node['ro'] else 'rw'}]"
            if node["drv"] == "file":
                plain.add(vertex["id"])
        else:
            titles[vertex["id"]] = f"{name or kind}({kind[:11]})"
    edges = (edge for edge in graph["edges"] if edge["child"] not in plain)
    return sorted({f"{titles[edge['parent']]} -{edge['name']}-> {titles[edge['child']]}" for edge in edges})
