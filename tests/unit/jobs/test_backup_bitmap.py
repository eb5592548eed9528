"""Backups by dirty bitmaps: what is copied, and what the bitmap holds afterwards (spec/jobs.md §4)."""

import errno
import random
from collections.abc import Awaitable, Callable

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block import bitmaps
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.bitmaps import BlockDirtyBitmapAdd
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.jobs.transaction import (
    ActionCompletionMode,
    TransactionAction,
    TransactionProperties,
    run_transaction,
)
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.status import JobStatus
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.little_host import LittleHost, make_disk

SIZE = 4 * MiB
CLUSTER = 64 * KiB
CONTENT = random.Random(1).randbytes(SIZE)


def action(**members: object) -> TransactionAction:
    plain = {"job-id": "job0", "device": "source", "target": "target", "bitmap": "b"}
    plain |= {name.replace("_", "-"): value for name, value in members.items()}
    return convert({"type": "blockdev-backup", "data": plain}, TransactionAction)


async def backup(host: LittleHost, **members: object) -> JobHandle:
    (job,) = await run_transaction(host, [action(**members)])
    return job


def add_bitmap(node: Node, *, granularity: int = CLUSTER, **members: bool) -> NodeBitmap:
    bitmap = NodeBitmap(map=DirtyBitmap(node.length, granularity), name="b", **members)
    node.attach_bitmap(bitmap)
    return bitmap


def spans(bitmap: DirtyBitmap) -> list[tuple[int, int]]:
    return [(run.at, run.length) for run in bitmap.runs()]


def on_disks(scenario: Callable[[LittleHost], Awaitable[None]], *, size: int = SIZE) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT[:size])
            await host.disk("target", size)
            await scenario(host)

    run(main())


def target_content(host: LittleHost, size: int = SIZE) -> bytes:
    return host.disks["target"].pages.read(0, size)


BEFORE, MEANWHILE = Span(0, 2 * CLUSTER), Span(1 * MiB, CLUSTER)
AFTERWARDS = {
    # sync, mode: what remains after success, cancel while pending, and cancel before anything was copied
    ("incremental", None): ([MEANWHILE], [BEFORE, MEANWHILE], [BEFORE, MEANWHILE]),
    ("bitmap", "on-success"): ([MEANWHILE], [BEFORE, MEANWHILE], [BEFORE, MEANWHILE]),
    ("bitmap", "never"): ([BEFORE, MEANWHILE], [BEFORE, MEANWHILE], [BEFORE, MEANWHILE]),
    ("bitmap", "always"): ([MEANWHILE], [MEANWHILE], [BEFORE, MEANWHILE]),
    ("full", "on-success"): ([MEANWHILE], [BEFORE, MEANWHILE], [BEFORE, MEANWHILE]),
    ("full", "always"): ([MEANWHILE], [MEANWHILE], [Span(0, SIZE)]),
    ("top", "always"): ([MEANWHILE], [MEANWHILE], [Span(0, SIZE)]),
}


@pytest.mark.parametrize(("sync", "mode"), AFTERWARDS)
@pytest.mark.parametrize("ending", ["success", "cancel while pending", "cancel at once"])
def test_what_the_bitmap_holds_afterwards(sync: str, mode: str | None, ending: str) -> None:
    async def scenario(host: LittleHost) -> None:
        source = host.graph.node("source")
        bitmap = add_bitmap(source)
        guest = await host.guest(source)
        await guest.node.write(0, b"x" * BEFORE.length)
        at_once = ending == "cancel at once"
        members = {} if mode is None else {"bitmap_mode": mode}
        job = await backup(host, sync=sync, auto_finalize=False, **members)
        if at_once:
            job.pause()
        else:
            await job.reached(JobStatus.PENDING)
        assert bitmap.busy and spans(bitmap.map) == [(BEFORE.at, BEFORE.length)]
        if at_once:
            await job.cancel()
            await job.outcome()
            await guest.node.write(MEANWHILE.at, b"y" * MEANWHILE.length)
        else:
            await guest.node.write(MEANWHILE.at, b"y" * MEANWHILE.length)
            await (job.finalize() if ending == "success" else job.cancel())
            assert ((await job.outcome()).error is None) == (ending == "success")
        expected = AFTERWARDS[sync, mode][["success", "cancel while pending", "cancel at once"].index(ending)]
        wanted = DirtyBitmap(SIZE, CLUSTER)
        for span in expected:
            wanted.set(span)
        assert spans(bitmap.map) == spans(wanted)
        assert not bitmap.busy and bitmap.successor is None and bitmap.recording
        if ending == "success" and sync in ("incremental", "bitmap"):
            shown = target_content(host)
            assert shown == b"x" * BEFORE.length + bytes(SIZE - BEFORE.length), "only what was dirty is copied"
        await host.graph.release(guest)

    on_disks(scenario)


