"""The same requests to QEMU's storage daemon and to ours: the same replies, but where a reason is written down.

Each story starts with an empty graph and the images of `_make_images`. What may differ anyhow (clocks, automatic names,
file sizes) is left to `compare`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import player
import pytest
from compare import Comparison
from filter_stories import STORIES as FILTER_STORIES
from graph_stories import STORIES as GRAPH_STORIES
from job_stories import STORIES as JOB_STORIES
from job_stories import Until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.qemu

MIB = 1 << 20


@dataclass(frozen=True)
class Ours:
    """A request that we answer otherwise than QEMU, on purpose."""

    request: dict[str, Any]
    answer: str | None
    """Part of our error's text; None if we succeed, and make a node `n`, which is then removed."""
    reason: str
    is_sent_to_qemu: bool = True


@dataclass(frozen=True)
class Job:
    """A request that starts a job, which is then waited for, looked at and dismissed."""

    request: dict[str, Any]


def ask(command: str, **arguments: Any) -> dict[str, Any]:
    return {"execute": command, "arguments": {name.replace("_", "-"): value for name, value in arguments.items()}}


def file(name: str, **options: Any) -> dict[str, Any]:
    return {"driver": "file", "filename": name, **options}


def add(driver: str, name: str = "n", **options: Any) -> dict[str, Any]:
    return ask("blockdev-add", driver=driver, node_name=name, **options)


def raw(**options: Any) -> dict[str, Any]:
    return add("raw", file=file("a.raw"), **options)


def qcow2(name: str = "a.qcow2", **options: Any) -> dict[str, Any]:
    return add("qcow2", file=file(name), **options)


def blkdebug(**options: Any) -> dict[str, Any]:
    return add("blkdebug", **{"image": file("a.raw"), **options})


def create(**options: Any) -> Job:
    return Job(ask("blockdev-create", job_id="j", options={"driver": "qcow2", "file": "f", "size": MIB, **options}))


def backup(**changes: Any) -> dict[str, Any]:
    given = {"job_id": "j", "device": "a", "target": "b", "sync": "full", **changes}
    return ask("blockdev-backup", **{name: value for name, value in given.items() if value is not ...})


def resize(name: str, size: Any) -> dict[str, Any]:
    return {"execute": "block_resize", "arguments": {"node-name": name, "size": size}}


def limits(**values: int) -> dict[str, Any]:
    return ask("object-add", qom_type="throttle-group", id="g", limits={k.replace("_", "-"): values[k] for k in values})


LIST = ask("query-named-block-nodes")
DEL = ask("blockdev-del", node_name="n")
PAIR = [
    add("qcow2", "a", file=file("a.qcow2", **{"node-name": "af"})),
    add("qcow2", "b", file=file("b.qcow2")),
    add("raw", "r", file=file("t.raw")),
]
NULLS_SIZE = "QEMU 7.2 dies of it."
NO_BLOCKDEV_FILE = "QEMU takes the format in the header for an option that contradicts the inline node."
EMPTY_IS_NOTHING = "QEMU's flattening of options stumbles over an empty list or object."

