"""Backups driven by a QMP client that others wrote, judged by qemu-img."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import disks
import player
import pytest
from qemu.qmp import QMPClient

pytestmark = pytest.mark.qemu

WAIT_S = 20
JOB_EVENTS = ["JOB_STATUS_CHANGE", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", "BLOCK_JOB_PENDING", "BLOCK_JOB_ERROR"]


@asynccontextmanager
async def connected(directory):
    client = QMPClient("e2e")
    await client.connect(str(directory / "qmp.sock"))
    try:
        yield client
    finally:
        await client.disconnect()


async def add(client, name, fmt):
    node = {"driver": fmt, "node-name": name, "file": {"driver": "file", "filename": name}}
    assert await client.execute("blockdev-add", node) == {}


async def next_event(listener, name):
    async with asyncio.timeout(WAIT_S):
        while True:
            event = await listener.get()
            if event["event"] == name:
                return event["data"]


async def reached(listener, status):
    while (await next_event(listener, "JOB_STATUS_CHANGE"))["status"] != status:
        pass


def stop(process):
    process.terminate()
    assert process.wait(WAIT_S) == 0


@pytest.mark.parametrize(
    ("source_fmt", "target_fmt", "options"),
    [
        ("raw", "raw", {}),
        ("raw", "qcow2", {}),
        ("qcow2", "raw", {}),
        ("qcow2", "qcow2", {}),
        ("qcow2", "qcow2", {"compress": True}),
        ("qcow2", "qcow2", {"sync": "top"}),
        ("qcow2", "qcow2", {"x-perf": {"use-copy-range": True, "max-workers": 3, "max-chunk": 131072}}),
    ],
)
def test_a_backup_is_identical(program, tmp_path, source_fmt, target_fmt, options):
    disks.make_full(tmp_path, "src", fmt=source_fmt)
    target = disks.make(tmp_path, "dst", fmt=target_fmt)
    process = player.launch(program, tmp_path)

    async def dialogue():
        async with connected(tmp_path) as client:
            await add(client, "src", source_fmt)
            await add(client, "dst", target_fmt)
            with client.listener(JOB_EVENTS) as listener:
                arguments = {"job-id": "job0", "device": "src", "target": "dst", "sync": "full", **options}
                assert await client.execute("blockdev-backup", arguments) == {}
                return await next_event(listener, "BLOCK_JOB_COMPLETED")

    completed = asyncio.run(dialogue())
    stop(process)
    assert "error" not in completed
    assert completed["len"] == completed["offset"] > 0
    assert disks.same_content(tmp_path, "src", source_fmt, "dst", target_fmt)
    if target_fmt == "qcow2":
        assert disks.check_exit_code(target) == 0
        assert (disks.compressed_clusters(target) > 0) == options.get("compress", False)


def test_a_person_slows_pauses_resumes_and_finalizes(program, tmp_path):
    disks.make_full(tmp_path, "src")
    target = disks.make(tmp_path, "dst")
    process = player.launch(program, tmp_path)

    async def dialogue():
        async with connected(tmp_path) as client:
            await add(client, "src", "qcow2")
            await add(client, "dst", "qcow2")
            with client.listener(JOB_EVENTS) as listener:
                speed = {"speed": 1 << 20, "auto-finalize": False, "auto-dismiss": False}
                arguments = {"job-id": "job0", "device": "src", "target": "dst", "sync": "full", **speed}
                await client.execute("blockdev-backup", arguments)
                while (await client.execute("query-jobs"))[0]["current-progress"] == 0:
                    await asyncio.sleep(0.02)
                await client.execute("job-pause", {"id": "job0"})
                await reached(listener, "paused")
                await asyncio.sleep(0.05)
                before = await client.execute("query-jobs")
                await asyncio.sleep(0.25)
                assert await client.execute("query-jobs") == before, "a paused job made progress"
                assert before[0]["status"] == "paused"
                await client.execute("job-resume", {"id": "job0"})
                await client.execute("block-job-set-speed", {"device": "job0", "speed": 0})
                await next_event(listener, "BLOCK_JOB_PENDING")
                await client.execute("job-finalize", {"id": "job0"})
                await next_event(listener, "BLOCK_JOB_COMPLETED")
                await reached(listener, "concluded")
                await client.execute("job-dismiss", {"id": "job0"})
                await reached(listener, "null")
                assert await client.execute("query-jobs") == []

    asyncio.run(dialogue())
    stop(process)
    assert disks.same_content(tmp_path, "src", "qcow2", "dst", "qcow2")
    assert disks.check_exit_code(target) == 0


def test_create_then_back_up_into_what_was_created(program, tmp_path):
    disks.make_full(tmp_path, "src")
    process = player.launch(program, tmp_path)

    async def create(client, listener, options):
        await client.execute("blockdev-create", {"job-id": "create", "options": options})
        await reached(listener, "concluded")
        assert "error" not in (await client.execute("query-jobs"))[0]
        await client.execute("job-dismiss", {"id": "create"})

    async def dialogue():
        async with connected(tmp_path) as client:
            await add(client, "src", "qcow2")
            with client.listener(JOB_EVENTS) as listener:
                await create(client, listener, {"driver": "file", "filename": "dst", "size": 0})
                await client.execute("blockdev-add", {"driver": "file", "filename": "dst", "node-name": "f"})
                size = {"size": 16 * disks.MIB, "compression-type": "zstd"}
                await create(client, listener, {"driver": "qcow2", "file": "f", **size})
                await client.execute("blockdev-add", {"driver": "qcow2", "file": "f", "node-name": "dst"})
                arguments = {"job-id": "job0", "device": "src", "target": "dst", "sync": "full", "compress": True}
                await client.execute("blockdev-backup", arguments)
                assert "error" not in await next_event(listener, "BLOCK_JOB_COMPLETED")

    asyncio.run(dialogue())
    stop(process)
    assert disks.same_content(tmp_path, "src", "qcow2", "dst", "qcow2")
    assert disks.check_exit_code(tmp_path / "dst") == 0


def test_drive_backup_makes_its_own_target(program, tmp_path):
    disks.make_full(tmp_path, "src")
    process = player.launch(program, tmp_path)

    async def dialogue():
        async with connected(tmp_path) as client:
            await add(client, "src", "qcow2")
            with client.listener(JOB_EVENTS) as listener:
                target = {"target": "new.qcow2", "format": "qcow2"}
                await client.execute("drive-backup", {"job-id": "job0", "device": "src", "sync": "full", **target})
                assert "error" not in await next_event(listener, "BLOCK_JOB_COMPLETED")

    asyncio.run(dialogue())
    stop(process)
    assert disks.same_content(tmp_path, "src", "qcow2", "new.qcow2", "qcow2")
    assert disks.check_exit_code(tmp_path / "new.qcow2") == 0


def test_a_group_backs_up_two_disks_as_one(program, tmp_path):
    for letter in "ab":
        disks.make_full(tmp_path, f"src{letter}", mib=4)
        disks.make(tmp_path, f"dst{letter}", size="4M")
    process = player.launch(program, tmp_path)

    async def dialogue():
        async with connected(tmp_path) as client:
            for letter in "ab":
                await add(client, f"src{letter}", "qcow2")
                await add(client, f"dst{letter}", "qcow2")
            jobs = [{"job-id": f"job{x}", "device": f"src{x}", "target": f"dst{x}", "sync": "full"} for x in "ab"]
            actions = [{"type": "blockdev-backup", "data": job} for job in jobs]
            with client.listener(JOB_EVENTS) as listener:
                grouped = {"completion-mode": "grouped"}
                await client.execute("transaction", {"actions": actions, "properties": grouped})
                done = [await next_event(listener, "BLOCK_JOB_COMPLETED") for _ in jobs]
                assert [event["device"] for event in done] == ["jobb", "joba"]

    asyncio.run(dialogue())
    stop(process)
    for letter in "ab":
        assert disks.same_content(tmp_path, f"src{letter}", "qcow2", f"dst{letter}", "qcow2")
