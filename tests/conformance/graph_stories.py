"""Stories for test_live_replies about snapshots, reopening and other changes of the graph."""

from __future__ import annotations

from typing import Any

Request = dict[str, Any]


def ask(command: str, **arguments: Any) -> Request:
    return {"execute": command, "arguments": {name.replace("_", "-"): value for name, value in arguments.items()}}


def add(driver: str, name: str = "n", **options: Any) -> Request:
    return ask("blockdev-add", driver=driver, node_name=name, **options)


def file(name: str, **options: Any) -> Request:
    return {"driver": "file", "filename": name, **options}


def qcow2(name: str, image: str, **options: Any) -> Request:
    return add("qcow2", name, file=file(image, **{"node-name": f"{name}-file"}), **options)


def reopen(*described: Request) -> Request:
    return ask("blockdev-reopen", options=list(described))


def node(driver: str, name: str, **options: Any) -> Request:
    return {"driver": driver, "node-name": name, **{key.replace("_", "-"): value for key, value in options.items()}}


def snapshot(below: str, overlay: str) -> Request:
    return ask("blockdev-snapshot", node=below, overlay=overlay)


def sync(**arguments: Any) -> Request:
    return ask("blockdev-snapshot-sync", **{"snapshot_file": "new.qcow2", "snapshot_node_name": "new", **arguments})


def rename(device: str, image: str, backing: str) -> Request:
    return ask("change-backing-file", device=device, image_node_name=image, backing_file=backing)


def together(*actions: Request, **properties: str) -> Request:
    kinds = [{"type": action["execute"], "data": action["arguments"]} for action in actions]
    return {"execute": "transaction", "arguments": {"actions": kinds, "properties": properties}}


ABORT = {"execute": "abort", "arguments": {}}
LIST = ask("query-named-block-nodes", flat=True)
DEEP = ask("query-named-block-nodes")
GRAPH = ask("x-debug-query-block-graph")
GROUPS = [ask("object-add", qom_type="throttle-group", id=name) for name in ("g", "h")]
NO_GROUPS = [ask("object-del", id=name) for name in ("g", "h")]
TUNING = (
    {"l2_cache_size": 1 << 20},
    {"cache_size": 1 << 20, "l2_cache_size": 2 << 20},
    {"l2_cache_entry_size": 100},
    {"overlap_check": "all", "pass_discard_other": True, "cache_clean_interval": 3},
    {"lazy_refcounts": True},
    {"encrypt": {"format": "luks"}},
    {"data_file": "f"},
)

