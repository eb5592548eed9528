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


def quorum(threshold: Any, **options: Any) -> Request:
    return add("quorum", **{"vote_threshold": threshold, "children": ["a", "t"], **options})


def cbw(**options: Any) -> Request:
    return add("copy-before-write", "cbw", **{"file": "a", "target": "t", **options})


def log(**options: Any) -> Request:
    return add("blklogwrites", **{"file": file("a.raw"), "log": file("empty"), **options})


def thread(**options: Any) -> Request:
    return ask("object-add", qom_type="iothread", id="io", **options)


def change(**arguments: Any) -> Request:
    return ask("x-blockdev-change", **{"parent": "n", **arguments})


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
    "quorum": [
        *[add("raw", name, file=file(f"{name}.raw")) for name in ("a", "t")],
        add("quorum", children=["a"]),
        add("quorum", vote_threshold=1),
        *[quorum(threshold) for threshold in (0, -1, 3, "1")],
        quorum(1, blkverify=True),
        quorum(2, blkverify=True, rewrite_corrupted=True),
        *[quorum(2, read_pattern=value) for value in ("x", 1)],
        *[quorum(1, children=value) for value in ([], ["nope"], "a", [1], ["a", file("empty")])],
        quorum(2),
        LIST,
        GRAPH,
        *[ask("blockdev-del", node_name=name) for name in ("a", "t")],
        ask("block_resize", node_name="n", size=1 << 20),
        DEL,
        quorum(1, read_pattern="fifo", blkverify=True, rewrite_corrupted=True, children=["a", "a", "t"]),
        LIST,
        GRAPH,
        DEL,
        quorum(2, rewrite_corrupted=True, read_pattern="quorum", blkverify=False),
        LIST,
        GRAPH,
        DEL,
        add("quorum", vote_threshold=1, read_only=True, children=["a", {"driver": "raw", "file": file("empty")}]),
        add("quorum", vote_threshold=1, children=[qcow2("ov2.qcow2"), qcow2("ov.qcow2")]),
        LIST,
        DEL,
    ],
    "snapshot-access": [
        *[add("raw", name, file=file(f"{name}.raw")) for name in ("a", "t")],
        add("qcow2", "q", file=file("ov.qcow2")),
        *[
            ask("block-dirty-bitmap-add", node=node, name=name, granularity=granularity)
            for node, name, granularity in (("a", "b", 4096), ("q", "long", 65536), ("t", "other", 131072))
        ],
        *[cbw(bitmap={"node": node, "name": name}) for node, name in (("a", "x"), ("x", "b"), ("q", "long"))],
        *[cbw(bitmap=value) for value in (1, "b", {}, {"node": "a"}, {"node": "a", "name": "b", "x": 1})],
        cbw(bitmap={"node": "a", "name": "b"}),
        add("snapshot-access"),
        add("snapshot-access", file="nope"),
        add("snapshot-access", file="cbw"),
        LIST,
        GRAPH,
        ask("blockdev-del", node_name="cbw"),
        ask("block_resize", node_name="n", size=1 << 20),
        ask("blockdev-add", driver="qcow2", node_name="w", file="a"),
        DEL,
        ask("blockdev-del", node_name="cbw"),
        cbw(bitmap={"node": "t", "name": "other"}),
        LIST,
        ask("blockdev-del", node_name="cbw"),
        add("snapshot-access", file="a"),
        GRAPH,
        DEL,
    ],
    "blklogwrites": [
        add("blklogwrites", file=file("a.raw")),
        *[log(log_sector_size=size) for size in (0, 1, 16, 31, 100, 1 << 24, -1, 1 << 32, "x")],
        log(log_append=True, log_sector_size=512),
        log(log_append=True),
        LIST,
        DEL,
        log(log_append=True, log=file("t.raw")),
        log(log_super_update_interval=0),
        log(log_super_update_interval=-1),
        DEL,
        log(log="nope"),
        log(),
        LIST,
        GRAPH,
        DEL,
        log(log_sector_size=4096, log_append=False, log_super_update_interval=1),
        LIST,
        DEL,
        log(read_only=True),
        GRAPH,
    ],
    "iothread": [
        thread(),
        *[
            ask("qom-get", path="io", property=name)
            for name in ("poll-max-ns", "thread-pool-max", "aio-max-batch", "type")
        ],
        *[
            ask("qom-set", path="io", property=name, value=value)
            for name, value in (("poll-max-ns", 5), ("poll-max-ns", -1), ("poll-grow", 7), ("poll-grow", "x"), ("x", 1))
        ],
        ask("qom-get", path="io", property="poll-max-ns"),
        add("null-co"),
        *[ask("x-blockdev-set-iothread", node_name="n", iothread=value) for value in ("io", "nope", None, 1)],
        ask("x-blockdev-set-iothread", node_name="zz", iothread="io"),
        ask("x-blockdev-set-iothread", node_name="n"),
        ask("object-del", id="io"),
        *[
            thread(**{name: value})
            for name in ("poll_max_ns", "aio_max_batch", "thread_pool_min")
            for value in (-1, "x")
        ],
        thread(thread_pool_min=100),
        thread(thread_pool_max=1 << 40),
        thread(bogus=1),
    ],
    "children of a quorum": [
        *[add("raw", name, file=file(f"{name}.raw")) for name in ("a", "t")],
        add("null-co", "c", size=4 << 20),
        add("null-co", "d", size=4 << 20),
        quorum(2),
        *[change(parent=name) for name in ("nope", "n")],
        change(child="children.0", node="c"),
        *[change(child=name) for name in ("children.9", "file")],
        *[change(node=name) for name in ("nope", "a", "n")],
        change(parent="c", node="d"),
        change(parent="c", child="x"),
        change(parent="a", child="file"),
        change(child="children.0"),
        change(node="c"),
        GRAPH,
        LIST,
        change(child="children.0"),
        change(node="d"),
        change(node="d"),
        GRAPH,
        ask("blockdev-del", node_name="a"),
        ask("blockdev-del", node_name="c"),
        *[change(child=name) for name in ("children.3", "children.2", "children.1")],
        GRAPH,
        DEL,
        add("raw", "a", file=file("a.raw")),
        quorum(2, blkverify=True),
        change(child="children.0"),
        DEL,
    ],
}
