"""Random users against the whole engine in virtual time: nothing hangs, nothing is out of order, everything ends."""

import asyncio
import errno
import random
from dataclasses import dataclass, field

import pytest

from blockjobs.base.bus import Bus
from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.engine import Engine
from blockjobs.lifecycle.error_policy import OnError, Side
from blockjobs.lifecycle.events import JobStatusChange
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.machine import Machine
from blockjobs.lifecycle.status import NEXT, JobStatus
from blockjobs.lifecycle.stimulus import Stimulus, from_json, to_json
from blockjobs.testing.clock import VirtualClock, run
from blockjobs.testing.jobs import ToyJob


@dataclass(kw_only=True)
class Worker(ToyJob):
    """Random I/O through a window; may fail, may become ready; its hooks take their time."""

    chance: random.Random
    in_flight: int = 0
    seen_quiet: list[bool] = field(default_factory=list)

    async def run(self, ctx: JobContext) -> None:
        async def piece() -> None:
            await ctx.attempt(self.io, side=Side.TARGET)

        ctx.progress.set_remaining(self.ticks)
        async with ctx.window(max_in_flight=self.chance.randint(1, 3)) as window:
            for _ in range(self.ticks):
                await ctx.checkpoint(cost_bytes=100)
                await window.submit(piece)
                ctx.progress.advance(1)
                if self.chance.random() < 0.1:
                    await ctx.interruptible(asyncio.sleep(self.chance.random()))
        if self.wants_completion:
            await ctx.ready()
            await ctx.completion()
        if self.fails:
            raise self.fails

    async def io(self) -> None:
        self.in_flight += 1
        await asyncio.sleep(self.chance.random() / 10)
        self.in_flight -= 1
        if self.chance.random() < 0.05:
            raise IoFailure(self.chance.choice([errno.EIO, errno.ENOSPC]))

    async def prepare(self, ctx: JobContext) -> None:
        await asyncio.sleep(self.chance.random() / 10)
        await super().prepare(ctx)

    async def abort(self, ctx: JobContext) -> None:
        await asyncio.sleep(self.chance.random() / 10)
        await super().abort(ctx)


class Town:
    """One engine, a few users, and everything written down."""

    def __init__(self, engine: Engine, chance: random.Random) -> None:
        self.engine, self.chance = engine, chance
        self.handles: list[JobHandle] = []
        self.statuses: dict[JobHandle, list[JobStatus]] = {}
        self.diary: list[tuple[str, str]] = []

    def hear(self, event: object) -> None:
        assert isinstance(event, JobStatusChange)
        if event.status is not JobStatus.CREATED:
            handle = next(handle for handle in reversed(self.handles) if handle.id == event.id)
            assert event.status in NEXT[self.statuses[handle][-1]], (event, self.statuses[handle])
            self.statuses[handle].append(event.status)

    def create(self) -> None:
        chance, group, started = self.chance, self.engine.new_group(), []
        for _ in range(chance.choice([1, 1, 2, 3])):
            number = len(self.handles)
            toy = Worker(
                name=f"j{number}",
                ticks=chance.randint(0, 20),
                wants_completion=chance.random() < 0.4,
                soft=chance.random() < 0.5,
                fails=IoFailure(5) if chance.random() < 0.1 else None,
                fails_to_prepare=IoFailure(5) if chance.random() < 0.1 else None,
                policies={Side.TARGET: chance.choice(list(OnError))},
                diary=self.diary,
                chance=chance,
            )
            handle = self.engine.create(
                "mirror",
                toy,
                id=f"j{number}",
                group=group,
                auto_finalize=chance.random() < 0.6,
                auto_dismiss=chance.random() < 0.6,
                speed_bytes_per_s=chance.choice([0, 0, 500]),
            )
            self.handles.append(handle)
            self.statuses[handle] = [JobStatus.CREATED]
            started.append(handle)
        for handle in started:
            handle.start()

    async def user(self) -> None:
        for _ in range(12):
            await asyncio.sleep(self.chance.random())
            if self.chance.random() < 0.3 or not self.handles:
                self.create()
                continue
            handle = self.chance.choice(self.handles[-4:])
            try:
                if self.chance.random() < 0.5:
                    async with self.engine.control:
                        await self.verb(handle)
                else:
                    await self.verb(handle)
            except UsageError:
                pass

    async def verb(self, handle: JobHandle) -> None:
        match self.chance.randrange(10):
            case 0 | 1:
                handle.pause()
            case 2 | 3:
                handle.resume()
            case 4:
                await handle.block_cancel(force=self.chance.random() < 0.5)
            case 5:
                handle.complete()
            case 6:
                await handle.finalize()
            case 7:
                handle.dismiss()
            case 8:
                handle.set_speed(self.chance.choice([0, 100, 10_000]))
            case 9:
                await self.drain(handle)

    async def drain(self, handle: JobHandle) -> None:
        handle.quiesce_begin()
        await handle.quiet()
        worker = handle.job
        assert isinstance(worker, Worker)
        for _ in range(5):
            assert handle.is_quiet() or handle.life.is_stopping
            assert worker.in_flight == 0 or handle.life.is_stopping
            await asyncio.sleep(self.chance.random() / 10)
        handle.quiesce_end()

    def settle_up(self) -> None:
        for handle in self.handles:
            hooks = [what for name, what in self.diary if name == handle.id and what in ("commit", "abort", "clean")]
            assert hooks in (["commit", "clean"], ["abort", "clean"])
            ends = [what for name, what in self.diary if name == handle.id and what in ("completed", "cancelled")]
            assert len(ends) == 1
            assert handle.status in (JobStatus.CONCLUDED, JobStatus.NULL)
            by_group = {
                what
                for other in self.handles
                for name, what in self.diary
                if other.spec.group == handle.spec.group and name == other.id and what in ("commit", "abort")
            }
            assert len(by_group) == 1, "one fate per group"


def history(seed: int) -> None:
    journal: list[bytes] = []

    def remember(stimulus: Stimulus) -> None:
        journal.append(to_json(stimulus))

    async def main() -> None:
        bus = Bus()
        engine = Engine(VirtualClock(), bus, journal=remember)
        town = Town(engine, random.Random(seed))
        with bus.listening(town.hear):
            async with engine, asyncio.TaskGroup() as users:
                for _ in range(3):
                    users.create_task(town.user())
        town.settle_up()
        again = Machine()
        for line in journal:
            again.feed(from_json(line))
        assert {key: life.status for key, life in again.lives.items()} == {
            handle.id: handle.status for handle in town.handles if handle.status is not JobStatus.NULL
        }
        assert not again.groups

    run(main())


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_histories(first: int) -> None:
    for seed in range(first, first + 20):
        try:
            history(seed)
        except BaseException as error:
            error.add_note(f"seed={seed}")
            raise