STORIES: dict[str, list[Request]] = {
    "snapshots": [
        qcow2("a", "a.qcow2"),
        qcow2("b", "b.qcow2"),
        add("raw", "r", file=file("a.raw")),
        *[snapshot(below, overlay) for below, overlay in (("a", "a"), ("a", "r"), ("x", "b"), ("b", "x"))],
        snapshot("a", "b"),
        LIST,
        GRAPH,
        DEEP,
        snapshot("a", "b"),
        snapshot("r", "b"),
        snapshot("r", "a"),
        *[snapshot(below, overlay) for below, overlay in (("a", "x"), ("x", "a"), ("x", "y"), ("a", "a"))],
        add("qcow2", "o", file=file("ov2.qcow2"), backing=None),
        snapshot("b", "o"),
        DEEP,
        GRAPH,
    ],
    "snapshots of filters and under filters": [
        *GROUPS,
        qcow2("a", "a.qcow2"),
        add("throttle", "t", throttle_group="g", file="a"),
        qcow2("b", "b.qcow2"),
        snapshot("a", "t"),
        snapshot("a", "b"),
        GRAPH,
        LIST,
        qcow2("o", "ov.qcow2", backing=None),
        snapshot("t", "o"),
        GRAPH,
        LIST,
        *[ask("blockdev-del", node_name=name) for name in ("o", "t", "b", "a")],
        *NO_GROUPS,
    ],
    "snapshots into files": [
        qcow2("a", "a.qcow2"),
        sync(),
        sync(node_name="x"),
        sync(device="a"),
        sync(node_name="a", snapshot_node_name="a"),
        sync(node_name="a", snapshot_node_name="1a"),
        ask("blockdev-snapshot-sync", node_name="a", snapshot_file="new.qcow2"),
        sync(node_name="a", snapshot_file="nodir/new.qcow2"),
        sync(node_name="a", snapshot_file="dir", mode="existing"),
        sync(node_name="a", snapshot_file="missing", mode="existing"),
        sync(node_name="a", snapshot_file="a.raw", mode="existing"),
        sync(node_name="a", snapshot_file="a.raw", mode="existing", format="raw"),
        sync(node_name="a", mode="other"),
        sync(node_name="a", format="raw"),
        sync(node_name="a", format="bogus"),
        add("raw", "user", file="a"),
        sync(node_name="a"),
        GRAPH,
        sync(node_name="a", snapshot_file="ov.qcow2", snapshot_node_name="new2", mode="existing"),
        sync(node_name="new", snapshot_file="ov.qcow2", snapshot_node_name="new2", mode="existing"),
        GRAPH,
        ask("blockdev-del", node_name="new"),
        ask("blockdev-del", node_name="a"),
        ask("blockdev-del", node_name="user"),
        LIST,
    ],
    "a read-only node gets a snapshot": [
        qcow2("a", "a.qcow2", read_only=True, cache={"no-flush": True}, discard="unmap"),
        add("raw", "user", read_only=True, file="a"),
        sync(node_name="a", snapshot_file="b.qcow2", mode="existing"),
        LIST,
        GRAPH,
    ],
    "snapshots in transactions": [
        qcow2("a", "a.qcow2"),
        qcow2("b", "b.qcow2"),
        add("raw", "u", file="a"),
        together(sync(node_name="a"), ABORT),
        LIST,
        GRAPH,
        together(snapshot("a", "b"), snapshot("b", "a")),
        together(snapshot("a", "b"), completion_mode="grouped"),
        together(sync(node_name="a"), sync(node_name="b", snapshot_file="new2.qcow2")),
        GRAPH,
        together(sync(node_name="a"), sync(node_name="new", snapshot_node_name="n2", snapshot_file="new2.qcow2")),
        GRAPH,
    ],
    "other names for backing files": [
        qcow2("o", "ov2.qcow2"),
        add("raw", "r", file=file("t.raw")),
        rename("x", "o", "f"),
        rename("o", "x", "f"),
        rename("r", "o", "f"),
        rename("o", "r", "f"),
        rename("o", "o-file", "f"),
        rename("o-file", "o", "f"),
        rename("o", "o", "./ov.qcow2"),
        rename("o", "o", "elsewhere"),
        DEEP,
        rename("o", "o", "x" * 1024),
        rename("o", "o", ""),
        DEEP,
        qcow2("p", "b.qcow2"),
        rename("p", "p", "f"),
    ],
    "reopening files": [
        add("file", "f", filename="a.raw"),
        *[
            reopen(node("file", "f", **{"filename": "a.raw", **options}))
            for options in (
                {"read_only": True},
                {"cache": {"direct": True}},
                {"filename": "b.raw"},
                {"filename": "./a.raw"},
                {"aio": "threads"},
                {"locking": "off"},
                {"aio_max_batch": 3},
                {"force_share": True, "read_only": True},
                {"detect_zeroes": "unmap"},
                {"detect_zeroes": "on"},
                {"auto_read_only": True},
                {"node_name": None},
            )
        ],
        LIST,
        reopen(node("file", "f")),
        reopen({"driver": "file", "filename": "a.raw"}),
        reopen(node("file", "x", filename="a.raw")),
        reopen(node("raw", "f", file="f")),
        reopen(node("bogus", "f", file="f")),
        reopen(node("file", "f", filename="a.raw", bogus=1)),
        LIST,
    ],
    "reopening images": [
        add("file", "f", filename="a.qcow2"),
        add("qcow2", "a", file="f"),
        reopen(node("file", "f", filename="a.qcow2", read_only=True)),
        reopen(
            node("file", "f", filename="a.qcow2", read_only=True),
            node("qcow2", "a", file="f", read_only=True),
        ),
        LIST,
        reopen(node("qcow2", "a", file="f")),
        reopen(node("qcow2", "a", file="f"), node("file", "f", filename="a.qcow2")),
        *[reopen(node("qcow2", "a", file="f", **tuning)) for tuning in TUNING],
        reopen(node("qcow2", "a", file="x")),
        reopen(node("qcow2", "a", file=file("a.qcow2"))),
        reopen(node("qcow2", "a", file="f", backing={"driver": "null-co"})),
        reopen(node("qcow2", "a", file="f", backing="a")),
        reopen(node("qcow2", "a", file="a")),
        LIST,
        GRAPH,
    ],
    "reopening other backing images": [
        add("raw", "r", file=file("a.raw")),
        qcow2("a", "a.qcow2"),
        qcow2("b", "ov.qcow2", backing="r"),
        reopen(node("qcow2", "b", file="b-file")),
        reopen(node("qcow2", "b", file="b-file", backing="a")),
        DEEP,
        GRAPH,
        reopen(node("qcow2", "a", file="a-file", backing="b")),
        reopen(node("qcow2", "a", file="a-file"), node("qcow2", "b", file="b-file", backing=None)),
        DEEP,
        GRAPH,
        reopen(node("qcow2", "a", file="a-file", backing="x")),
        reopen(node("qcow2", "a", file="a-file", backing="r"), node("qcow2", "b", file="b-file")),
        reopen(node("qcow2", "a", file="a-file", backing="r"), node("qcow2", "b", file="b-file", backing="r")),
        DEEP,
        ask("blockdev-del", node_name="b"),
    ],
    "reopening windows and filters": [
        *GROUPS,
        add("raw", "r", file=file("a.raw", **{"node-name": "f"})),
        *[
            reopen(node("raw", "r", file="f", **window))
            for window in ({"offset": 512}, {"size": 1000}, {"offset": 8 << 20}, {"offset": 512, "size": 4 << 20})
        ],
        LIST,
        reopen(node("raw", "r", file="f", size=1024)),
        add("throttle", "t", throttle_group="g", file="r"),
        reopen(node("throttle", "t", throttle_group="h", file="r")),
        ask("object-del", id="h"),
        reopen(node("throttle", "t", throttle_group="x", file="r")),
        reopen(node("throttle", "t", throttle_group="g", file="t")),
        reopen(node("throttle", "t", throttle_group="g", file="f")),
        add("null-co", "m", size=1 << 20, read_zeroes=True),
        reopen(node("null-co", "m", size=1 << 20)),
        reopen(node("null-co", "m", size=2 << 20, read_zeroes=True)),
        reopen(node("null-co", "m", size=1 << 20, read_zeroes=True, read_only=True)),
        add("null-co", "m2", size=1 << 20),
        add("copy-before-write", "c", file="m2", target="m"),
        reopen(node("copy-before-write", "c", file="m2", target="m")),
        add("blkdebug", "d", align=4096, image="m2"),
        reopen(node("blkdebug", "d", image="m2")),
        reopen(node("blkdebug", "d", align=4096, image="m2", read_only=True)),
        reopen(node("blkdebug", "d", align=4096, image="m")),
        *[ask("blockdev-del", node_name=name) for name in ("t", "r")],
        *NO_GROUPS,
    ],
    "what a mirror holds": [
        qcow2("a", "a.qcow2"),
        qcow2("b", "b.qcow2"),
        ask("blockdev-mirror", job_id="j", device="a", target="b", sync="none", filter_node_name="m"),
        GRAPH,
        add("qcow2", "x", file="a"),
        add("qcow2", "x", file="b"),
        add("raw", "y", file="b", read_only=True),
        ask("block-job-cancel", device="j", force=True),
    ],
    "reopening above a commit": [
        qcow2("a", "a.qcow2"),
        qcow2("b", "b.qcow2", backing="a"),
        qcow2("o", "ov2.qcow2", backing="b"),
        add("null-co", "n", size=1 << 20),
        ask("block-commit", job_id="j", device="o", top_node="b", base_node="a", speed=1, auto_finalize=False),
        *[reopen(node("qcow2", "o", file="o-file", backing=backing)) for backing in ("a", None, "n", "x", "b")],
        add("raw", "y", file="b", read_only=True),
        ask("job-cancel", id="j"),
    ],
    "children of a quorum": [
        *[add("null-co", name, size=1 << 20, read_zeroes=True) for name in ("x", "y", "z")],
        add("quorum", "q", vote_threshold=2, children=["x", "y"]),
        *[
            ask("x-blockdev-change", **arguments)
            for arguments in (
                {"parent": "q"},
                {"parent": "q", "node": "z", "child": "children.0"},
                {"parent": "p", "node": "z"},
                {"parent": "q", "node": "p"},
                {"parent": "q", "child": "x"},
                {"parent": "q", "child": "children.0"},
                {"parent": "x", "node": "z"},
                {"parent": "q", "node": "z"},
                {"parent": "q", "node": "z"},
                {"parent": "q", "node": "q"},
                {"parent": "q", "child": "children.1"},
                {"parent": "q", "node": "y"},
            )
        ],
        GRAPH,
        LIST,
    ],
}