STORIES: dict[str, list[Any]] = {
    "properties": [
        limits(bps_total=1000, iops_total=5, iops_size=512),
        ask("object-add", qom_type="secret", id="s", data="abc"),
        *[ask("qom-list", path=path) for path in ("", "nope", "/objects/nope", "/objects/g/x", "x/g")],
        *[ask("qom-get", path=path, property="type") for path in ("/", "/objects", "g", "objects/g", "//objects//s")],
        *[ask("qom-get", path="g", property=name) for name in ("limits", "x-bps-total", "x-iops-total-max", "nope")],
        *[ask("qom-get", path="s", property=name) for name in ("data", "file", "format", "keyid", "iv", "nope")],
        *[ask("qom-get", path="/objects", property=name) for name in ("g", "nope")],
        *[
            ask("qom-set", path="/objects/g", property="limits", value=value)
            for value in (5, None, [], {"bogus": 1}, {"bps-total": "x"}, {"bps-total": -1}, {"bps-write": 1}, {})
        ],
        ask("qom-set", path="g", property="limits", value={"bps-total": 0, "bps-write": 65536}),
        ask("qom-get", path="g", property="limits"),
        ask("qom-set", path="g", property="limits", value={"iops-total": 0, "iops-size": 0}),
        ask("qom-get", path="g", property="limits"),
        ask("qom-set", path="g", property="x-bps-total", value=4),
        ask("qom-set", path="g", property="type", value="x"),
        ask("qom-set", path="s", property="nope", value=1),
        ask("qom-set", path="/objects", property="g", value="x"),
        ask("qom-set", path="nope", property="limits", value={}),
        ask("qom-set", path="g", property="limits"),
        ask("qom-get", path="g"),
        ask("qom-list"),
        *[ask("object-del", id=name) for name in "gs"],
    ],
    "file": [
        ask("blockdev-add"),
        add("nope"),
        ask("blockdev-add", driver="file", filename="a.raw"),
        *[add("file", name, filename="a.raw") for name in ("", "1x", "a b", "#x", "x" * 32)],
        *[add("file", filename=name) for name in ("missing", "dir", "", "/dev/zero", "file:a.raw", 1, None)],
        add("file", filename="a.raw", bogus=1),
        add("file", filename="a.raw", locking=True),
        add("file", filename="a.raw", aio="native"),
        add("file", filename="a.raw", pr_manager="p"),
        add("file", filename="a.raw", read_only=1),
        add("file", filename="a.raw", force_share=True),
        add("file", filename="a.raw", detect_zeroes="unmap"),
        add("file", filename="a.raw", cache={"direct": 1}),
        add("file", filename="a.raw", cache={"writeback": True}),
        Ours(add("file", filename="a.raw", cache={}), None, EMPTY_IS_NOTHING),
        add("file", filename="empty", auto_read_only=True, detect_zeroes="unmap", discard="unmap"),
        LIST,
        add("file", filename="t.raw"),
    ],
    "raw": [
        *[raw(offset=value) for value in (-1, 2**63 - 1, 2**63, 4 * MIB + 1, None, "1")],
        *[raw(size=value) for value in (513, 4 * MIB + 1, 2**64, 1e30, 1.0)],
        raw(offset=1, size=1),
        raw(offset=1000),
        LIST,
        DEL,
        raw(offset=512, size=512),
        LIST,
        DEL,
        *[add("raw", file=value) for value in (1, None, [], {}, "", {"driver": "file"}, file("a.raw", bogus=2))],
        add("raw", file=file("a.raw", **{"node-name": "n"})),
    ],
    "qcow2": [
        *[qcow2(name) for name in ("a.raw", "empty", "missing", "nob.qcow2")],
        *[qcow2(backing=value) for value in ("nope", "n", 1, True, {}, file("missing"), {"driver": "nope"})],
        qcow2("ov2.qcow2"),
        LIST,
        ask("query-named-block-nodes", flat=True),
        DEL,
        qcow2("ov2.qcow2", backing=None),
        LIST,
        DEL,
        qcow2(backing=""),
        DEL,
        qcow2("nob.qcow2", backing={"driver": "raw", "file": file("a.raw")}),
        LIST,
        DEL,
        Ours(qcow2("nob.qcow2", backing=file("a.raw")), None, NO_BLOCKDEV_FILE),
        add("qcow2", file={"driver": "raw", "offset": 0, "file": file("ov2.qcow2")}),
        LIST,
        DEL,
        *[qcow2(overlap_check=value) for value in ("some", 1, None, {"template": "x"}, {"main-header": 1})],
        qcow2(cache_size=1 << 16, l2_cache_size=1 << 20),
        qcow2(l2_cache_size=1 << 20, refcount_cache_size=1 << 20, cache_size=2 << 20),
        *[qcow2(l2_cache_entry_size=value) for value in (100, 1000, 131072)],
        qcow2(data_file="nope"),
        qcow2(data_file=file("a.raw")),
        qcow2(encrypt={"format": "x"}),
    ],
    "null": [
        Ours(add("null-co", size=-1), "expects a non-negative number", NULLS_SIZE, is_sent_to_qemu=False),
        add("null-co", size=2**63 - 2**30 + 1),
        add("null-co", size=2**63),
        add("null-co", latency_ns=2**63),
        add("null-co", size=1000, latency_ns=5, read_zeroes=True),
        LIST,
        DEL,
        add("null-aio", latency_ns=5),
        LIST,
    ],
    "filters": [
        *[limits(bps_total=value) for value in (-1, 10**15 + 1)],
        limits(bps_total=1, bps_read=1),
        limits(bps_total_max=1000),
        limits(bps_total=10, bps_total_max=20, bps_total_max_length=0),
        limits(bps_total=10, bps_total_max=20, bps_total_max_length=2**32),
        limits(bogus=1),
        limits(),
        limits(),
        add("throttle", throttle_group="zz", file=file("a.raw")),
        add("throttle", throttle_group="g", file={"driver": "qcow2", "file": file("ov2.qcow2")}),
        LIST,
        ask("object-del", id="g"),
        DEL,
        ask("object-del", id="g"),
        ask("object-del", id="g"),
        ask("object-add", qom_type="secret", id="s"),
        ask("object-add", qom_type="secret", id="s", data="x", file="a.raw"),
        ask("object-add", qom_type="secret", id="s", data="!!", format="base64"),
        *[blkdebug(align=value) for value in (100, -1, 1 << 40)],
        blkdebug(max_transfer=100),
        blkdebug(max_write_zero=1000),
        *[blkdebug(inject_error=value) for value in (1, {}, [1], [{}], [{"event": "nope"}])],
        *[blkdebug(inject_error=[{"event": "none", **rule}]) for rule in ({"state": -1}, {"iotype": "x"}, {"once": 1})],
        blkdebug(set_state=[{"event": "none", "new_state": 300}]),
        blkdebug(take_child_perms=["nope"]),
        DEL,
        Ours(blkdebug(inject_error=[]), None, EMPTY_IS_NOTHING),
        blkdebug(take_child_perms=["write"]),
        LIST,
        DEL,
        blkdebug(align=512, image={"driver": "null-co"}),
        LIST,
        DEL,
        add("copy-before-write", file=file("a.raw")),
        add("copy-before-write", file="nope", target=file("t.raw")),
    ],
    "resize": [
        *PAIR,
        add(
            "qcow2",
            "ro",
            read_only=True,
            file=file("ov2.qcow2"),
            backing={"driver": "qcow2", "node-name": "w", "file": file("ov.qcow2")},
        ),
        *[resize("a", size) for size in (-1, "1", 1.5, None, 1000, 2**62, 2**63 - 1, 2**63)],
        resize("nope", 512),
        {"execute": "block_resize", "arguments": {"device": "a", "size": 512}},
        {"execute": "block_resize", "arguments": {"size": 512}},
        resize("ro", MIB),
        resize("af", MIB),
        resize("w", MIB),
        resize("a", 8 * MIB),
        resize("a", 0),
        ask("blockdev-del", node_name="w"),
        ask("blockdev-del", node_name="af"),
    ],
    "create": [
        ask("blockdev-create", job_id="j", options={}),
        ask("blockdev-create", job_id="j", options={"driver": "raw", "file": "x"}),
        ask("blockdev-create", job_id="j", options={"driver": "null-co"}),
        ask("blockdev-create", job_id="1x", options=file("new", size=1)),
        *[Job(ask("blockdev-create", job_id="j", options=file("new", size=size))) for size in (2**64 - 1, MIB)],
        Job(ask("blockdev-create", job_id="j", options=file("dir", size=1))),
        Job(ask("blockdev-create", job_id="j", options=file("new", size=MIB, preallocation="metadata"))),
        add("file", "f", filename="new"),
        *[create(size=size) for size in (1000, 2**62, 2**64 - 512)],
        *[create(**{"cluster-size": size}) for size in (0, 256, 1000, 1 << 22)],
        *[create(**{"refcount-bits": bits}) for bits in (0, 3, 128)],
        create(version="v2", **{"lazy-refcounts": True}),
        create(version="v2", **{"refcount-bits": 8}),
        create(**{"backing-fmt": "raw"}),
        create(**{"backing-file": "x" * 1024}),
        create(**{"backing-file": "a.raw", "preallocation": "metadata"}),
        create(**{"extended-l2": True, "cluster-size": 8192}),
        create(**{"data-file-raw": True}),
        create(**{"compression-type": "zstd", "version": "v2"}),
        create(file="nope"),
        create(),
    ],
    "backup": [
        *PAIR,
        *[backup(job_id=value) for value in (..., "", "1", 1)],
        *[backup(target=value) for value in (..., "zz", "a", "af", {"driver": "file"})],
        *[backup(sync=value) for value in (..., "nope", "incremental", "bitmap")],
        backup(bitmap_mode="always"),
        *[backup(speed=value) for value in (-1, "1", 2**63)],
        backup(on_source_error="nope"),
        backup(compress=True, target="r"),
        *[backup(filter_node_name=value) for value in ("a", "1x", "x" * 32)],
        *[backup(x_perf=value) for value in (1, {"bogus": 1}, {"max-workers": 0}, {"max-chunk": -1}, {"max-chunk": 1})],
        backup(bogus=1),
        Job(backup(auto_dismiss=False)),
        backup(sync="none", filter_node_name="fl"),
        *[ask("blockdev-del", node_name=name) for name in ("fl", "a", "b")],
        resize("b", 8 * MIB),
        backup(job_id="k", device="r"),
        backup(job_id="k", device="b", target="r"),
        backup(job_id="j", target="r"),
        *[ask(f"job-{verb}", id="j") for verb in ("complete", "finalize", "dismiss")],
        ask("block-job-set-speed", device="j", speed=-1),
        ask("block-job-set-speed", device="zz", speed=1),
        ask("job-cancel", id="zz"),
    ],
    "transaction": [
        *PAIR,
        *[ask("transaction", actions=[action]) for action in (1, {}, {"type": "nope"}, {"type": "abort"})],
        ask("transaction", actions=[{"type": "abort", "data": {"x": 1}}]),
        ask("transaction", actions=[{"type": "abort", "data": {}}]),
        ask("transaction", actions=[{"type": "blockdev-backup", "data": {}}]),
        ask("transaction", actions=[], properties={"completion-mode": "x"}),
        ask("transaction", actions={}),
        *[
            ask("drive-backup", **{"job_id": "j", "device": "a", "target": "new", "sync": "full", **changes})
            for changes in (
                {"target": "missing/x"},
                {"target": "json:{}"},
                {"format": "nope"},
                {"format": "null-co"},
                {"mode": "existing", "target": "missing"},
                {"target": "a.qcow2"},
                {"speed": -1},
            )
        ],
    ],
    "rights": [
        add("file", "f", filename="a.qcow2"),
        add("qcow2", "q1", file="f"),
        add("qcow2", "q2", file="f"),
        add("qcow2", "q3", read_only=True, file="f"),
        *[ask("blockdev-del", node_name=name) for name in ("f", "q1", "q3", "f")],
        add("qcow2", "a", file=file("a.qcow2")),
        add("qcow2", "a2", file=file("a.qcow2")),
        add("qcow2", "a2", read_only=True, file=file("a.qcow2")),
        add("qcow2", "a2", read_only=True, force_share=True, file=file("a.qcow2")),
        add("raw", "a3", file=file("a.qcow2")),
        *[ask("blockdev-del", node_name=name) for name in ("a", "a2", "a3")],
        add("raw", "base", file=file("a.raw")),
        add("qcow2", "o1", file=file("b.qcow2"), backing="base"),
        add("qcow2", "o2", file=file("a.qcow2"), backing="base"),
        ask("blockdev-del", node_name="base"),
        backup(device="o1", target="base"),
        ask("query-jobs"),
        LIST,
        backup(device="base", target="o1", sync="none"),
        *[ask("blockdev-del", node_name=name) for name in ("o1", "base", "o2")],
        ask("job-cancel", id="j"),
    ],
    "rights of filters": [
        add("file", "s", filename="a.raw"),
        add("blkdebug", "b1", image="s", take_child_perms=["write"], unshare_child_perms=["write"]),
        add("blkdebug", "b2", image="s", take_child_perms=["write"]),
        add("blkdebug", "b3", image="s", take_child_perms=["resize"]),
        add("blkdebug", "b4", image="s", unshare_child_perms=["write"]),
        add("blkdebug", "b5", image="s", read_only=True, take_child_perms=["write"]),
        ask("blockdev-del", node_name="s"),
        *[ask("blockdev-del", node_name=name) for name in ("b1", "b2", "b3", "b4", "b5", "s")],
        *PAIR,
        backup(sync="none"),
        add("raw", "x", file="a"),
        add("raw", "y", file="b"),
        add("qcow2", "z", read_only=True, file=file("b.qcow2")),
        add("qcow2", "z", file=file("ov.qcow2"), backing="b"),
    ],
    **FILTER_STORIES,
    **GRAPH_STORIES,
    **JOB_STORIES,
}


