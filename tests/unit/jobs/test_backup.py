import errno
import random
from collections.abc import Awaitable, Callable

import pytest

from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.units import KiB, MiB
from blockjobs.jobs.block_job import block_job_info
from blockjobs.jobs.events import BlockJobError
from blockjobs.jobs.transaction import TransactionAction, run_transaction
from blockjobs.lifecycle.error_policy import IoStatus
from blockjobs.lifecycle.events import JobStatusChange
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.status import JobStatus
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.little_host import LittleHost, make_disk

SIZE = 4 * MiB
CONTENT = random.Random(1).randbytes(2 * MiB) + bytes(1 * MiB) + random.Random(2).randbytes(1 * MiB)


async def backup(host: LittleHost, **members: object) -> JobHandle:
    plain = {"job-id": "job0", "device": "source", "target": "target", "sync": "full"}
    plain |= {name.replace("_", "-"): value for name, value in members.items()}
    await run_transaction(host, [convert({"type": "blockdev-backup", "data": plain}, TransactionAction)])
    return host.jobs.get(str(plain["job-id"]))


def statuses(host: LittleHost, job: str = "job0") -> list[str]:
    return [
        each.status if isinstance(each, JobStatusChange) else type(each).__name__
        for each in host.events
        if getattr(each, "id", None) == job or getattr(each, "device", None) == job
    ]


def on_disks(scenario: Callable[[LittleHost], Awaitable[None]]) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            await host.disk("target", SIZE)
            await scenario(host)

    run(main())


def target_content(host: LittleHost) -> bytes:
    return host.disks["target"].pages.read(0, SIZE)


def test_a_full_backup_copies_everything_and_shows_qemus_events() -> None:
    async def scenario(host: LittleHost) -> None:
        job = await backup(host)
        assert statuses(host) == ["created", "running", "paused", "running"]
        outcome = await job.outcome()
        assert outcome.error is None and outcome.current == outcome.total == SIZE
        assert statuses(host)[4:] == ["waiting", "pending", "BlockJobCompleted", "concluded", "null"]
        assert target_content(host) == CONTENT
        assert [node.name for node in host.graph.nodes()] == ["target", "source"]
        await host.graph.remove("target")

    on_disks(scenario)


def test_what_reads_as_zeroes_on_both_sides_is_not_written() -> None:
    async def scenario(host: LittleHost) -> None:
        host.disks["source"].zero(2 * MiB, 1 * MiB, unmap=True)
        await (await backup(host)).outcome()
        assert host.disks["target"].allocated_size() == 3 * MiB

    on_disks(scenario)


def test_zeroes_overwrite_what_the_target_held() -> None:
    async def scenario(host: LittleHost) -> None:
        host.disks["source"].zero(2 * MiB, 1 * MiB, unmap=True)
        host.disks["target"].write(0, b"\xff" * SIZE)
        await (await backup(host)).outcome()
        assert target_content(host) == CONTENT

    on_disks(scenario)


def test_the_target_is_durable_when_the_job_has_completed() -> None:
    async def scenario(host: LittleHost) -> None:
        await (await backup(host)).outcome()
        host.disks["target"].cut_power(seed=1)
        assert target_content(host) == CONTENT

    on_disks(scenario)


def test_guest_writes_do_not_reach_the_backup() -> None:
    async def scenario(host: LittleHost) -> None:
        guest = await host.guest(host.graph.node("source"))
        job = await backup(host, speed=64 * KiB, auto_finalize=False)
        await guest.node.write(3 * MiB + 100, b"new" * 1000)
        await guest.node.write(10, b"early")
        job.set_speed(0)
        await job.reached(JobStatus.PENDING)
        await guest.node.write(1 * MiB, b"while pending")
        assert target_content(host) == CONTENT
        await job.finalize()
        assert target_content(host) == CONTENT
        assert await guest.node.read(10, 5) == b"early"
        assert guest.node.name == "source"
        await host.graph.release(guest)

    on_disks(scenario)


