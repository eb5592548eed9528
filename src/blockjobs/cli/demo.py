"""`make demo`: a throttled, compressed backup of a real disk, driven by a QMP client that others wrote."""

import asyncio
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from qemu.qmp import EventListener, QMPClient

from blockjobs.base.errors import BlockjobsError
from blockjobs.base.units import KiB, MiB, format_bytes
from blockjobs.block.users import Root
from blockjobs.cli.demo_disk import DISK_BYTES, build_disk
from blockjobs.host import Host

FOLDER: Final = Path("demo-run")
SLOW_BYTES_PER_S: Final = 48 * MiB
LIVE_BYTES_PER_S: Final = 160 * MiB
BAR: Final = 30


def say(text: str) -> None:
    """One line for the reader."""
    print(text, flush=True)


def on_disk(path: Path) -> str:
    """The space that a file takes."""
    return format_bytes(os.stat(path).st_blocks * 512)


class Script:
    """The client's part: QMP commands, and what they do to the job."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client
        self._statuses: list[str] = []

    async def run(self, disk: Path, target: Path) -> None:
        """Back up `disk` to `target` through every status that a backup can have."""
        ask = self._client.execute
        listener = EventListener(names={"JOB_STATUS_CHANGE"})
        with self._client.listen(listener):
            await self._prepare(disk, target)
            arguments = {"job-id": "demo", "device": "disk", "target": "target", "sync": "full", "compress": True}
            arguments |= {"speed": SLOW_BYTES_PER_S, "auto-finalize": False, "auto-dismiss": False}
            await ask("blockdev-backup", arguments)
            say(f"   blockdev-backup, compressed, at most {format_bytes(SLOW_BYTES_PER_S)}/s:")
            await self._show(2.0, "throttled")
            await ask("job-pause", {"id": "demo"})
            first = await self._show(0.5, "job-pause")
            second = await self._show(1.0, "nothing moves")
            assert first and second and first["current-progress"] == second["current-progress"], "a paused job moved"
            await ask("job-resume", {"id": "demo"})
            await self._show(1.0, "job-resume")
            await ask("block-job-set-speed", {"device": "demo", "speed": 0})
            while (await self._show(1.0, "no limit any more"))["status"] != "pending":
                pass
            say("   job-finalize: the target is on disk before the job says that it is complete")
            await ask("job-finalize", {"id": "demo"})
            ended = await self._job()
            assert ended["status"] == "concluded" and "error" not in ended, ended
            await ask("job-dismiss", {"id": "demo"})
            events = listener.history
        # qemu.qmp types the data of events loosely.
        statuses = [str(event["data"]["status"]) for event in events if event["data"]["id"] == "demo"]  # type: ignore[index]
        say(f"   its life, as events told it: {' > '.join(statuses)}")
        say("   (the first pause was the instant that the copy shows, with all writes held back; the second was ours)")
        await ask("quit")

    async def _prepare(self, disk: Path, target: Path) -> None:
        ask = self._client.execute
        source = {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": str(disk)}}
        await ask("blockdev-add", source)
        say("   blockdev-add: the overlay and, from its header, the base below it")
        await self._make({"driver": "file", "filename": str(target), "size": 0})
        await ask("blockdev-add", {"driver": "file", "node-name": "target-file", "filename": str(target)})
        await self._make({"driver": "qcow2", "file": "target-file", "size": DISK_BYTES, "compression-type": "zstd"})
        await ask("blockdev-add", {"driver": "qcow2", "node-name": "target", "file": "target-file"})
        say("   blockdev-create: an empty qcow2 image with zstd compression")

    async def _make(self, options: dict[str, Any]) -> None:
        await self._client.execute("blockdev-create", {"job-id": "make", "options": options})
        while (await self._job())["status"] != "concluded":
            await asyncio.sleep(0.01)
        ended = await self._job()
        assert "error" not in ended, ended
        await self._client.execute("job-dismiss", {"id": "make"})

    async def _job(self) -> dict[str, Any]:
        jobs: Any = await self._client.execute("query-jobs")
        found: dict[str, Any] = jobs[0]
        return found

    async def _show(self, seconds: float, note: str) -> dict[str, Any]:
        """Print the job's progress for a while, or until it has nothing to do; returns the last answer."""
        ends_s = time.monotonic() + seconds
        while True:
            await asyncio.sleep(0.5)
            job = await self._job()
            done, total = job["current-progress"], max(1, job["total-progress"])
            bar = "#" * (BAR * done // total)
            percent = f"{100 * done // total:3d} %"
            say(f"   [{bar:<{BAR}}] {percent}  {format_bytes(done):>9}  {job['status']:<8} {note}")
            if time.monotonic() >= ends_s or job["status"] == "pending":
                return job


@asynccontextmanager
async def daemon(socket: Path) -> AsyncIterator[QMPClient]:
    """The daemon as a process of its own, and a connection to it."""
    chardev = f"socket,id=qmp,path={socket},server=on,wait=off"
    process = subprocess.Popen([sys.executable, "-m", "blockjobs.daemon", "--chardev", chardev, "--monitor", "qmp"])
    try:
        while not socket.exists() and process.poll() is None:
            await asyncio.sleep(0.02)
        client = QMPClient("demo")
        await client.connect(str(socket))
        yield client
        with suppress(EOFError):  # after `quit` the daemon may hang up first
            await client.disconnect()
        assert process.wait(timeout=20) == 0, "the daemon did not stop cleanly"
    finally:
        process.kill()
        process.wait()


async def back_up_while_written(disk: Path, copy: Path) -> None:
    """The same in this process, as a library: a backup of a disk that a guest keeps writing to."""
    async with Host() as host:
        source = await host.open(str(disk), node_name="disk")
        await host.create_image(str(copy), "raw", source.length)
        target = await host.open(str(copy), format="raw")
        writes: list[int] = []
        async with host.access(source, write=True) as access, asyncio.TaskGroup() as group:
            job = await host.backup(source, target, speed_bytes_per_s=LIVE_BYTES_PER_S)
            guest = group.create_task(write_like_a_guest(access, writes))
            outcome = await job.outcome()
            guest.cancel()
        assert outcome.error is None, outcome.error
        say(f"   {len(writes)} random writes reached the disk during the backup")


async def write_like_a_guest(disk: Root, writes: list[int]) -> None:
    """Overwrite random places until cancelled."""
    chance = random.Random(5)
    while True:
        at = chance.randrange(DISK_BYTES // KiB - 64) * KiB
        await disk.node.write(at, chance.randbytes(16 * KiB))
        writes.append(at)
        await asyncio.sleep(0.002)


def check(title: str, *command: str, expect: int = 0) -> None:
    """Run a program that must end with the exit code `expect`, and show its first line."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    say(f"   {title}: {lines[0] if lines else 'ok'}")
    if done.returncode != expect:
        raise SystemExit(f"{title} failed:\n{done.stdout}{done.stderr}")


async def build() -> Path:
    """Make the disk."""
    async with Host() as host:
        return await build_disk(host, FOLDER)


async def drive(disk: Path, target: Path, socket: Path) -> None:
    """Start the daemon and have it make the backup."""
    async with daemon(socket) as client:
        await Script(client).run(disk, target)


def main() -> None:
    """Run the demonstration in ./demo-run."""
    began_s = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    say("1. Making a real disk: an ext4 file system with some 300 MiB of files, in a qcow2 overlay on a qcow2 base")
    disk = asyncio.run(build())
    target, live = FOLDER / "backup.qcow2", FOLDER / "live.raw"
    for path in (FOLDER / "base.qcow2", disk):
        say(f"   {path}: {on_disk(path)} on disk")
    say("2. Starting blockjobs-storage-daemon; the client is qemu.qmp from PyPI, which knows nothing of us")
    asyncio.run(drive(disk, target, FOLDER / "qmp.sock"))
    say("3. Is the backup bit-identical to the disk?")
    tool = (sys.executable, "-m", "blockjobs")
    check("blockjobs compare", *tool, "compare", str(disk), str(target))
    check("blockjobs check", *tool, "check", str(target))
    if shutil.which("qemu-img"):
        check("qemu-img compare", "qemu-img", "compare", str(disk), str(target))
        check("qemu-img check", "qemu-img", "check", str(target))
    say(f"   {target}: {on_disk(target)} on disk, compressed")
    say("4. The same as a library, while a guest writes to the disk: the copy must not see those writes")
    asyncio.run(back_up_while_written(disk, live))
    check("compare with the backup made before", *tool, "compare", str(live), str(target))
    check("compare with the disk as it is now ", *tool, "compare", str(live), str(disk), expect=1)
    say(
        f"\nDone in {time.monotonic() - began_s:.0f} s. A disk was copied as it was at one instant: under a speed "
        "limit, through a pause, and\nwhile it was written to; every byte was checked. The files are in ./demo-run. "
        "Try next:\n"
        "  .venv/bin/blockjobs info demo-run/backup.qcow2\n"
        "  .venv/bin/blockjobs backup demo-run/disk.qcow2 demo-run/plain.raw       (Ctrl-C leaves nothing behind)\n"
        "  .venv/bin/blockjobs serve demo-run/disk.qcow2 --qmp demo-run/qmp.sock   (it says how to go on)\n"
        "  .venv/bin/blockjobs --help"
    )


if __name__ == "__main__":
    try:
        main()
    except BlockjobsError as error:
        raise SystemExit(f"demo: {error}") from error
