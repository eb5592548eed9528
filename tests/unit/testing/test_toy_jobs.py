"""The toy jobs are for users: this is how a test of theirs looks, in real time and in virtual time."""

import asyncio

from blockjobs.base.bus import Bus
from blockjobs.base.clock import SystemClock
from blockjobs.lifecycle.engine import Engine
from blockjobs.lifecycle.history import Fate
from blockjobs.lifecycle.status import JobStatus
from blockjobs.testing.clock import VirtualClock, run
from blockjobs.testing.jobs import countdown, failing, ready_then_wait


def test_in_virtual_time() -> None:
    async def scenario() -> None:
        async with Engine(VirtualClock(), Bus()) as engine:
            counted = await engine.submit("x-count", countdown(600), id="minute")
            outcome = await counted.outcome()
            assert (outcome.fate, outcome.current) == (Fate.COMPLETED, 600)
            assert (outcome.ended_ns - outcome.created_ns) == 60 * 10**9
            failed = await engine.submit("x-fail", failing(OSError(28, "full")), id="f")
            assert (await failed.outcome()).error == "No space left on device"
            mirror = await engine.submit("x-mirror", ready_then_wait(), id="m")
            await mirror.reached(JobStatus.READY)
            await mirror.cancel(force=False)
            assert (await mirror.outcome()).fate is Fate.COMPLETED
            mirror = await engine.submit("x-mirror", ready_then_wait(soft=False), id="m")
            await mirror.reached(JobStatus.READY)
            mirror.complete()
            assert (await mirror.outcome()).fate is Fate.COMPLETED

    run(scenario())


def test_in_real_time() -> None:
    async def scenario() -> None:
        async with Engine(SystemClock(), Bus()) as engine:
            job = await engine.submit("x-count", countdown(2), id="j")
            await asyncio.sleep(0.02)
            job.pause()
            await asyncio.sleep(0.02)
            assert job.status is JobStatus.PAUSED
            job.resume()
            assert (await job.outcome()).fate is Fate.COMPLETED

    asyncio.run(scenario())