def test_sync_none_saves_only_what_guests_overwrite_and_ends_by_cancel() -> None:
    async def scenario(host: LittleHost) -> None:
        guest = await host.guest(host.graph.node("source"))
        job = await backup(host, sync="none")
        await guest.node.write(1 * MiB + 5, b"x")
        assert (job.progress.current, job.progress.total) == (64 * KiB, SIZE)
        expected = bytearray(SIZE)
        expected[1 * MiB : 1 * MiB + 64 * KiB] = CONTENT[1 * MiB : 1 * MiB + 64 * KiB]
        assert target_content(host) == expected
        await job.cancel()
        outcome = await job.outcome()
        assert outcome.error == "Operation canceled"
        assert statuses(host)[4:] == ["aborting", "BlockJobCancelled", "concluded", "null"]
        await host.graph.release(guest)

    on_disks(scenario)


def test_a_throttled_job_goes_in_chunks_of_a_mebibyte() -> None:
    async def scenario(host: LittleHost) -> None:
        job = await backup(host, speed=1024)
        await host.clock.sleep_until(host.clock.now_ns() + 10**9)
        info = block_job_info(job)
        assert (info.offset, info.len, info.speed, info.status) == (1 * MiB, SIZE, 1024, JobStatus.RUNNING)
        assert not info.busy and not info.paused
        await host.clock.sleep_until(host.clock.now_ns() + 1023 * 10**9 - 10**6)
        assert job.progress.current == 1 * MiB
        await host.clock.sleep_until(host.clock.now_ns() + 2 * 10**9)
        # The third mebibyte is a hole in neither sense: it is stored zeroes, and counts.
        assert job.progress.current == 2 * MiB
        job.set_speed(0)
        assert (await job.outcome()).error is None

    on_disks(scenario)


def test_a_fast_throttled_job_moves_a_tenth_of_a_second_at_once() -> None:
    async def scenario(host: LittleHost) -> None:
        job = await backup(host, speed=20 * MiB)
        begun_ns = host.clock.now_ns()
        await host.clock.sleep_until(begun_ns + 10**6)
        assert job.progress.current == 2 * MiB
        assert (await job.outcome()).error is None
        assert host.clock.now_ns() - begun_ns == 10**9 * SIZE // (20 * MiB)

    on_disks(scenario)


def test_a_paused_job_stands_still_until_it_is_resumed() -> None:
    async def scenario(host: LittleHost) -> None:
        job = await backup(host, speed=1024)
        job.pause()
        await job.reached(JobStatus.PAUSED)
        job.set_speed(0)
        await host.clock.sleep_until(host.clock.now_ns() + 10**10)
        at_rest = job.progress.current
        assert block_job_info(job).paused
        await host.clock.sleep_until(host.clock.now_ns() + 10**10)
        assert job.progress.current == at_rest < SIZE
        job.resume()
        assert (await job.outcome()).error is None
        assert target_content(host) == CONTENT

    on_disks(scenario)


async def _faulty(host: LittleHost, name: str, content: bytes | int, *faults: Fault) -> FaultPlan:
    """A disk below a filter that watches, so that requests are QEMU's chunks and nothing is retried."""
    plan = FaultPlan(list(faults))
    host.disks[name] = make_disk(content)
    await host.disk(f"{name}-file", b"", medium=FaultyMedium(host.disks[name], plan))
    watch = [{"event": "none", "iotype": "flush", "sector": 1}]
    rules = watch + [{"event": "read_aio", "iotype": each} for each in ("read", "write")]
    await host.add(driver="blkdebug", node_name=name, image=f"{name}-file", inject_error=rules)
    return plan


def test_a_read_error_is_reported_after_the_other_chunks_and_fails_the_job() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await _faulty(host, "source", CONTENT, Fault(nth=1, operation=Operation.READ))
            await host.disk("target", SIZE)
            job = await backup(host, auto_dismiss=False)
            outcome = await job.outcome()
            assert (outcome.error, outcome.current, outcome.total) == ("Input/output error", 3 * MiB, SIZE)
            assert statuses(host)[4:] == ["BlockJobError", "aborting", "BlockJobCompleted", "concluded"]
            assert block_job_info(job).error == "Input/output error"

    run(main())


def test_an_ignored_error_is_tried_again() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await _faulty(host, "source", CONTENT, Fault(nth=2, operation=Operation.READ))
            await host.disk("target", SIZE)
            outcome = await (await backup(host, on_source_error="ignore")).outcome()
            assert outcome.error is None
            assert [each for each in host.events if isinstance(each, BlockJobError)] == [
                BlockJobError(device="job0", operation="read", action="ignore")
            ]
            assert target_content(host) == CONTENT

    run(main())


