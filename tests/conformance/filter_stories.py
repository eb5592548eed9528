"""Stories for test_live_replies about filters and about drivers that join several nodes; the images are made there."""

from __future__ import annotations

from typing import Any

Request = dict[str, Any]


def ask(command: str, **arguments: Any) -> Request:
    return {"execute": command, "arguments": {name.replace("_", "-"): value for name, value in arguments.items()}}


def add(driver: str, name: str = "n", **options: Any) -> Request:
    return ask("blockdev-add", driver=driver, node_name=name, **options)


def file(name: str, **options: Any) -> Request:
    return {"driver": "file", "filename": name, **options}


def qcow2(name: str, **options: Any) -> Request:
    return {"driver": "qcow2", "file": file(name), **options}


LIST = ask("query-named-block-nodes", flat=True)
GRAPH = ask("x-debug-query-block-graph")
DEL = ask("blockdev-del", node_name="n")

STORIES: dict[str, list[Request]] = {
    "compress": [
        add("compress"),
        *[add("compress", file=child) for child in ("nope", file("a.raw"), {"driver": "null-co"}, 1)],
        add("compress", file={"driver": "raw", "file": qcow2("a.qcow2")}),
        add("compress", file={"driver": "compress", "file": qcow2("a.qcow2")}),
        add("compress", file=qcow2("a.qcow2"), level="best"),
        add("compress", file=qcow2("ov2.qcow2", **{"node-name": "q"})),
        LIST,
        ask("blockdev-del", node_name="q"),
        GRAPH,
        DEL,
    ],
    "preallocate": [
        *[add("preallocate", file=file("a.raw"), prealloc_align=value) for value in (1000, -512, "x", 511)],
        add("preallocate", file=file("a.raw"), prealloc_size=-1),
        add("preallocate", file="nope"),
        add("preallocate", file=file("empty"), prealloc_align=0, prealloc_size=1),
        LIST,
        GRAPH,
        ask("block_resize", node_name="n", size=1 << 20),
        LIST,
        DEL,
        add("preallocate", file={"driver": "null-co"}),
        DEL,
        add("qcow2", file={"driver": "preallocate", "node-name": "p", "file": file("a.qcow2")}),
        LIST,
        GRAPH,
        DEL,
    ],
}
