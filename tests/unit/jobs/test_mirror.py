import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.jobs.block_job import block_job_info
from blockjobs.jobs.mirror_options import BlockdevMirror, MirrorCopyMode
from blockjobs.jobs.mirror_start import start_blockdev_mirror
from blockjobs.lifecycle.events import JobStatusChange
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.registry import JobType
from blockjobs.lifecycle.status import JobStatus
from blockjobs.monitor.commands.block_jobs import BlockJobChange
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.host import SlowOffload
from blockjobs.testing.little_host import LittleHost

SIZE = 4 * MiB
CONTENT = random.Random(1).randbytes(2 * MiB) + bytes(1 * MiB) + random.Random(2).randbytes(1 * MiB)


async def mirror(host: LittleHost, **members: object) -> JobHandle:
    plain = {"job-id": "job0", "device": "source", "target": "target", "sync": "full"}
    plain |= {name.replace("_", "-"): value for name, value in members.items()}
    async with host.jobs.control:
        return await start_blockdev_mirror(host, convert(plain, BlockdevMirror))


def on_disks(scenario: Callable[[LittleHost], Awaitable[None]]) -> None:
    """Run a scenario with a raw source that holds CONTENT and a raw target of zeroes."""

    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            await host.disk("target", SIZE)
            await scenario(host)

    run(main())


def statuses(host: LittleHost) -> list[str]:
    return [str(each.status) if isinstance(each, JobStatusChange) else type(each).__name__ for each in host.events]


def target_content(host: LittleHost) -> bytes:
    return host.disks["target"].pages.read(0, SIZE)


def test_a_completed_mirror_moves_the_guest_to_the_target() -> None:
    async def scenario(host: LittleHost) -> None:
        guest = await host.guest(host.graph.node("source"))
        job = await mirror(host)
        await job.reached(JobStatus.READY)
        assert target_content(host) == CONTENT
        assert guest.node.driver_name == "mirror_top"
        job.complete()
        assert (await job.outcome()).error is None
        assert guest.node.name == "target"
        await guest.node.write(0, b"there")
        assert target_content(host)[:5] == b"there"
        assert host.disks["source"].pages.read(0, 5) == CONTENT[:5]
        assert statuses(host) == [
            "created", "running", "ready", "BlockJobReady", "waiting", "pending", "BlockJobCompleted", "concluded",
            "null",
        ]  # fmt: skip
        assert [node.name for node in host.graph.nodes()] == ["target", "source"]
        assert not host.graph.node("source").bitmaps
        await host.graph.release(guest)

    on_disks(scenario)


def test_a_soft_cancel_ends_well_and_leaves_the_guest_where_it_is() -> None:
    async def scenario(host: LittleHost) -> None:
        guest = await host.guest(host.graph.node("source"))
        job = await mirror(host)
        await job.reached(JobStatus.READY)
        await guest.node.write(1 * MiB, b"late")
        await job.block_cancel()
        outcome = await job.outcome()
        assert (outcome.error, outcome.current, outcome.total) == (None, SIZE + 64 * KiB, SIZE + 64 * KiB)
        assert guest.node.name == "source"
        assert target_content(host) == CONTENT[: 1 * MiB] + b"late" + CONTENT[1 * MiB + 4 :]
        await host.graph.release(guest)

    on_disks(scenario)


def test_a_forced_cancel_of_a_ready_job() -> None:
    async def scenario(host: LittleHost) -> None:
        job = await mirror(host)
        await job.reached(JobStatus.READY)
        await job.cancel()
        assert (await job.outcome()).error == "Operation canceled"
        assert [node.name for node in host.graph.nodes()] == ["target", "source"]

    on_disks(scenario)


def test_the_source_lists_the_map_and_the_filter_shows_what_is_below() -> None:
    async def scenario(host: LittleHost) -> None:
        job = await mirror(host, filter_node_name="above", granularity=4096)
        above, source = host.graph.node("above"), host.graph.node("source")
        assert [(each.name, each.map.granularity) for each in source.bitmaps] == [(None, 4096)]
        assert above.children == {"backing": source} and above.filename == "source"
        await job.cancel()
        await job.outcome()

    on_disks(scenario)


