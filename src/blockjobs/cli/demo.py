"""`make demo`: a throttled, compressed backup of a real disk, driven by a QMP client that others wrote."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from qemu.qmp import QMPClient

from blockjobs.base.errors import BlockjobsError
from blockjobs.base.units import MiB, format_bytes
from blockjobs.cli.demo_disk import build_disk
from blockjobs.host import Host

FOLDER: Final = Path("demo-run")
SLOW_BYTES_PER_S: Final = 48 * MiB


def say(text: str) -> None:
    """One line for the reader."""
    print(text, flush=True)


async def _show(client: QMPClient, seconds: float, note: str) -> dict[str, Any] | None:
    """Print the job's progress for a while; returns the last answer, None once the job is gone."""
    ends_s = time.monotonic() + seconds
    last = None
    while time.monotonic() < ends_s:
        jobs: Any = await client.execute("query-jobs")
        if not jobs or jobs[0]["status"] == "concluded":
            return None
        last = jobs[0]
        done, total = last["current-progress"], last["total-progress"]
        bar = "#" * (30 * done // max(1, total))
        say(f"   [{bar:<30}] {100 * done // max(1, total):3d} %  {format_bytes(done):>9}  {last['status']:<8} {note}")
        await asyncio.sleep(0.5)
    return last


async def _drive(socket: Path, disk: Path, target: Path) -> None:
    client = QMPClient("demo")
    await client.connect(str(socket))
    ask = client.execute
    size = 1024 * MiB
    source = {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": str(disk)}}
    await ask("blockdev-add", source)
    say("   blockdev-add disk: the overlay and, from its header, the base below it")
    for options in (
        {"driver": "file", "filename": str(target), "size": 0},
        {"driver": "qcow2", "file": "target-file", "size": size, "compression-type": "zstd"},
    ):
        await ask("blockdev-create", {"job-id": "make", "options": options})
        while (await ask("query-jobs"))[0]["status"] != "concluded":  # type: ignore[index, call-overload]
            await asyncio.sleep(0.01)
        await ask("job-dismiss", {"id": "make"})
        if options["driver"] == "file":
            await ask("blockdev-add", {"driver": "file", "node-name": "target-file", "filename": str(target)})
    await ask("blockdev-add", {"driver": "qcow2", "node-name": "target", "file": "target-file"})
    say("   blockdev-create target: an empty qcow2 image with zstd compression")
    arguments = {"job-id": "demo", "device": "disk", "target": "target", "sync": "full", "compress": True}
    await ask("blockdev-backup", {**arguments, "speed": SLOW_BYTES_PER_S, "auto-dismiss": False})
    say(f"   blockdev-backup, at most {format_bytes(SLOW_BYTES_PER_S)}/s:")
    await _show(client, 2.5, "throttled")
    await ask("job-pause", {"id": "demo"})
    await asyncio.sleep(0.2)
    first = await _show(client, 0.1, "job-pause")
    second = await _show(client, 1.0, "nothing moves")
    assert first and second and first["current-progress"] == second["current-progress"], "a paused job moved"
    await ask("job-resume", {"id": "demo"})
    await _show(client, 1.0, "job-resume")
    await ask("block-job-set-speed", {"device": "demo", "speed": 0})
    while await _show(client, 1.0, "no limit any more"):
        pass
    ended: Any = await ask("query-jobs")
    assert "error" not in ended[0], ended
    say("   the job has concluded without error; its target is on disk, not only in a cache")
    await ask("job-dismiss", {"id": "demo"})
    await ask("quit")
    await client.disconnect()


def _check(title: str, *command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    say(f"   {title}: {lines[0] if lines else 'ok'}")
    if done.returncode:
        raise SystemExit(f"{title} failed:\n{done.stdout}{done.stderr}")


async def _build() -> Path:
    async with Host() as host:
        return await build_disk(host, FOLDER)


def main() -> None:
    """Run the demonstration in ./demo-run."""
    began_s = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    say("1. Making a real disk: an ext4 file system with some 300 MiB of files, in a qcow2 overlay on a qcow2 base")
    disk = asyncio.run(_build())
    target, socket = FOLDER / "backup.qcow2", FOLDER / "qmp.sock"
    for path in (FOLDER / "base.qcow2", disk):
        say(f"   {path}: {format_bytes(os.stat(path).st_blocks * 512)} on disk")
    say("2. Starting blockjobs-storage-daemon; the client is qemu.qmp from PyPI, which knows nothing of us")
    chardev = f"socket,id=qmp,path={socket},server=on,wait=off"
    daemon = subprocess.Popen([sys.executable, "-m", "blockjobs.daemon", "--chardev", chardev, "--monitor", "qmp"])
    try:
        while not socket.exists() and daemon.poll() is None:
            time.sleep(0.02)
        asyncio.run(_drive(socket, disk, target))
        assert daemon.wait(timeout=20) == 0, "the daemon did not stop cleanly"
    finally:
        daemon.kill()
    say("3. Is the backup bit-identical to the disk?")
    tool = [sys.executable, "-m", "blockjobs"]
    _check("blockjobs compare", *tool, "compare", str(disk), str(target))
    _check("blockjobs check", *tool, "check", str(target))
    if shutil.which("qemu-img"):
        _check("qemu-img compare", "qemu-img", "compare", str(disk), str(target))
        _check("qemu-img check", "qemu-img", "check", str(target))
    say(f"   {target}: {format_bytes(os.stat(target).st_blocks * 512)} on disk, compressed")
    say(
        f"\nDone in {time.monotonic() - began_s:.0f} s. A live disk was copied as it was at one instant, under a speed "
        "limit, through a pause,\nand every byte was checked. The files are in ./demo-run. Try next:\n"
        "  .venv/bin/blockjobs info demo-run/backup.qcow2\n"
        "  .venv/bin/blockjobs backup demo-run/disk.qcow2 demo-run/plain.raw\n"
        "  .venv/bin/blockjobs serve demo-run/disk.qcow2 --qmp demo-run/qmp.sock &   then\n"
        "  .venv/bin/blockjobs jobs --connect demo-run/qmp.sock"
    )


if __name__ == "__main__":
    try:
        main()
    except BlockjobsError as error:
        raise SystemExit(f"demo: {error}") from error