@pytest.mark.parametrize("granularity", [512, 4 * KiB, 64 * KiB, 256 * KiB, 64 * MiB])
@pytest.mark.parametrize("size", [SIZE, 1 * MiB + 3 * KiB, 512])
def test_granularity_and_copy_cluster_differ_and_the_last_ones_are_short(granularity: int, size: int) -> None:
    async def scenario(host: LittleHost) -> None:
        source = host.graph.node("source")
        bitmap = add_bitmap(source, granularity=granularity)
        guest = await host.guest(source)
        at = max(0, size - 700)
        await guest.node.write(at, b"z" * (size - at))
        dirty_before = bitmap.map.copy()
        job = await backup(host, sync="incremental")
        outcome = await job.outcome()
        assert outcome.error is None
        assert not bitmap.map.any()
        unit = max(granularity, CLUSTER)
        copied = Span.between(at // unit * unit, size)
        shown, source_shows = target_content(host, size), await guest.node.read(0, size)
        assert shown[copied.at :] == source_shows[copied.at :]
        assert shown[: copied.at] == bytes(copied.at)
        assert outcome.current == outcome.total == copied.length
        assert dirty_before.any()
        await host.graph.release(guest)

    on_disks(scenario, size=size)


def test_only_dirty_clusters_are_saved_before_a_guest_writes() -> None:
    async def scenario(host: LittleHost) -> None:
        source = host.graph.node("source")
        bitmap = add_bitmap(source)
        bitmap.record(Span(0, CLUSTER))
        guest = await host.guest(source)
        job = await backup(host, sync="bitmap", bitmap_mode="never", speed=1)
        job.pause()
        await guest.node.write(10, b"new")
        await guest.node.write(2 * MiB, b"new")
        assert target_content(host) == CONTENT[:CLUSTER] + bytes(SIZE - CLUSTER)
        job.resume()
        assert (await job.outcome()).total == CLUSTER
        await host.graph.release(guest)

    on_disks(scenario)


def test_a_disabled_bitmap_stays_disabled_and_records_nothing() -> None:
    async def scenario(host: LittleHost) -> None:
        source = host.graph.node("source")
        bitmap = add_bitmap(source)
        bitmap.record(Span(0, CLUSTER))
        bitmap.enabled = False
        guest = await host.guest(source)
        job = await backup(host, sync="bitmap", bitmap_mode="on-success", auto_finalize=False)
        await job.reached(JobStatus.PENDING)
        await guest.node.write(2 * MiB, b"new")
        await job.finalize()
        assert not bitmap.enabled and not bitmap.map.any()
        await host.graph.release(guest)

    on_disks(scenario)


def test_a_clean_bitmap_makes_an_empty_job() -> None:
    async def scenario(host: LittleHost) -> None:
        add_bitmap(host.graph.node("source"))
        outcome = await (await backup(host, sync="incremental")).outcome()
        assert (outcome.error, outcome.current, outcome.total) == (None, 0, 0)

    on_disks(scenario)


@pytest.mark.parametrize("mode", ["on-success", "never", "always"])
@pytest.mark.parametrize("sync", ["bitmap", "full"])
def test_a_failed_flush_of_the_target_loses_no_bit(sync: str, mode: str) -> None:
    if (sync, mode) == ("full", "never"):
        return

    async def main() -> None:
        async with LittleHost() as host:
            source = await host.disk("source", CONTENT)
            medium = FaultyMedium(make_disk(SIZE), [Fault(nth=1, operation=Operation.SYNC)])
            await host.disk("target", b"", medium=medium)
            bitmap = add_bitmap(source)
            bitmap.record(Span(3 * CLUSTER, CLUSTER))
            outcome = await (await backup(host, sync=sync, bitmap_mode=mode)).outcome()
            assert outcome.error == "Input/output error"
            everything = sync == "full" and mode == "always"
            assert spans(bitmap.map) == [(0, SIZE) if everything else (3 * CLUSTER, CLUSTER)]

    run(main())


@pytest.mark.parametrize("operation", [Operation.WRITE, Operation.SYNC])
@pytest.mark.parametrize("sync", ["incremental", "bitmap"])
def test_a_stored_bitmap_of_a_job_that_failed_holds_all_bits_when_it_is_opened_again(
    sync: str, operation: Operation
) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            source = await host.qcow2("source", NewImage(size=SIZE))
            wanted = BlockDirtyBitmapAdd(node="source", name="b", granularity=CLUSTER, persistent=True)
            await bitmaps.add_bitmap(host.graph, wanted)
            guest = await host.guest(source)
            await guest.node.write(BEFORE.at, CONTENT[: BEFORE.length])
            fault = Fault(nth=1, operation=operation, times=10**6)
            await host.disk("target", b"", medium=FaultyMedium(make_disk(SIZE), [fault]))
            job = await backup(host, sync=sync, bitmap_mode="on-success")
            await guest.node.write(MEANWHILE.at, CONTENT[: MEANWHILE.length])
            assert (await job.outcome()).error == "Input/output error"
            await host.graph.release(guest)
            await host.graph.remove("source")
            again = await host.add(driver="qcow2", node_name="again", file="source-file", read_only=True)
            [bitmap] = again.bitmaps
            assert not bitmap.inconsistent
            assert spans(bitmap.map) == [(each.at, each.length) for each in (BEFORE, MEANWHILE)]

    run(main())


def test_mode_always_keeps_what_did_not_arrive_before_an_error() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            source = await host.disk("source", CONTENT)
            plan = FaultPlan()
            host.disks["target"] = make_disk(SIZE)
            await host.disk("target", b"", medium=FaultyMedium(host.disks["target"], plan))
            bitmap = add_bitmap(source)
            bitmap.map.set_all()
            perf = {"max-workers": 1, "max-chunk": CLUSTER}
            job = await backup(host, sync="bitmap", bitmap_mode="always", speed=1 * MiB, x_perf=perf)
            await host.clock.sleep_until(host.clock.now_ns() + 10**9)
            plan.add(Fault(nth=1, operation=Operation.WRITE, errno=errno.ENOSPC, times=10**6))
            outcome = await job.outcome()
            plan.cure()
            assert outcome.error == "No space left on device"
            assert 0 < bitmap.map.count_bytes() < SIZE
            shown = target_content(host)
            for at in range(0, SIZE, CLUSTER):
                if not bitmap.map.any(Span(at, CLUSTER)):
                    assert shown[at : at + CLUSTER] == CONTENT[at : at + CLUSTER]
            # What is left is what the next backup must bring.
            assert (await (await backup(host, sync="bitmap", bitmap_mode="always")).outcome()).error is None
            assert target_content(host) == CONTENT and not bitmap.map.any()

    run(main())


def test_bits_return_when_a_later_action_of_the_transaction_fails() -> None:
    async def scenario(host: LittleHost) -> None:
        bitmap = add_bitmap(host.graph.node("source"))
        bitmap.record(Span(0, CLUSTER))
        wrong = convert({"type": "abort", "data": {}}, TransactionAction)
        for sync, mode in (("incremental", "on-success"), ("full", "always")):
            with pytest.raises(UsageError, match="Transaction aborted using Abort action"):
                await run_transaction(host, [action(sync=sync, bitmap_mode=mode), wrong])
            assert spans(bitmap.map) == [(0, CLUSTER)]
            assert not bitmap.busy and bitmap.successor is None

    on_disks(scenario)


def test_a_group_that_fails_keeps_the_bits_of_all_its_members() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            good, bad = await host.disk("source", CONTENT), await host.disk("bad", CONTENT)
            await host.disk("target", SIZE)
            medium = FaultyMedium(make_disk(SIZE), [Fault(nth=1, operation=Operation.WRITE, times=99)])
            await host.disk("bad-target", b"", medium=medium)
            bitmaps = [add_bitmap(good), add_bitmap(bad)]
            for bitmap in bitmaps:
                bitmap.record(Span(0, CLUSTER))
            grouped = TransactionProperties(completion_mode=ActionCompletionMode.GROUPED)
            other = {"device": "bad", "target": "bad-target", "job_id": "job1"}
            actions = [action(sync="incremental"), action(sync="incremental", **other)]
            jobs = await run_transaction(host, actions, grouped)
            errors = [(await job.outcome()).error for job in jobs]
            assert errors == ["Operation canceled", "Input/output error"]
            assert [spans(bitmap.map) for bitmap in bitmaps] == [[(0, CLUSTER)], [(0, CLUSTER)]]
            assert not any(bitmap.busy for bitmap in bitmaps)

    run(main())


REFUSALS = [
    ({"sync": "bitmap"}, {}, "Bitmap sync mode must be given when providing a bitmap"),
    ({"sync": "full"}, {}, "Bitmap sync mode must be given when providing a bitmap"),
    (
        {"sync": "none", "bitmap_mode": "always"},
        {},
        "sync mode 'none' does not produce meaningful bitmap outputs",
    ),
    (
        {"sync": "full", "bitmap_mode": "never"},
        {},
        "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'full'",
    ),
    (
        {"sync": "bitmap", "bitmap_mode": "never"},
        {"busy": True},
        "Bitmap 'b' is currently in use by another operation and cannot be used",
    ),
    (
        {"sync": "incremental"},
        {"inconsistent": True},
        "Bitmap 'b' is inconsistent and cannot be used",
    ),
    ({"sync": "incremental"}, {"readonly": True}, "Bitmap 'b' is readonly and cannot be modified"),
    ({"sync": "incremental", "bitmap": "other"}, {}, "Bitmap 'other' could not be found"),
    ({"sync": "incremental", "target": "source"}, {}, "Source and target cannot be the same"),
    ({"sync": "incremental", "target": "small"}, {}, "Source and target image have different sizes"),
    ({"sync": "incremental", "speed": -1}, {}, "Parameter 'speed' expects a non-negative value"),
]


@pytest.mark.parametrize(("members", "state", "text"), REFUSALS)
def test_refusals_have_qemus_words_and_leave_the_bitmap_alone(
    members: dict[str, object], state: dict[str, bool], text: str
) -> None:
    async def scenario(host: LittleHost) -> None:
        await host.disk("small", 1 * MiB)
        bitmap = add_bitmap(host.graph.node("source"), **state)
        with pytest.raises(UsageError) as refused:
            await backup(host, **members)
        assert str(refused.value) == text
        assert bitmap.successor is None and bitmap.busy == state.get("busy", False)

    on_disks(scenario)


def test_a_readonly_bitmap_may_be_used_if_it_is_never_changed() -> None:
    async def scenario(host: LittleHost) -> None:
        bitmap = add_bitmap(host.graph.node("source"), readonly=True)
        bitmap.map.set(Span(0, CLUSTER))
        assert (await (await backup(host, sync="bitmap", bitmap_mode="never")).outcome()).error is None
        assert target_content(host) == CONTENT[:CLUSTER] + bytes(SIZE - CLUSTER)

    on_disks(scenario)


def test_two_backups_by_bitmaps_of_one_source_run_side_by_side() -> None:
    async def scenario(host: LittleHost) -> None:
        await host.disk("other", SIZE)
        source = host.graph.node("source")
        bitmap = add_bitmap(source)
        second = add_bitmap(source)
        second.name = "c"
        guest = await host.guest(source)
        await guest.node.write(0, b"1" * CLUSTER)
        first_job = await backup(host, sync="incremental")
        first_job.pause()
        with pytest.raises(UsageError, match="Bitmap 'b' is currently in use by another operation"):
            await backup(host, sync="incremental", job_id="job1", target="other")
        second_job = await backup(host, sync="incremental", bitmap="c", job_id="job1", target="other")
        await guest.node.write(0, b"2" * 512)
        assert (await second_job.outcome()).error is None
        first_job.resume()
        assert (await first_job.outcome()).error is None
        for name in ("target", "other"):
            assert host.disks[name].pages.read(0, CLUSTER) == b"1" * CLUSTER
        assert spans(bitmap.map) == spans(second.map) == [(0, CLUSTER)]
        await host.graph.release(guest)

    on_disks(scenario)


def test_the_bitmap_of_an_overlay_counts_only_its_own_writes() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("base", CONTENT)
            image = NewImage(size=SIZE, cluster_size=4 * KiB)
            source = await host.qcow2("source", image, backing="base")
            await host.disk("target", CONTENT)
            bitmap = add_bitmap(source, granularity=4 * KiB)
            guest = await host.guest(source)
            await guest.node.write(CLUSTER + 100, b"a")
            await guest.node.discard(Span(3 * CLUSTER, 4 * KiB))
            await guest.node.zero(Span(5 * CLUSTER, 4 * KiB))
            assert len(spans(bitmap.map)) == 3
            outcome = await (await backup(host, sync="incremental")).outcome()
            assert (outcome.error, outcome.current) == (None, 3 * CLUSTER)
            assert target_content(host) == await guest.node.read(0, SIZE)
            await host.graph.release(guest)

    run(main())
