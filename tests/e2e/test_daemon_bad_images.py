"""A broken or hostile image costs one error message: the daemon lives on, in time, in memory, and touches nothing."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import disks
import player
import pytest
from bad_images import BAD_IMAGES, CLUSTER, INCOMPATIBLE, L1_AT, u64

pytestmark = [pytest.mark.qemu, pytest.mark.serial]

ANSWER_S_MAX = 2.0
GROWTH_KIB_MAX = 128 << 10
CASES = [
    pytest.param(program, bad, id=f"{program.name}-{bad.name}")
    for program in player.PROGRAMS
    for bad in BAD_IMAGES
    if not (bad.ours_only and program is player.QEMU)
]


def memory_kib(pid, member):
    return int(re.search(rf"{member}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1])


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sound")
    image = disks.make(directory, "sound.qcow2", size="1M")
    disks.run("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 1M", image.name, cwd=directory)
    return image


@pytest.fixture(scope="module")
def daemon(program, tmp_path_factory):
    with player.Daemon(program, tmp_path_factory.mktemp("bad")) as daemon:
        daemon.idle_kib = memory_kib(daemon.process.pid, "VmRSS")
        node = {"driver": "null-co", "node-name": "target", "size": disks.MIB}
        assert daemon.qmp.ask({"execute": "blockdev-add", "arguments": node})[0] == {"return": {}}
        yield daemon


def open_image(qmp, image, *, read_only):
    file = {"driver": "file", "filename": str(image)}
    node = {"driver": "qcow2", "node-name": "bad", "read-only": read_only, "file": file}
    return qmp.ask({"execute": "blockdev-add", "arguments": node}, wait_s=ANSWER_S_MAX)[0]


def read_image(qmp):
    """Back the whole image up; return the error, or None."""
    job = {"job-id": "job0", "device": "bad", "target": "target", "sync": "full"}
    reply, events = qmp.ask({"execute": "blockdev-backup", "arguments": job}, wait_s=ANSWER_S_MAX)
    assert reply == {"return": {}}
    while not events or events[-1].get("data", {}).get("status") != "null":
        event = qmp.hear(wait_s=ANSWER_S_MAX)
        assert event is not None, f"the backup hangs after {events}"
        events.append(event)
    return next(event for event in events if event["event"] == "BLOCK_JOB_COMPLETED")["data"].get("error")


def close_image(qmp):
    assert qmp.ask({"execute": "blockdev-del", "arguments": {"node-name": "bad"}})[0] == {"return": {}}


@pytest.mark.parametrize(("program", "bad"), CASES, indirect=["program"])
def test_a_bad_image_is_one_clear_error(daemon, sound, tmp_path, bad):
    image = Path(shutil.copy(sound, tmp_path / "bad.qcow2"))
    bad.spoil(image)
    before = {path.name: disks.digest(path) for path in tmp_path.iterdir() if path.is_file()}
    started = time.monotonic()

    # Damage found while reading may be noted in the image if it is writable, so then only a reader's promise is tested.
    for read_only in (True, False) if bad.shows == "open" else (True,):
        reply = open_image(daemon.qmp, image, read_only=read_only)
        if "error" in reply:
            assert reply["error"]["class"] == "GenericError"
            error = reply["error"]["desc"]
            assert bad.shows != "read", f"refused although only one cluster is bad: {error}"
        else:
            assert bad.shows != "open", "the image was opened"
            error = read_image(daemon.qmp)
            close_image(daemon.qmp)
        assert error, "the damage was not noticed"
        assert bad.complaint in error

    assert time.monotonic() - started < ANSWER_S_MAX
    assert daemon.qmp.ask({"execute": "query-named-block-nodes", "arguments": {"flat": True}})[0]["return"][1:] == []
    assert memory_kib(daemon.process.pid, "VmHWM") - daemon.idle_kib < GROWTH_KIB_MAX
    assert {path.name: disks.digest(path) for path in tmp_path.iterdir() if path.is_file()} == before
    assert "Traceback" not in daemon.stderr


LAST_ENTRY = disks.MIB // CLUSTER - 1
MET_AT_RUN_TIME = {
    "backup": {
        "execute": "blockdev-backup",
        "arguments": {"job-id": "j", "device": "bad", "target": "t", "sync": "full"},
    },
    "snapshot": {"execute": "blockdev-snapshot-internal-sync", "arguments": {"device": "bad", "name": "s"}},
    "shrink": {"execute": "block_resize", "arguments": {"node-name": "bad", "size": disks.MIB // 2}},
}
LENIENT = (player.QEMU, "shrink")
"""QEMU lets go of an entry that it cannot free, and says so; ours refuses."""


def spoil_last_entry(image):
    """Let the entry of the disk's last cluster point at no cluster."""
    raw = image.read_bytes()
    l1_at = int.from_bytes(raw[L1_AT : L1_AT + 8])
    entry_at = (int.from_bytes(raw[l1_at : l1_at + 8]) & 0x00FF_FFFF_FFFF_FE00) + 8 * LAST_ENTRY
    image.write_bytes(raw[:entry_at] + u64(1 << 63 | 0x5_0200) + raw[entry_at + 8 :])


@pytest.mark.parametrize("request_name", MET_AT_RUN_TIME)
def test_a_broken_entry_met_at_run_time_is_an_event_and_a_mark(program, sound, tmp_path, request_name):
    image = Path(shutil.copy(sound, tmp_path / "bad.qcow2"))
    spoil_last_entry(image)
    with player.Daemon(program, tmp_path) as daemon:
        null = {"driver": "null-co", "node-name": "t", "size": disks.MIB}
        assert daemon.qmp.ask({"execute": "blockdev-add", "arguments": null})[0] == {"return": {}}
        assert open_image(daemon.qmp, image, read_only=False) == {"return": {}}
        reply, events = daemon.qmp.ask(MET_AT_RUN_TIME[request_name])
        while not any(event["event"] == "BLOCK_IMAGE_CORRUPTED" for event in events):
            event = daemon.qmp.hear(wait_s=10.0)
            assert event is not None, f"no event of it after {events}"
            events.append(event)
        [data] = [event["data"] for event in events if event["event"] == "BLOCK_IMAGE_CORRUPTED"]
        is_fatal = (program, request_name) != LENIENT
        assert ("error" in reply) == (is_fatal and request_name != "backup"), reply
        assert "unaligned" in data.pop("msg")
        assert data == {"device": "", "node-name": "bad", "fatal": is_fatal}
        while request_name == "backup" and events[-1].get("data", {}).get("status") != "null":
            event = daemon.qmp.hear(wait_s=10.0)
            assert event is not None, f"the backup hangs after {events}"
            events.append(event)
        assert bool(image.read_bytes()[INCOMPATIBLE + 7] & 2) == is_fatal
        close_image(daemon.qmp)
        assert "Traceback" not in daemon.stderr
        if is_fatal:
            error = open_image(daemon.qmp, image, read_only=False)["error"]["desc"]
            assert "Image is corrupt; cannot be opened read/write" in error
            assert open_image(daemon.qmp, image, read_only=True) == {"return": {}}