def test_both_sides_have_a_guests_write_when_it_returns_in_write_blocking_mode() -> None:
    async def scenario(host: LittleHost) -> None:
        guest = await host.guest(host.graph.node("source"))
        job = await mirror(host, copy_mode="write-blocking")
        assert not block_job_info(job).actively_synced
        await job.reached(JobStatus.READY)
        assert block_job_info(job).actively_synced
        await guest.node.write(100, b"now")
        await guest.node.flush()
        host.disks["target"].cut_power(seed=1)
        assert target_content(host)[100:103] == b"now"
        assert host.disks["source"].pages.read(100, 3) == b"now"
        # A granule that was written to in part is as clean as it was.
        assert block_job_info(job).actively_synced
        assert (job.progress.current, job.progress.total) == (SIZE + 3, SIZE + 3)
        await guest.node.zero(Span(0, 64 * KiB))
        assert target_content(host)[: 64 * KiB] == bytes(64 * KiB)
        await job.cancel()
        await job.outcome()
        await host.graph.release(guest)

    on_disks(scenario)


def test_a_guests_write_to_both_sides_ends_well_when_the_job_is_cancelled_meanwhile() -> None:
    async def main() -> None:
        async with LittleHost(offload=SlowOffload(1, latency_s_max=0.01)) as host:
            await host.disk("source", CONTENT)
            await host.disk("target", SIZE)
            guest = await host.guest(host.graph.node("source"))
            job = await mirror(host, copy_mode="write-blocking")
            await job.reached(JobStatus.READY)
            async with asyncio.TaskGroup() as tasks:
                for at in range(0, SIZE, 64 * KiB):
                    tasks.create_task(guest.node.write(at, b"now"))
                await asyncio.sleep(0)
                await job.cancel()
            assert (await job.outcome()).error == "Operation canceled"
            assert await guest.node.read(64 * KiB, 3) == b"now"
            await host.graph.release(guest)

    run(main())


def test_the_mode_changes_one_way() -> None:
    async def scenario(host: LittleHost) -> None:
        job = await mirror(host)
        background = BlockJobChange(id="job0", type=JobType.MIRROR, copy_mode=MirrorCopyMode.BACKGROUND)
        blocking = BlockJobChange(id="job0", type=JobType.MIRROR, copy_mode=MirrorCopyMode.WRITE_BLOCKING)
        job.change(background)
        job.change(blocking)
        job.change(blocking)
        with pytest.raises(UsageError, match="Change to copy mode 'background' is not implemented"):
            job.change(background)
        await job.reached(JobStatus.READY)
        job.complete()
        assert (await job.outcome()).error is None

    on_disks(scenario)


def test_a_read_only_source_gives_way_to_a_target_that_is_read_only_then() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            image = NewImage(size=1 * MiB)
            made = await host.qcow2("first", image)
            async with host.graph.drained(made):
                pass
            target = await host.qcow2("target", image)
            await host.graph.set_read_only(made, read_only=True)
            reader = await host.graph.claim("a reader", made, needs=Perm.CONSISTENT_READ, shares=ALL)
            job = await mirror(host, device="first")
            await job.reached(JobStatus.READY)
            job.complete()
            assert (await job.outcome()).error is None
            assert reader.node is target and target.read_only
            await host.graph.release(reader)

    run(main())


def test_zeroes_stay_sparse_and_a_promise_saves_writes() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", 4 * MiB)
            host.disks["source"].write(1 * MiB, b"x" * MiB)
            await host.disk("target", b"\0" * 4 * MiB)
            job = await mirror(host, target_is_zero=True)
            await job.reached(JobStatus.READY)
            assert (job.progress.current, job.progress.total) == (1 * MiB, 1 * MiB)
            await job.cancel()
            await job.outcome()

    run(main())


def test_a_target_that_can_unmap_is_made_zero_first() -> None:
    async def scenario(host: LittleHost) -> None:
        host.disks["source"].zero(2 * MiB, 1 * MiB, unmap=True)
        host.disks["target"].write(0, b"\xff" * SIZE)
        await host.add(driver="raw", node_name="sparse", file="target", discard="unmap")
        job = await mirror(host, target="sparse")
        await job.reached(JobStatus.READY)
        assert (job.progress.current, job.progress.total) == (3 * MiB, 3 * MiB)
        assert target_content(host) == CONTENT
        assert host.disks["target"].allocated_size() == 3 * MiB
        await job.cancel()
        await job.outcome()

    on_disks(scenario)


