"""A pause or a drain does not wait for the end of a batch, and what was moved counts."""

import asyncio
import random
from collections.abc import Callable

import pytest

from blockjobs.base.units import KiB, MiB
from blockjobs.block import execute
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.jobs.backup import prepare_blockdev_backup
from blockjobs.jobs.backup_options import BlockdevBackup
from blockjobs.jobs.chain_options import BlockStream
from blockjobs.jobs.mirror_options import BlockdevMirror
from blockjobs.jobs.mirror_start import start_blockdev_mirror
from blockjobs.jobs.stream_start import start_stream
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.status import JobStatus
from blockjobs.schema.command import convert
from blockjobs.testing.child import MemoryChild
from blockjobs.testing.clock import run
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.little_host import LittleHost

SIZE = 8 * MiB
STRIDE = 256 * KiB
STRIDES_MAX = 2
"""One of each batch in flight."""
CONTENT = random.Random(3).randbytes(SIZE)


class Hooked(SimDisk):
    """Calls `hook` after the first bytes that come after it was set; as a user would, while a worker moves a batch."""

    hook: Callable[[], object] | None = None

    def write(self, at: int, content: object) -> None:
        super().write(at, content)
        hook, self.hook = self.hook, None
        if hook is not None:
            hook()


async def start(host: LittleHost, kind: str) -> JobHandle:
    plain = {"job-id": "job0", "device": "source", "target": "target", "sync": "full", "speed": 1}
    async with host.jobs.control:
        if kind == "stream":
            return await start_stream(host, convert({"job-id": "job0", "device": "target", "speed": 1}, BlockStream))
        if kind == "mirror":
            return await start_blockdev_mirror(host, convert({**plain, "buf-size": MiB}, BlockdevMirror))
        job = await prepare_blockdev_backup(host, convert(plain, BlockdevBackup))
        job.start()
        return job


async def hooked_target(host: LittleHost, kind: str, format: str) -> Hooked:
    disk = Hooked()
    if format == "raw":
        disk.truncate(SIZE)
        await host.disk("target", b"", medium=disk)
        return disk
    made, image = MemoryChild(), NewImage(size=SIZE)
    await create_image(made, None, image)
    disk.write(0, bytes(made.content))
    await host.qcow2("target", image, medium=disk, backing="source" if kind == "stream" else None)
    return disk


async def under_way(host: LittleHost, kind: str, format: str) -> tuple[Hooked, JobHandle]:
    """A job that owes the bytes of its first chunk, and its target."""
    await host.disk("source", CONTENT)
    disk = await hooked_target(host, kind, format)
    job = await start(host, kind)
    await host.clock.sleep_until(host.clock.now_ns() + 10**9)
    return disk, job


CASES = [("backup", "raw"), ("backup", "qcow2"), ("mirror", "raw"), ("mirror", "qcow2"), ("stream", "qcow2")]


@pytest.mark.parametrize(("kind", "format"), CASES)
def test_a_pause_takes_effect_after_a_stride(kind: str, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "STRIDE_BYTES", STRIDE)
    monkeypatch.setattr(execute, "TOGETHER_BYTES", STRIDE)

    async def main() -> None:
        async with LittleHost() as host:
            disk, job = await under_way(host, kind, format)
            before = job.progress.current
            assert before < 2 * MiB
            for _ in range(4):
                disk.hook = job.pause
                job.set_speed(0)
                await job.reached(JobStatus.PAUSED)
                assert before + STRIDE <= job.progress.current <= before + STRIDES_MAX * STRIDE
                before = job.progress.current
                job.resume()
            if kind == "mirror":
                await job.reached(JobStatus.READY)
                job.complete()
            outcome = await job.outcome()
            assert outcome.error is None and outcome.current == outcome.total == SIZE
            assert await host.graph.node("target").read(0, SIZE) == CONTENT

    run(main())


@pytest.mark.parametrize(("kind", "format"), CASES)
def test_a_drain_takes_effect_after_a_stride(kind: str, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "STRIDE_BYTES", STRIDE)
    monkeypatch.setattr(execute, "TOGETHER_BYTES", STRIDE)

    async def main() -> None:
        async with LittleHost() as host:
            disk, job = await under_way(host, kind, format)
            before = job.progress.current
            disk.hook = job.quiesce_begin
            job.set_speed(0)
            while disk.hook is not None:
                await asyncio.sleep(0)
            await job.quiet()
            assert before + STRIDE <= job.progress.current <= before + STRIDES_MAX * STRIDE
            assert not len(host.graph.node("target").in_flight)
            job.quiesce_end()
            await job.cancel()
            await job.outcome()

    run(main())