def test_a_full_target_stops_the_job_until_it_is_resumed() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            plan = await _faulty(
                host, "target", SIZE, Fault(nth=1, operation=Operation.WRITE, errno=errno.ENOSPC, times=10**6)
            )
            job = await backup(host, on_target_error="enospc")
            await job.reached(JobStatus.PAUSED)
            await host.clock.sleep_until(host.clock.now_ns() + 10**9)
            info = block_job_info(job)
            assert (info.io_status, info.paused, info.busy) == (IoStatus.NOSPACE, True, False)
            assert any(each == BlockJobError(device="job0", operation="write", action="stop") for each in host.events)
            plan.cure()
            job.resume()
            assert (await job.outcome()).error is None
            assert target_content(host) == CONTENT

    run(main())


def test_a_permanent_ignored_error_can_be_paused_and_cancelled() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await _faulty(host, "source", CONTENT, Fault(nth=1, operation=Operation.READ, times=10**9))
            await host.disk("target", SIZE)
            job = await backup(host, on_source_error="ignore")
            await host.clock.sleep_until(host.clock.now_ns() + 10**9)
            job.pause()
            await job.reached(JobStatus.PAUSED)
            job.resume()
            await job.cancel()
            assert (await job.outcome()).error == "Operation canceled"

    run(main())


def test_a_failing_flush_fails_the_job() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            host.disks["target"] = make_disk(SIZE)
            medium = FaultyMedium(host.disks["target"], [Fault(nth=1, operation=Operation.SYNC)])
            await host.disk("target", b"", medium=medium)
            outcome = await (await backup(host)).outcome()
            assert outcome.error == "Input/output error"
            assert statuses(host)[4:6] == ["BlockJobError", "aborting"]

    run(main())


def test_plain_copies_that_fail_are_repeated_through_the_doors_and_blamed_there() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            host.disks["target"] = make_disk(SIZE)
            plan = FaultPlan([Fault(nth=2, operation=Operation.WRITE, times=10**6, errno=errno.ENOSPC)])
            await host.disk("target", b"", medium=FaultyMedium(host.disks["target"], plan))
            job = await backup(host, on_target_error="stop")
            await job.reached(JobStatus.PAUSED)
            await job.reached(JobStatus.PAUSED)
            plan.cure()
            job.resume()
            assert (await job.outcome()).error is None
            assert target_content(host) == CONTENT

    run(main())


def test_a_guest_write_fails_when_its_old_content_cannot_be_saved() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            await _faulty(host, "target", SIZE, Fault(nth=1, operation=Operation.WRITE, errno=errno.ENOSPC, times=99))
            guest = await host.guest(host.graph.node("source"))
            job = await backup(host, sync="none")
            with pytest.raises(IoFailure, match="No space left on device"):
                await guest.node.write(0, b"never")
            assert await guest.node.read(0, 5) == CONTENT[:5]
            assert job.status is JobStatus.RUNNING
            assert not any(isinstance(each, BlockJobError) for each in host.events)
            await job.cancel()
            await job.outcome()
            await host.graph.release(guest)

    run(main())


def test_break_snapshot_lets_the_guest_write_and_fails_the_job() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            await _faulty(host, "target", SIZE, Fault(nth=1, operation=Operation.WRITE, errno=errno.ENOSPC, times=99))
            guest = await host.guest(host.graph.node("source"))
            job = await backup(host, sync="none", on_cbw_error="break-snapshot")
            await guest.node.write(0, b"through")
            assert await guest.node.read(0, 7) == b"through"
            assert (await job.outcome()).error == "No space left on device"
            await host.graph.release(guest)

    run(main())