REFUSALS = [
    ({"device": "nope"}, "Cannot find device='nope' nor node-name='nope'"),
    ({"target": "nope"}, "Cannot find device='nope' nor node-name='nope'"),
    ({"device": "below"}, "Need a root block node"),
    ({"granularity": 256, "sync": "bitmap"}, "Parameter 'granularity' expects a value in range [512B, 64MB]"),
    ({"granularity": 1000}, "Parameter 'granularity' expects a power of 2"),
    ({"replaces": "nope", "sync": "incremental"}, "Failed to find node with node-name='nope'"),
    (
        {"replaces": "small"},
        "Cannot replace 'small' by a node mirrored from 'source', because it cannot be guaranteed that doing so would "
        "not lead to an abrupt change of visible data",
    ),
    ({"sync": "incremental", "buf_size": -1}, "Sync mode 'incremental' not supported"),
    ({"buf_size": -1, "target": "source"}, "Invalid parameter 'buf-size'"),
    ({"target": "source", "filter_node_name": "target"}, "Can't mirror node into itself"),
    ({"filter_node_name": "target", "speed": -1}, "Duplicate nodes with node-name='target'"),
    ({"job_id": "1x"}, "Invalid job ID '1x'"),
    ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
    ({"target": "ro"}, "Block node is read-only"),
]


@pytest.mark.parametrize(("members", "text"), REFUSALS)
def test_refusals_have_qemus_words_and_leave_nothing_behind(members: dict[str, object], text: str) -> None:
    async def scenario(host: LittleHost) -> None:
        await host.disk("small", 1 * MiB)
        await host.disk("readonly", SIZE)
        await host.disk("below", SIZE)
        await host.add(driver="raw", node_name="above", file="below")
        await host.add(driver="raw", node_name="ro", read_only=True, file="readonly")
        before = [node.name for node in host.graph.nodes()]
        with pytest.raises(UsageError) as refused:
            await mirror(host, **members)
        assert str(refused.value) == text
        assert [node.name for node in host.graph.nodes()] == before
        assert not host.jobs.jobs() and not host.graph.node("source").bitmaps
        created = members in ({"speed": -1}, {"target": "ro"})
        assert statuses(host) == (["created", "null"] if created else [])

    on_disks(scenario)


def test_another_length_fails_the_job_when_it_runs() -> None:
    async def scenario(host: LittleHost) -> None:
        await host.disk("small", 1 * MiB)
        job = await mirror(host, target="small")
        assert (await job.outcome()).error == "Source and target image have different sizes"

    on_disks(scenario)


def test_a_throttled_job_copies_a_whole_run_at_once_and_waits_before_it_is_ready() -> None:
    async def scenario(host: LittleHost) -> None:
        job = await mirror(host, speed=1024)
        await host.clock.sleep_until(host.clock.now_ns() + 10**9)
        assert (job.progress.current, job.progress.total, job.status) == (SIZE, SIZE, JobStatus.RUNNING)
        await host.clock.sleep_until(host.clock.now_ns() + 4094 * 10**9)
        assert job.status is JobStatus.RUNNING
        await job.reached(JobStatus.READY)
        assert host.clock.now_ns() >= 4096 * 10**9
        await job.cancel()
        await job.outcome()

    on_disks(scenario)


def test_scattered_clusters_travel_together_and_none_is_cut() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            chance = random.Random(4)
            size = 96 * MiB
            await host.disk("source", size)
            for granule in chance.sample(range(size // (64 * KiB)), 500):
                host.disks["source"].write(granule * 64 * KiB, chance.randbytes(64 * KiB))
            await host.disk("target", size)
            await host.add(driver="raw", node_name="sparse", file="target", discard="unmap")
            job = await mirror(host, target="sparse")
            await job.reached(JobStatus.READY)
            assert host.disks["target"].pages == host.disks["source"].pages
            assert job.progress.total == 500 * 64 * KiB
            # Batches, not clusters: each batch costs the job a few checkpoints.
            assert host.jobs.get("job0").status is JobStatus.READY
            await job.cancel()
            await job.outcome()

    run(main())
