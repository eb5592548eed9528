import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from blockjobs.base.errors import ParameterError, UsageError
from blockjobs.base.units import MiB
from blockjobs.jobs.events import BlockJobPending
from blockjobs.jobs.transaction import (
    Action,
    ActionCompletionMode,
    Prepared,
    TransactionAction,
    TransactionProperties,
    run_transaction,
)
from blockjobs.lifecycle.events import JobStatusChange
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.spec import Group
from blockjobs.lifecycle.status import JobStatus
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.faults import Fault, FaultyMedium, Operation
from blockjobs.testing.little_host import LittleHost, make_disk

SIZE = 2 * MiB
CONTENT = {"a": random.Random(1).randbytes(SIZE), "b": random.Random(2).randbytes(SIZE)}


def backup(which: str, **members: object) -> Action:
    plain = {"job-id": f"job{which}", "device": f"source{which}", "target": f"target{which}", "sync": "full"}
    plain |= {name.replace("_", "-"): value for name, value in members.items()}
    return convert({"type": "blockdev-backup", "data": plain}, TransactionAction)


async def transact(host: LittleHost, *actions: Action, grouped: bool = False) -> list[JobHandle]:
    mode = ActionCompletionMode.GROUPED if grouped else ActionCompletionMode.INDIVIDUAL
    return await run_transaction(host, actions, TransactionProperties(completion_mode=mode))


def trail(host: LittleHost) -> list[str]:
    """`a:running` and the like, in order."""
    words = []
    for each in host.events:
        job = getattr(each, "id", None) or getattr(each, "device", "")
        what = each.status if isinstance(each, JobStatusChange) else type(each).__name__.removeprefix("BlockJob")
        words.append(f"{job.removeprefix('job')}:{what}")
    return words


def on_two_disks(scenario: Callable[[LittleHost], Awaitable[None]]) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            for which, content in CONTENT.items():
                await host.disk(f"source{which}", content)
                await host.disk(f"target{which}", SIZE)
            await scenario(host)

    run(main())


def test_a_group_starts_together_and_settles_newest_first() -> None:
    async def scenario(host: LittleHost) -> None:
        jobs = await transact(host, backup("a"), backup("b"), grouped=True)
        assert " ".join(trail(host)) == "a:created b:created a:running a:paused b:running b:paused a:running b:running"
        host.events.clear()
        for job in jobs:
            assert (await job.outcome()).error is None
        assert sorted(trail(host)[:2]) == ["a:waiting", "b:waiting"]
        assert (
            " ".join(trail(host)[2:])
            == "b:pending a:pending b:Completed b:concluded b:null a:Completed a:concluded a:null"
        )

    on_two_disks(scenario)


def test_only_the_manual_member_of_a_group_announces_that_it_is_pending() -> None:
    async def scenario(host: LittleHost) -> None:
        job_a, job_b = await transact(host, backup("a", auto_finalize=False), backup("b"), grouped=True)
        await job_b.reached(JobStatus.PENDING)
        assert [each for each in host.events if isinstance(each, BlockJobPending)] == [
            BlockJobPending(type="backup", id="joba")
        ]
        await job_b.finalize()
        assert (await job_a.outcome()).error is None

    on_two_disks(scenario)


def test_one_failure_of_a_group_cancels_the_others() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("sourcea", CONTENT["a"])
            await host.disk("targeta", SIZE)
            faulty = FaultyMedium(make_disk(CONTENT["b"]), [Fault(nth=1, operation=Operation.READ, times=99)])
            await host.disk("sourceb", b"", medium=faulty)
            await host.disk("targetb", SIZE)
            job_a, job_b = await transact(host, backup("a", speed=1024), backup("b"), grouped=True)
            assert (await job_b.outcome()).error == "Input/output error"
            assert (await job_a.outcome()).error == "Operation canceled"
            assert (
                " ".join(trail(host)[8:])
                == "b:Error b:aborting b:Completed b:concluded b:null a:aborting a:Cancelled a:concluded a:null"
            )

    run(main())


def test_individual_jobs_have_nothing_to_do_with_each_other() -> None:
    async def scenario(host: LittleHost) -> None:
        job_a, job_b = await transact(host, backup("a", speed=1024), backup("b"))
        assert (await job_b.outcome()).error is None
        await job_a.cancel()
        assert (await job_a.outcome()).error == "Operation canceled"

    on_two_disks(scenario)