REFUSALS = [
    ({"device": "nope"}, "Cannot find device='nope' nor node-name='nope'"),
    ({"target": "nope"}, "Cannot find device='nope' nor node-name='nope'"),
    ({"target": "source"}, "Source and target cannot be the same"),
    ({"target": "small"}, "Source and target image have different sizes"),
    ({"sync": "incremental"}, "must provide a valid bitmap name for 'incremental' sync mode"),
    ({"sync": "bitmap"}, "must provide a valid bitmap name for 'bitmap' sync mode"),
    ({"sync": "bitmap", "bitmap": "b"}, "Bitmap 'b' could not be found"),
    (
        {"sync": "incremental", "bitmap": "b", "bitmap_mode": "never"},
        "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
    ),
    ({"bitmap_mode": "always"}, "Cannot specify bitmap sync mode without a bitmap"),
    ({"compress": True}, "Compression is not supported for this drive "),
    ({"x_perf": {"max-workers": 0}}, "max-workers must be between 1 and 2147483647"),
    ({"x_perf": {"max-chunk": -1}}, "max-chunk must be zero (which means no limit) or positive"),
    ({"x_perf": {"max-chunk": 512}}, "Required max-chunk (512) is less than backup cluster size (65536)"),
    ({"filter_node_name": "target"}, "Could not create node: Duplicate nodes with node-name='target'"),
    ({"filter_node_name": "1bad"}, "Could not create node: Invalid node-name: '1bad'"),
    ({"job_id": "1x"}, "Invalid job ID '1x'"),
    ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
    ({"target": "ro"}, "Could not create node: Block node is read-only"),
]


@pytest.mark.parametrize(("members", "text"), REFUSALS)
def test_refusals_have_qemus_words_and_leave_nothing_behind(members: dict[str, object], text: str) -> None:
    async def scenario(host: LittleHost) -> None:
        await host.disk("small", 1 * MiB)
        await host.disk("readonly", SIZE)
        await host.add(driver="raw", node_name="ro", read_only=True, file="readonly")
        before = [node.name for node in host.graph.nodes()]
        with pytest.raises(UsageError) as refused:
            await backup(host, **members)
        assert str(refused.value) == text
        assert [node.name for node in host.graph.nodes()] == before
        assert not host.jobs.jobs()
        assert statuses(host) == (["created", "null"] if "speed" in members else [])

    on_disks(scenario)


def test_nodes_of_a_running_job_are_busy() -> None:
    async def scenario(host: LittleHost) -> None:
        job = await backup(host, sync="none", filter_node_name="flt")
        for name in ("target", "flt"):
            with pytest.raises(UsageError, match=f"Node '{name}' is busy: block device is in use by block job: backup"):
                await host.graph.remove(name)
        with pytest.raises(UsageError, match="Block device source is in use"):
            await host.graph.remove("source")
        with pytest.raises(UsageError, match=r"'resize' are both required by .* and unshared by node 'flt'"):
            await host.graph.resize(host.graph.node("source"), 2 * SIZE)
        host.graph.node("source").check_op("backup-source")
        await job.cancel()
        await job.outcome()
        await host.graph.remove("target")
        await host.graph.remove("source")

    on_disks(scenario)


def test_two_backups_of_one_source_run_side_by_side() -> None:
    async def scenario(host: LittleHost) -> None:
        await host.disk("other", SIZE)
        guest = await host.guest(host.graph.node("source"))
        first = await backup(host, speed=1024)
        second = await backup(host, job_id="job1", target="other", speed=1024)
        await guest.node.write(3 * MiB, b"late")
        first.set_speed(0)
        await first.outcome()
        await guest.node.write(1 * MiB, b"later")
        second.set_speed(0)
        await second.outcome()
        assert target_content(host) == CONTENT
        changed = bytearray(CONTENT)
        changed[1 * MiB : 1 * MiB + 5] = b"later"
        changed[3 * MiB : 3 * MiB + 4] = b"late"
        assert host.disks["other"].pages.read(0, SIZE) == CONTENT
        assert host.disks["source"].pages.read(0, SIZE) == changed
        await host.graph.release(guest)

    on_disks(scenario)


def test_an_empty_disk_is_backed_up_at_once() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", 0)
            await host.disk("target", 0)
            outcome = await (await backup(host)).outcome()
            assert (outcome.error, outcome.current, outcome.total) == (None, 0, 0)

    run(main())


def test_a_length_that_is_no_whole_cluster() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            content = CONTENT[: 64 * KiB + 512]
            await host.disk("source", content)
            await host.disk("target", len(content))
            outcome = await (await backup(host)).outcome()
            assert (outcome.error, outcome.current, outcome.total) == (None, len(content), len(content))
            assert host.disks["target"].pages.read(0, len(content)) == content

    run(main())