@dataclass(frozen=True)
class Side:
    """One of the two daemons, in a directory of its own with the same images."""

    daemon: player.Daemon
    directory: Path

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        return self.daemon.qmp.ask(request)[0]

    def wait(self, status: str) -> dict[str, Any]:
        """Until the first job has the status, or there is none."""
        deadline = time.monotonic() + 10
        while (jobs := self.ask(ask("query-jobs")))["return"] and jobs["return"][0]["status"] != status:
            assert time.monotonic() < deadline, jobs
        return jobs

    def conclude(self, job_id: str) -> dict[str, Any]:
        jobs = self.wait("concluded")
        self.ask(ask("job-dismiss", id=job_id))
        return jobs

    def clear(self) -> None:
        """Cancel jobs, remove nodes and objects, put the images back."""
        for job in self.ask(ask("query-jobs"))["return"]:
            self.ask(ask("job-cancel", id=job["id"]))
            self.conclude(job["id"])
        for _ in range(4):  # users before what they use
            for node in self.ask(LIST)["return"]:
                self.ask(ask("blockdev-del", node_name=node["node-name"]))
        assert self.ask(LIST) == {"return": []}
        shutil.copytree(self.directory / "images", self.directory, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Side, Side]]:
    images = tmp_path_factory.mktemp("images")
    _make_images(images)
    directories = [tmp_path_factory.mktemp(name) for name in ("qemu", "ours")]
    for directory in directories:
        shutil.copytree(images, directory / "images")
    with player.Daemon(player.QEMU, directories[0]) as qemu, player.Daemon(player.OURS, directories[1]) as ours:
        yield Side(qemu, directories[0]), Side(ours, directories[1])
        assert "Traceback" not in ours.stderr


