"""Stories for test_live_replies about the arguments of the job commands: every check, its text and their order."""

from __future__ import annotations

from typing import Any, NamedTuple

from graph_stories import ask, qcow2

Request = dict[str, Any]

CHAIN = [
    qcow2("base", "a.qcow2", read_only=True),
    qcow2("mid", "1.qcow2", read_only=True, backing="base"),
    qcow2("low", "2.qcow2", read_only=True, backing="mid"),
    qcow2("top", "3.qcow2", backing="low"),
    qcow2("alone", "e.qcow2"),
]
CANCEL = ask("job-cancel", id="j")


class Until(NamedTuple):
    """The next step comes when the only job has this status: before, the two daemons may be at different points."""

    status: str


def job(command: str, **defaults: Any) -> Any:
    def request(**changes: Any) -> Request:
        given = {"job_id": "j", **defaults, **changes}
        return ask(command, **{name: value for name, value in given.items() if value is not ...})

    return request


stream = job("block-stream", device="top")
commit = job("block-commit", device="top")
mirror = job("blockdev-mirror", device="alone", target="t", sync="full")
drive_mirror = job("drive-mirror", device="top", target="missing", sync="full")
backup = job("blockdev-backup", device="top", target="alone", sync="full")
drive_backup = job("drive-backup", device="top", sync="none", mode="existing")

STORIES: dict[str, list[Any]] = {
    "stream": [
        *CHAIN,
        *[stream(job_id=value) for value in (..., "", "1")],
        stream(base="a.qcow2", base_node="base"),
        stream(base="a.qcow2", bottom="mid"),
        stream(base_node="base", bottom="mid"),
        stream(device="zz", base="a.qcow2", base_node="base"),
        stream(device="zz"),
        *[stream(base=value) for value in ("zz", "3.qcow2")],
        *[stream(base_node=value) for value in ("zz", "top", "alone", "top-file", "base-file")],
        *[stream(bottom=value) for value in ("zz", "alone", "base-file", "top-file")],
        stream(backing_file="x"),
        stream(bottom="mid", backing_file="x"),
        *[stream(filter_node_name=value) for value in ("top", "1", "x" * 32)],
        *[stream(speed=value) for value in (-1, "1")],
        stream(on_error="zz"),
        ask("query-jobs"),
    ],
    "commit": [
        *CHAIN,
        *[commit(job_id=value) for value in (..., "", "1")],
        *[commit(job_id=value, top_node="mid") for value in (..., "", "1")],
        *[commit(device=value) for value in ("zz", "low", "alone", "top-file")],
        commit(top_node="mid", top="1.qcow2"),
        commit(base_node="mid", base="1.qcow2"),
        *[commit(top_node=value) for value in ("zz", "alone", "base", "top-file", "mid-file")],
        *[commit(base_node=value) for value in ("zz", "alone", "top", "base-file")],
        *[commit(top=value) for value in ("zz", "a.qcow2")],
        *[commit(base=value) for value in ("zz", "3.qcow2")],
        commit(top_node="mid", base_node="mid"),
        commit(top_node="base", base_node="mid"),
        commit(top="1.qcow2", base="1.qcow2"),
        *[commit(backing_file="x", **more) for more in ({}, {"top_node": "top"}, {"top": "3.qcow2"})],
        *[commit(filter_node_name=value) for value in ("top", "1")],
        *[commit(top_node="mid", filter_node_name=value) for value in ("top", "1")],
        *[commit(speed=-1, **more) for more in ({}, {"top_node": "mid"})],
        commit(on_error="zz"),
        ask("query-named-block-nodes", flat=True),
    ],
    "mirror": [
        *CHAIN,
        qcow2("t", "t.qcow2"),
        qcow2("longer", "longer.qcow2"),
        *[mirror(job_id=value) for value in (..., "", "1")],
        *[mirror(device=value) for value in ("zz", "alone-file", "low")],
        *[mirror(target=value) for value in ("zz", "alone", 1)],
        *[mirror(sync=value) for value in ("incremental", "bitmap", "zz")],
        *[mirror(granularity=value) for value in (1, 256, 768, 1000, 1 << 27, 1 << 32, "x")],
        *[mirror(replaces=value) for value in ("zz", "t", "alone-file", "longer")],
        *[mirror(filter_node_name=value) for value in ("alone", "1", "x" * 32)],
        *[mirror(copy_mode=value) for value in ("zz", 1)],
        mirror(buf_size=-1),
        mirror(buf_size=-1, replaces="zz"),
        mirror(buf_size=-1, target="alone"),
        mirror(sync="bitmap", granularity=1),
        mirror(sync="bitmap", replaces="zz"),
        mirror(granularity=1, target="alone"),
        *[drive_mirror(**changes) for changes in ({"format": "zz"}, {"mode": "existing"}, {"target": "zz/x"})],
        drive_mirror(replaces="top"),
        drive_mirror(format="raw", sync="top"),
        ask("query-jobs"),
        # What a job holds is not a root node, but its source is not one for another reason.
        mirror(filter_node_name="filter", auto_finalize=False),
        *[mirror(job_id="k", device=name, target="longer") for name in ("alone", "t", "filter")],
        *[commit(job_id="k", device=name) for name in ("alone", "t", "filter")],
        *[backup(job_id="k", device=name, target="longer") for name in ("alone", "t", "filter")],
        *[ask("blockdev-del", node_name=name) for name in ("alone", "t", "filter")],
        *[{"execute": "block_resize", "arguments": {"node-name": name, "size": 1 << 23}} for name in ("alone", "t")],
    ],
    "backup of a chain": [
        *CHAIN,
        *[drive_backup(target=name, format=kind) for name, kind in (("t.raw", "raw"), ("zz", "qcow2"))],
        drive_backup(target="t.raw", format="raw", sync="top", auto_finalize=False, speed=1),
        Until("pending"),
        ask("query-named-block-nodes"),
        CANCEL,
        backup(sync="none", filter_node_name="filter"),
        {"execute": "block_resize", "arguments": {"node-name": "top", "size": 1 << 23}},
        {"execute": "block_resize", "arguments": {"node-name": "alone", "size": 1 << 23}},
        mirror(job_id="k", device="filter", target="mid"),
    ],
}