def test_a_later_refusal_unstarts_the_earlier_jobs() -> None:
    async def scenario(host: LittleHost) -> None:
        before = [node.name for node in host.graph.nodes()]
        for bad, text in (
            (convert({"type": "abort", "data": {}}, TransactionAction), "Transaction aborted using Abort action"),
            (backup("b", target="nosuch"), "Cannot find device='nosuch' nor node-name='nosuch'"),
        ):
            host.events.clear()
            with pytest.raises(UsageError) as refused:
                await transact(host, backup("a", auto_dismiss=False), bad, grouped=True)
            assert str(refused.value) == text
            assert trail(host) == ["a:created", "a:aborting", "a:concluded", "a:null"]
            assert [node.name for node in host.graph.nodes()] == before
            assert not host.jobs.jobs()

    on_two_disks(scenario)


def test_all_members_share_one_instant() -> None:
    """Each guest write goes to both disks; a pair of backups never sees it on one of them only."""

    async def scenario(host: LittleHost) -> None:
        roots = [await host.guest(host.graph.node(f"source{which}")) for which in "ab"]
        stamps = 0

        async def stamp() -> None:
            nonlocal stamps
            for number in range(1, 60):
                for root in roots:
                    await root.node.write(0, number.to_bytes(8, "big"))
                stamps = number
                await asyncio.sleep(0.001)

        async with asyncio.TaskGroup() as group:
            group.create_task(stamp())
            await asyncio.sleep(0.02)
            jobs = await transact(host, backup("a", speed=MiB), backup("b", speed=MiB), grouped=True)
        for job in jobs:
            assert (await job.outcome()).error is None
        seen = [int.from_bytes(host.disks[f"target{which}"].pages.read(0, 8), "big") for which in "ab"]
        assert 0 <= seen[0] - seen[1] <= 1  # the guest itself may have been between its two writes
        assert 0 < seen[0] < stamps
        for root in roots:
            await host.graph.release(root)

    on_two_disks(scenario)


class Diary(Action, frozen=True, kw_only=True, tag="x-diary"):
    """Writes down what is done to it; not registered, so no client can say it."""

    name: str
    pages: list[str]

    async def prepare(self, host: object, group: Group | None) -> Prepared:
        self.pages.append(f"prepare {self.name}")
        if self.name == "bad":
            raise UsageError("bad")
        return DiaryEntry(self)


class DiaryEntry(Prepared):
    def __init__(self, action: Diary) -> None:
        self._action = action

    async def commit(self) -> None:
        self._action.pages.append(f"commit {self._action.name}")

    async def abort(self) -> None:
        self._action.pages.append(f"abort {self._action.name}")


def test_actions_are_prepared_and_committed_in_order_and_undone_in_reverse() -> None:
    async def scenario(host: LittleHost) -> None:
        pages: list[str] = []
        assert await transact(host, Diary(name="1", pages=pages), Diary(name="2", pages=pages)) == []
        assert pages == ["prepare 1", "prepare 2", "commit 1", "commit 2"]
        pages.clear()
        with pytest.raises(UsageError, match="bad"):
            await transact(host, *(Diary(name=name, pages=pages) for name in ("1", "2", "bad", "3")))
        assert pages == ["prepare 1", "prepare 2", "prepare bad", "abort 2", "abort 1"]

    on_two_disks(scenario)


def test_only_backups_may_be_grouped() -> None:
    async def scenario(host: LittleHost) -> None:
        with pytest.raises(UsageError) as refused:
            await transact(host, Diary(name="1", pages=[]), grouped=True)
        assert str(refused.value) == (
            "Action 'x-diary' does not support Transaction property completion-mode = grouped"
        )

    on_two_disks(scenario)


def test_an_empty_transaction_and_an_unknown_action() -> None:
    async def scenario(host: LittleHost) -> None:
        assert await transact(host) == []
        with pytest.raises(ParameterError, match="Parameter 'type' does not accept value 'x-diary'"):
            convert({"type": "x-diary", "data": {}}, TransactionAction)

    on_two_disks(scenario)


def test_a_transaction_pauses_running_jobs_for_a_moment() -> None:
    async def scenario(host: LittleHost) -> None:
        (job,) = await transact(host, backup("a", speed=1024))
        await asyncio.sleep(1)
        host.events.clear()
        await transact(host)
        assert trail(host) == ["a:paused", "a:running"]
        await job.cancel()

    on_two_disks(scenario)