def _make_images(directory: Path) -> None:
    for name, size in (("a.raw", 4 * MIB), ("t.raw", 4 * MIB), ("empty", 0)):
        (directory / name).write_bytes(bytes(size))
    (directory / "dir").mkdir()
    for words in (
        ["a.qcow2", "4M"],
        ["b.qcow2", "4M"],
        *(["-b", f"{below}.qcow2", "-F", "qcow2", f"{name}.qcow2"] for below, name in ("a1", "12", "23")),
        *([f"{name}.qcow2", "4M"] for name in ("e", "t")),
        ["longer.qcow2", "8M"],
        ["-b", "a.raw", "-F", "raw", "ov.qcow2", "8M"],
        ["-b", "ov.qcow2", "-F", "qcow2", "ov2.qcow2"],
        ["-u", "-b", "missing", "-F", "qcow2", "nob.qcow2", "4M"],
    ):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words], cwd=directory, check=True)


@pytest.mark.parametrize("story", STORIES)
def test_both_daemons_answer_alike(story: str, sides: tuple[Side, Side]) -> None:
    qemu, ours = sides
    for side in sides:
        side.clear()
    comparison = Comparison()
    found: list[str] = []
    for number, step in enumerate(STORIES[story]):
        match step:
            case Ours():
                if step.is_sent_to_qemu:
                    found += _as_we_mean_it(step, qemu.ask(step.request), ours.ask(step.request), number)
                else:
                    found += _as_we_mean_it(step, {"return": "no reply"}, ours.ask(step.request), number)
                if step.answer is None:
                    ours.ask(DEL)
                continue
            case Until(status):
                for side in sides:
                    assert side.wait(status)["return"], "the job is gone"
                continue
            case Job(request):
                replies = [(side.ask(request), side.conclude("j")) for side in sides]
            case request:
                replies = [(side.ask(request),) for side in sides]
        told = [line for pair in zip(*replies, strict=True) for line in comparison.differences(*pair, str(number))]
        found += [f"{json.dumps(request)[:200]}: {line}" for line in told]
    assert not found, "\n".join(found)


def _as_we_mean_it(step: Ours, theirs: dict[str, Any], mine: dict[str, Any], number: int) -> Iterator[str]:
    said = mine.get("error", {}).get("desc")
    if (step.answer is None) != (said is None) or (step.answer or "") not in (said or ""):
        yield f"{number}: {mine}, although {step.reason}"
    if theirs == mine:
        yield f"{number}: no difference any more: {step.reason}"
